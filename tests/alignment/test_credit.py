"""Credit: planted rhythms are found, the sums are what they should be, and attention is what transformers computes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama import LlamaConfig, LlamaModel

from couturier.components.alignment import credit
from couturier.components.alignment.credit import CreditConfig, Kind, credited, looks, queries_and_keys, weights
from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.generator.prompt import Prompts
from couturier.components.generator.tokenise import load_eyes
from couturier.components.runtime import seeded
from couturier.kernels.attention_stats import attention_stats
from couturier.kernels.attention_stats.reference import attention_map

from .conftest import HISTORY, ITEMS

CODES, CODEBOOK = 16, 32
KINDS: tuple[Kind, ...] = ("uniform", "preplan", "anchor", "coupled", "random")


@pytest.fixture(scope="module")
def generator(world: Path) -> JanusGenerator:
    """An untrained Janus of three layers."""
    config = GeneratorConfig(width=32, layers=3, heads=4, ffn=48, history=HISTORY)
    catalogue, eyes = Catalogue.load(world / "sequences"), load_eyes(world / "tokenise" / "eyes")
    return JanusGenerator.tiny(config, catalogue, eyes=eyes, codebook=CODEBOOK, codes=CODES, seed=0).eval()


def drawn(generator: JanusGenerator, users: int, n: int) -> tuple[Prompts, Tensor]:
    """Prompts of different lengths, and codes of no model."""
    random = seeded(1, "credit")
    favourites = torch.randint(0, ITEMS, (users, HISTORY), generator=random).numpy()
    favourites[0, 1:] = -1
    return generator.prompts.build(favourites), torch.randint(0, CODEBOOK, (users, n, CODES), generator=random)


def naive_looks(
    generator: JanusGenerator, prompts: Prompts, codes_UnL: Tensor, config: CreditConfig
) -> tuple[Tensor, Tensor]:
    """From transformers' own attention maps, one picture of one user at a time, nothing packed and nothing padded."""
    window, near, far = config.distances(CODES)
    lm = generator.model.model.language_model
    waad, fai = torch.zeros(codes_UnL.shape), torch.zeros(codes_UnL.shape)
    for u, prefix_PD in enumerate(generator.embed_prompt(prompts)):
        for i, codes_L in enumerate(codes_UnL[u]):
            x = torch.cat([prefix_PD[prompts.mask_UP[u]], generator.embed_codes(codes_L)])[None]
            maps = lm(inputs_embeds=x, output_attentions=True).attentions
            map_MLT = torch.cat([maps[layer][0] for layer in (1, 2)])[:, -CODES:]
            size = map_MLT.shape[2]
            apart_LT = torch.arange(size)[-CODES:, None] - torch.arange(size)
            order = (map_MLT * apart_LT).sum(2).mean(1).argsort()
            count = round(0.3 * len(order))
            waad[u, i] = (map_MLT[order[:count]].mean(0) * apart_LT.clamp(0, window)).sum(1)
            read = (apart_LT >= near) & (apart_LT <= far)
            column = (map_MLT[order[-count:]].mean(0) * read).sum(0) / read.sum(0).clamp_min(1)
            fai[u, i] = column[-CODES:]
    return waad, fai


@torch.no_grad()
@pytest.mark.parametrize("held", [1 << 26, 1])
def test_looks_are_those_of_the_attention_maps_of_transformers(
    generator: JanusGenerator, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, codes_UnL = drawn(generator, 3, 2)
    assert not bool(prompts.mask_UP.all())
    monkeypatch.setattr(credit, "_KEY_BYTES", held)
    config = CreditConfig(kind="anchor", window=5, near=3, far=9)
    found = looks(generator, prompts, codes_UnL, config)
    lm = generator.model.model.language_model
    kept = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    wanted = naive_looks(generator, prompts, codes_UnL, config)
    lm.set_attn_implementation(kept)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)
    assert float(found[0].std()) > 0.01 and float(found[1].std()) > 0.001


@torch.no_grad()
def test_queries_and_keys_of_shared_heads_give_the_maps() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    lm, ids = LlamaModel(config).eval(), torch.randint(0, 20, (2, 9))
    lm.set_attn_implementation("eager")
    maps = lm(ids, output_attentions=True).attentions
    for layer, (q, k) in zip((0, 2), queries_and_keys(lm, (0, 2), lambda: lm(ids)), strict=True):
        assert q.shape == (2, 4, 9, 8) and k.shape == (2, 2, 9, 8)
        torch.testing.assert_close(attention_map(q, k, None, None, 8**-0.5), maps[layer], atol=1e-6, rtol=1e-5)
    assert not lm.rotary_emb._forward_hooks


@torch.no_grad()
def test_a_picture_has_the_same_credit_in_any_company(generator: JanusGenerator) -> None:
    prompts, codes_UnL = drawn(generator, 3, 2)
    advantage_Un = torch.ones(3, 2)
    for kind in KINDS[1:]:
        config = CreditConfig(kind=kind)
        whole, _ = credited(generator, prompts, codes_UnL, advantage_Un, config)
        alone = Prompts(**{name: one[1:2] for name, one in vars(prompts).items()})
        single, _ = credited(generator, alone, codes_UnL[1:2], advantage_Un[1:2], config)
        torch.testing.assert_close(single, whole[1:2])


def rhythm(starts: set[int], anchor: int, length: int = 64) -> Tensor:
    """A map ``[L, L]`` with a known rhythm: a code looks at the one before it, or twelve back where a part starts; a
    third of its look goes to the anchor, once that is far enough behind."""
    map_LL = torch.zeros(length, length, dtype=torch.float64)
    for t in range(length):
        own = 2 / 3 if t >= anchor + 10 else 1.0
        map_LL[t, max(0, t - (12 if t in starts else 1))] += own
        map_LL[t, anchor] += 1 - own
    return map_LL


def looks_of(map_LL: Tensor) -> tuple[Tensor, Tensor]:
    """WAAD and FAI by the kernel, from queries and keys whose attention is this map."""
    q, k = map_LL.clamp_min(1e-300).log()[None, None], torch.eye(map_LL.shape[0], dtype=torch.float64)[None, None]
    found = attention_stats(q, k, scale=1.0)
    return found.waad_BHR[0, 0], found.influence_BHS[0, 0]


def test_planted_parts_and_anchors_are_found() -> None:
    starts, anchor = {20, 36, 52}, 5
    waad_L, fai_L = looks_of(rhythm(starts, anchor))
    picked, _ = weights(waad_L, fai_L, CreditConfig(kind="anchor", share=1 / 64))
    assert (picked > 1).nonzero().flatten().tolist() == [anchor]
    plain_L, none_L = looks_of(rhythm(starts, 63))  # no anchor: the only jumps are where parts start
    picked, _ = weights(plain_L, none_L, CreditConfig(kind="preplan", share=6 / 64))
    assert (picked > 1).nonzero().flatten().tolist() == sorted(starts | {start - 1 for start in starts})


def loud_worlds(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes ``[N, L]`` of quiet noise (below 24), but one of the first five, which is loud, and which most of the last
    seven repeat; and where it stands, ``[N, 1]``."""
    codes_NL = torch.randint(0, 24, (count, CODES), generator=random)
    at_N1 = torch.randint(0, 5, (count, 1), generator=random)
    loud_N1 = torch.randint(24, CODEBOOK, (count, 1), generator=random)
    codes_NL.scatter_(1, at_N1, loud_N1)
    repeats = torch.rand(count, 7, generator=random) < 0.7
    codes_NL[:, 9:] = torch.where(repeats, loud_N1, codes_NL[:, 9:])
    return codes_NL, at_N1


def test_a_model_that_has_learned_an_anchor_shows_it(generator: JanusGenerator) -> None:
    """Changing the code of the highest FAI changes what follows more than changing that of the lowest does (the paper:
    in 87 % of cases), and it is often the code that the rest was made from."""
    model, random = copy.deepcopy(generator), seeded(0, "loud")
    optimiser = torch.optim.AdamW(model.parameters_to_train(), lr=5e-3)
    prompts = model.prompts.build(np.full((48, HISTORY), -1))
    for _ in range(120):
        codes_NL, _ = loud_worlds(48, random)
        loss = -model.log_prob(prompts, codes_NL[:, None])[..., 9:].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    codes_NL, at_N1 = loud_worlds(48, random)
    fai_NL = looks(model, prompts, codes_NL[:, None], CreditConfig())[1][:, 0, :9]
    with torch.no_grad():
        lp_NLK = model.logits(prompts, codes_NL[:, None]).log_softmax(-1)[:, 0, 10:]
        changes = []
        for place_N1 in (fai_NL.argmax(1, keepdim=True), fai_NL.argmin(1, keepdim=True)):
            old_N1 = codes_NL.gather(1, place_N1)
            new_N1 = torch.where(old_N1 >= 24, 24 + (old_N1 - 21) % 8, (old_N1 + 5) % 24)
            other_NL = codes_NL.scatter(1, place_N1, new_N1)
            other_NLK = model.logits(prompts, other_NL[:, None]).log_softmax(-1)[:, 0, 10:]
            changes.append((lp_NLK.exp() * (lp_NLK - other_NLK)).sum((1, 2)))
    assert (changes[0] > changes[1]).float().mean() > 0.7
    assert changes[0].mean() > 3 * changes[1].mean()
    assert (fai_NL.argmax(1, keepdim=True) == at_N1).float().mean() > 0.25  # one in nine by chance


def test_coupled_gives_back_to_the_code_that_began_the_anchor() -> None:
    waad_L = torch.tensor([1.0, 1, 9, 4, 1, 1, 1, 1, 1, 1])
    fai_L = torch.zeros(10)
    fai_L[5] = 0.8
    weight_L, moved = weights(waad_L, fai_L, CreditConfig(kind="coupled", gamma=2.0, moved=0.25))
    # Jumps are 0 8 5 3 0 ...: of the three before code 5, code 2 has the highest.
    assert weight_L.tolist() == [1, 1, 1.25, 1, 1, 1.75, 1, 1, 1, 1]
    assert moved == 1.0
    # Three codes back is as far as it is sought; a code that looks far itself is no follower.
    assert weights(waad_L.roll(-2), fai_L, CreditConfig(kind="coupled"))[1] == 0.0
    far_L = waad_L.clone()
    far_L[5] = 8.0
    assert weights(far_L, fai_L, CreditConfig(kind="coupled"))[1] == 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 40), st.sampled_from(["preplan", "anchor", "coupled"]), st.floats(0.05, 1.0), st.floats(0.5, 3.0),
    st.floats(0, 1), st.integers(1, 4), st.integers(0, 10_000),
)  # fmt: skip
def test_how_many_are_picked_and_that_moving_makes_no_credit(
    length: int, kind: Kind, share: float, gamma: float, moved: float, reach: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    waad_NL, fai_NL = torch.rand(3, length, generator=g).double(), torch.rand(3, length, generator=g).double()
    config = CreditConfig(kind=kind, share=share, gamma=gamma, moved=moved, reach=reach)
    weight_NL, given_back = weights(waad_NL, fai_NL, config)
    count = max(1, round(share * length))
    if kind == "preplan":
        count = min(count, length - 1)  # the last code has none after it to differ from
    bonus = (gamma - 1) * count
    torch.testing.assert_close((weight_NL - 1).sum(1), torch.full((3,), bonus).double())
    assert kind == "coupled" or (given_back == 0 and set((weight_NL - 1).unique().tolist()) <= {0.0, gamma - 1})
    if gamma > 1:
        assert float(weight_NL.min()) >= 1


def test_codes_that_nobody_reads_are_no_anchors() -> None:
    fai_L = torch.tensor([0.3, 0.2, 0, 0, 0, 0])
    assert weights(torch.ones(6), fai_L, CreditConfig(kind="anchor", share=1.0))[0].tolist() == [1.5, 1.5, 1, 1, 1, 1]
    assert not (weights(torch.ones(6), fai_L, CreditConfig(kind="preplan"))[0] - 1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_earned_is_stressed(generator: JanusGenerator, kind: Kind) -> None:
    prompts, codes_UnL = drawn(generator, 2, 3)
    advantage_Un = torch.tensor([[1.0, -1.0, 0.0], [0.5, 2.0, -2.5]])
    found, figures = credited(generator, prompts, codes_UnL, advantage_Un, CreditConfig(kind=kind))
    if kind == "uniform":
        assert found is advantage_Un and figures == {}
        return
    assert found.shape == (2, 3, CODES) and not found.requires_grad
    ratio = found / advantage_Un[..., None]
    assert torch.equal(ratio[advantage_Un < 0], torch.ones(2, CODES))
    assert not found[advantage_Un == 0].any()
    earned = ratio[advantage_Un > 0]
    assert figures["credit_share"] == pytest.approx(float((earned > 1).sum()) / found.numel())
    if kind == "coupled":
        assert earned.mean().item() == pytest.approx(1 + 0.5 * 6 / 16)
        assert 0 <= figures["credit_moved"] <= 1
    else:
        assert (earned > 1).sum(1).tolist() == [6, 6, 6]  # 40 % of 16
        assert figures["credit_weight"] == pytest.approx(1 + 0.5 * 6 / 16)


def test_a_gamma_of_one_is_plain(generator: JanusGenerator) -> None:
    prompts, codes_UnL = drawn(generator, 2, 3)
    advantage_Un = torch.tensor([[1.0, -1.0, 0.0], [0.5, 2.0, -2.5]])
    for kind in KINDS[1:]:
        found, figures = credited(generator, prompts, codes_UnL, advantage_Un, CreditConfig(kind=kind, gamma=1.0))
        assert torch.equal(found, advantage_Un[..., None].expand(2, 3, CODES))
        assert figures["credit_share"] == 0


def test_the_policy_is_left_as_it_was(generator: JanusGenerator) -> None:
    prompts, codes_UnL = drawn(generator, 2, 2)
    before = generator.log_prob(prompts, codes_UnL)
    looks(generator, prompts, codes_UnL, CreditConfig())
    assert torch.equal(generator.log_prob(prompts, codes_UnL), before)
    layers = generator.model.model.language_model.layers
    assert not any(one._forward_hooks for layer in layers for one in (layer.self_attn.q_proj, layer.self_attn.k_proj))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"share": 0.0}, "share is 0.0"),
        ({"heads": 0.7}, "heads is 0.7"),
        ({"near": 5, "far": 3}, "far is 3"),
        ({"moved": 2.0, "reach": 0}, "reach is 0.*moved is 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CreditConfig(**changes)  # type: ignore[arg-type]
