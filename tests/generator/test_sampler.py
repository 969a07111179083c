"""The sampler against the definition: greedy codes, the sampling distribution, guidance, seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from couturier.components.errors import ConfigError
from couturier.components.generator import blocks, sampler
from couturier.components.generator.blocks import Turn
from couturier.components.generator.decoding import Decoding
from couturier.components.generator.janus import JanusGenerator
from couturier.components.generator.sampler import _distinct, _Points
from couturier.components.runtime import threads
from couturier.kernels import dispatch, llama_layer


def test_greedy_codes_are_the_argmax_of_the_teacher_forced_pass(
    generator: JanusGenerator, histories: np.ndarray
) -> None:
    codes = generator.sample(histories, 2, seeds=[1, 2, 3], temperature=0)
    logits = generator.logits(generator.prompts.build(histories), codes)
    assert torch.equal(logits.argmax(-1), codes)


@pytest.mark.parametrize("spread", [False, True])
def test_samples_follow_the_models_distribution(generator: JanusGenerator, histories: np.ndarray, spread: bool) -> None:
    """First codes of many samples against the softmax, by a chi-square statistic."""
    n = 4000
    first = generator.sample(histories[:1], n, seeds=[7], spread=spread)[0, :, 0]
    zero = torch.zeros(1, 1, 4, dtype=torch.long)
    p = generator.logits(generator.prompts.build(histories[:1]), zero)[0, 0, 0].softmax(-1)
    seen = torch.bincount(first, minlength=24)
    big = p * n >= 5
    chi = ((seen - p * n).square() / (p * n))[big].sum()
    assert chi < 60  # 23 degrees of freedom: 99.99 % quantile is 55


def test_every_single_spread_sample_follows_the_models_distribution(
    generator: JanusGenerator, histories: np.ndarray
) -> None:
    """The second of two spread pictures over many seeds: its first code, and its last code after that."""
    users = 1500
    codes = generator.sample(histories[:1].repeat(users, 0), 2, seeds=list(range(users)))[:, 1]
    likeliest = codes[:, 0].mode().values
    for at, chosen in ((0, codes), (3, codes[codes[:, 0] == likeliest])):
        p = generator.logits(generator.prompts.build(histories[:1]), chosen[None])[0, :, at].softmax(-1)
        expected = p.sum(0)
        seen = torch.bincount(chosen[:, at], minlength=24)
        big = expected >= 5
        chi = ((seen - expected).square() / expected)[big].sum()
        assert chi < 60


def test_spread_samples_of_a_user_share_out_the_distribution(generator: JanusGenerator, histories: np.ndarray) -> None:
    """Of n samples n times its probability begin with a code, to within one; and so on from there."""
    n = 200
    codes = generator.sample(histories[:1], n, seeds=[3])
    prompts = generator.prompts.build(histories[:1])
    begins = torch.cartesian_prod(torch.arange(24), torch.arange(24))
    whole = torch.cat([begins, torch.zeros(len(begins), codes.shape[-1] - 2, dtype=torch.long)], 1)
    lp = generator.logits(prompts, whole[None]).log_softmax(-1)[0, :, :2].gather(-1, begins[..., None]).sum((1, 2))
    seen = torch.bincount(codes[0, :, 0] * 24 + codes[0, :, 1], minlength=24 * 24)
    assert (seen - n * lp.exp().double()).abs().max() < 2
    begun = torch.bincount(codes[0, :, 0], minlength=24)
    assert (begun - n * lp.exp().double().view(24, 24).sum(1)).abs().max() < 1 + 1e-3
    after = begun.repeat_interleave(24) * (lp - lp.view(24, 24).logsumexp(1).repeat_interleave(24)).exp()
    assert (seen - after).abs().max() < 1 + 1e-3
    independent = generator.sample(histories[:1], n, seeds=[3], spread=False)
    seen = torch.bincount(independent[0, :, 0] * 24 + independent[0, :, 1], minlength=24 * 24)
    assert (seen - n * lp.exp().double()).abs().max() > 2


def test_spread_points_stay_uniform_and_unlike_each_other_to_the_last_code() -> None:
    uniforms = torch.rand(64, 4, 60, generator=torch.Generator().manual_seed(0))
    points = _Points(uniforms, spread=True)
    p = torch.full((64, 4, 8), 1 / 8)
    codes_Nt = torch.stack([points.choose(p) for _ in range(60)], -1).flatten(0, 1)
    shares = torch.stack([torch.bincount(codes_Nt[:, t], minlength=8) for t in range(60)]) / 256
    assert (shares - 1 / 8).abs().max() < 0.11
    correlation = torch.corrcoef(codes_Nt.double().T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.3


def test_guidance_one_is_conditional_and_zero_is_unconditional(
    generator: JanusGenerator, histories: np.ndarray
) -> None:
    full, other = histories[:1], np.array([[20, 21, 22, 23, 24]])
    free_a = generator.sample(full, 8, seeds=[5], guidance=0)
    free_b = generator.sample(other, 8, seeds=[5], guidance=0)
    assert torch.equal(free_a, free_b)
    barely = generator.sample(full, 8, seeds=[5], guidance=1 + 1e-9)
    assert torch.equal(generator.sample(full, 8, seeds=[5]), barely)
    assert not torch.equal(generator.sample(full, 8, seeds=[5]), free_a)


def test_guided_logits_are_mixed_as_the_formula_says(generator: JanusGenerator, histories: np.ndarray) -> None:
    codes = generator.sample(histories[:1], 1, seeds=[5], guidance=3.0, temperature=0)
    prompts = generator.prompts.build(histories[:1])
    with_history = generator.logits(prompts, codes)
    without = generator.logits(prompts.unconditional(generator.prompts.pad_id), codes)
    assert torch.equal((without + 3.0 * (with_history - without)).argmax(-1), codes)


def test_a_users_pictures_depend_on_their_own_seed_alone(generator: JanusGenerator, histories: np.ndarray) -> None:
    together = generator.sample(histories, 3, seeds=[11, 12, 13])
    for u, seed in enumerate([11, 12, 13]):
        assert torch.equal(generator.sample(histories[u : u + 1], 3, seeds=[seed])[0], together[u])
    assert not torch.equal(generator.sample(histories, 3, seeds=[21, 12, 13])[0], together[0])


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}])
def test_keeping_one_code_is_greedy(generator: JanusGenerator, histories: np.ndarray, setting: dict) -> None:
    greedy = generator.sample(histories, 2, seeds=[1, 2, 3], temperature=0)
    assert torch.equal(generator.sample(histories, 2, seeds=[1, 2, 3], **setting), greedy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "seeds": [1]}, "at least one picture"),
        ({"n": 1, "seeds": [1, 2]}, "2 seeds were given for 1 users"),
        ({"n": 1, "seeds": [1], "temperature": -1.0}, "out of range"),
        ({"n": 1, "seeds": [1], "top_p": 0.0}, "out of range"),
    ],
)
def test_refuses_what_makes_no_sense(
    generator: JanusGenerator, histories: np.ndarray, arguments: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        generator.sample(histories[:1], **arguments)


def test_many_samples_of_a_user_lie_in_several_rows_and_none_is_lost(
    generator: JanusGenerator, histories: np.ndarray
) -> None:
    """35 samples take three rows of twelve; each follows its own prompt and nobody's codes but its own."""
    codes = generator.sample(histories, 35, seeds=[1, 2, 3], spread=False)
    assert codes.shape == (3, 35, 4)
    few = generator.sample(histories, 5, seeds=[1, 2, 3], spread=False)
    assert torch.equal(codes[:, :5], few)
    greedy = generator.sample(histories, 35, seeds=[1, 2, 3], temperature=0)
    assert torch.equal(greedy, generator.sample(histories, 1, seeds=[1, 2, 3], temperature=0).expand(-1, 35, -1))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_users_shared_out_to_cores_get_the_same_pictures(
    generator: JanusGenerator, histories: np.ndarray, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two users on one core, one on the other; the greedy codes, and those of a seed."""
    begun: list[int] = []
    whole = sampler._sample_share

    def counted(*given: Any, seeds: list[int], **how: Any) -> Tensor:
        begun.append(len(seeds))
        return whole(*given, seeds=seeds, **how)

    monkeypatch.setattr(sampler, "_sample_share", counted)
    for temperature in (0.0, 1.0):
        how: dict[str, Any] = {"seeds": [1, 2, 3], "guidance": guidance, "temperature": temperature}
        begun.clear()
        with threads(1):
            alone = generator.sample(histories, 24, **how)
        assert begun == [3]
        with threads(2):
            shared = generator.sample(histories, 24, **how)
        assert sorted(begun) == [1, 2, 3]
        assert torch.equal(shared, alone)


@pytest.mark.skipif(llama_layer.library(16) is None, reason="no C compiler")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_steps_in_one_call_draw_the_same_pictures(
    generator: JanusGenerator, histories: np.ndarray, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_COMPILE_FROM", 0)
    steps: list[int] = []
    step = llama_layer.Steps.step

    def counted(self: llama_layer.Steps, x_MD: Tensor, t: int) -> Tensor:
        steps.append(t)
        return step(self, x_MD, t)

    monkeypatch.setattr(llama_layer.Steps, "step", counted)
    for temperature in (0.0, 1.0):
        how: dict[str, Any] = {"seeds": [1, 2, 3], "guidance": guidance, "temperature": temperature}
        with dispatch.use("torch"):
            wanted = generator.sample(histories, 7, **how)
        assert not steps
        assert torch.equal(generator.sample(histories, 7, **how), wanted)
        assert steps == [0, 1, 2]
        steps.clear()


def test_prompts_that_occur_twice_are_read_once(generator: JanusGenerator, histories: np.ndarray) -> None:
    prompts = generator.prompts.build(histories[[0, 1, 0, 2]])
    free = prompts.unconditional(generator.prompts.pad_id)
    distinct, row_BU = _distinct([prompts, free], torch.device("cpu"))
    assert len(distinct.ids_UP) == 3 + 3  # three histories, and none at three lengths
    for b, branch in enumerate((prompts, free)):
        assert torch.equal(distinct.ids_UP[row_BU[b]], branch.ids_UP)
        assert torch.equal(distinct.item_UP[row_BU[b]], branch.item_UP)
        assert torch.equal(distinct.mask_UP[row_BU[b]], branch.mask_UP)


@pytest.mark.slow
def test_a_compiled_step_draws_the_same_codes(generator: JanusGenerator, histories: np.ndarray) -> None:
    """Compiled steps look at all slots, empty ones included; twice, since the second call compiles nothing."""
    for seeds in ([1, 2, 3], [4, 5, 6]):
        plain = generator.sample(histories, 3, seeds=seeds, guidance=2.0)
        assert torch.equal(generator.sample(histories, 3, seeds=seeds, guidance=2.0, compile=True), plain)
    greedy = generator.sample(histories, 3, seeds=[1, 2, 3], guidance=2.0, temperature=0, compile=True)
    assert torch.equal(greedy, generator.sample(histories, 3, seeds=[1, 2, 3], guidance=2.0, temperature=0))


def test_steps_of_one_shape_draw_the_same_codes(
    generator: JanusGenerator, histories: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU records as a graph: every slot is looked at in every step, those not yet filled weigh nothing."""
    plain = generator.sample(histories, 3, seeds=[1, 2, 3], guidance=2.0)
    calls: list[int] = []

    def one_shape(self: Decoding, x_MD: Tensor, turn: Turn, first: int, end: int) -> Tensor:
        if not calls:  # as they are where every slot is looked at
            self.cache.k_lUGSd[:, :, :, first:], self.cache.v_lUGSd[:, :, :, first:] = 0, 0
        calls.append(end)
        return self._static(x_MD, turn, torch.arange(first, end))

    monkeypatch.setattr(Decoding, "_filled", one_shape)
    assert torch.equal(generator.sample(histories, 3, seeds=[1, 2, 3], guidance=2.0), plain)
    assert len(calls) == generator.codes_per_picture - 1


def test_a_projection_with_an_adapter_is_called_not_copied(generator: JanusGenerator, histories: np.ndarray) -> None:
    class Twice(torch.nn.Linear):
        """Stands for an adapter: more than its weight."""

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for layer in generator.model.model.language_model.layers:
        for block, name in ((layer.self_attn, "v_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "up_proj")):
            plain = block.get_submodule(name)
            adapted = Twice(plain.in_features, plain.out_features, bias=False)
            adapted.weight = plain.weight
            setattr(block, name, adapted)
    codes = generator.sample(histories, 2, seeds=[1, 2, 3], temperature=0)
    assert torch.equal(generator.logits(generator.prompts.build(histories), codes).argmax(-1), codes)
    with pytest.raises(ConfigError, match="Merge them into the weights first"):
        generator.sample(histories, 2, seeds=[1, 2, 3], compile=True)
