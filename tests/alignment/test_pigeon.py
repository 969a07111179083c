"""Pigeon's masks by hand, what reaches them, the shelf of references, and both stages through the shared loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from couturier.components.alignment import align
from couturier.components.alignment.pigeon import PairsConfig, PigeonConfig, Preference, Reconstruction
from couturier.components.alignment.pigeon_adapters import AdaptedGenerator, LoraSettings
from couturier.components.alignment.pigeon_pairs import RATIOS, Candidates, choose
from couturier.components.alignment.rewards import Weights
from couturier.components.errors import ConfigError
from couturier.components.generator.janus import JanusGenerator
from couturier.components.generator.masking import MaskGenerator, gather_codes, keep, log_keep
from couturier.components.generator.pigeon import PigeonGenerator, ReferenceConfig
from couturier.components.generator.shelf import Shelf
from couturier.components.runtime import seeded

from .conftest import CONFIG, HISTORY, INPUTS, KillAt, Killed, context

SMALL = dataclasses.replace(
    CONFIG,
    method="pigeon",
    # The codec of this world is too coarse for any picture to be flawless.
    weights=Weights(valid_db=8.0),
    pigeon=PigeonConfig(
        steps=12,
        batch=8,
        lr=1e-2,
        reference=ReferenceConfig(ratio=0.5, heads=2, hidden=32),
        lora=LoraSettings(rank=4, alpha=8),
        shelf_windows=60,
        shelf_steps=20,
        pairs=PairsConfig(steps=8, windows=32, valid_windows=18, batch=4, floor=-1.0, margin=0.0),
    ),
)
ALL = torch.ones(1, 20, dtype=torch.bool)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(("ratio", "count"), [(0.0, 20), (0.2, 16), (0.5, 10), (0.95, 1), (1.0, 1)])
def test_exactly_so_many_are_kept(ratio: float, count: int, noise: bool) -> None:
    log_p = torch.rand(1, 20).log()
    random = seeded(0, "noise") if noise else None
    values = keep(log_p, ALL, torch.tensor([ratio], dtype=torch.float64), random)
    assert sorted(values.unique().tolist()) == ([0.0, 1.0] if count < 20 else [1.0])
    assert int(values.sum()) == count


def test_what_is_not_there_is_neither_kept_nor_counted() -> None:
    real = torch.tensor([[True] * 5 + [False] * 15, [False] * 20])
    values = keep(torch.zeros(2, 20), real, torch.tensor([0.2, 0.2], dtype=torch.float64), seeded(1))
    assert values.sum(1).tolist() == [4, 0]
    assert not bool(values[~real].any())


def test_training_hides_what_is_related_and_drawing_keeps_it() -> None:
    relevance, real = torch.tensor([[0.9, -0.5, 0.3, 0.1]]), torch.ones(1, 4, dtype=torch.bool)
    half = torch.tensor([0.5], dtype=torch.float64)
    assert keep(log_keep(relevance, real, hide_related=True), real, half).tolist() == [[0, 1, 0, 1]]
    assert keep(log_keep(relevance, real, hide_related=False), real, half).tolist() == [[1, 0, 1, 0]]


def test_noise_keeps_the_likely_more_often_but_not_always() -> None:
    log_p = torch.tensor([0.7, 0.2, 0.1]).log().expand(4000, -1)
    one = torch.full((4000,), 1.0, dtype=torch.float64)
    share = keep(log_p, torch.ones(4000, 3, dtype=torch.bool), one, seeded(0, "gumbel")).mean(0)
    # Gumbel noise makes the top one a draw from the distribution itself.
    torch.testing.assert_close(share, torch.tensor([0.7, 0.2, 0.1]), atol=0.03, rtol=0)


def test_a_token_gathers_the_square_of_codes_that_it_stands_for() -> None:
    p_UKL = torch.arange(16.0).view(1, 1, 16)
    assert gather_codes(p_UKL, 4).tolist() == [[[0 + 1 + 4 + 5, 2 + 3 + 6 + 7, 8 + 9 + 12 + 13, 10 + 11 + 14 + 15]]]
    assert torch.equal(gather_codes(p_UKL, 16), p_UKL)
    with pytest.raises(ConfigError, match="16 codes and is read as 9 tokens"):
        gather_codes(p_UKL, 9)


def test_history_and_reference_look_at_each_other() -> None:
    torch.manual_seed(0)
    masks = MaskGenerator(8, 4, heads=2).eval()
    history, reference = torch.randn(1, 3, 4, 8), torch.randn(1, 4, 8)
    real = torch.tensor([[True, True, False]])
    own, other = masks(history, reference, real)
    changed_own, _ = masks(history, torch.randn(1, 4, 8), real)
    _, changed_other = masks(torch.randn(1, 3, 4, 8), reference, real)
    assert (own - changed_own)[0, :2].abs().max() > 1e-4
    assert (other - changed_other).abs().max() > 1e-4
    beyond = history.clone()
    beyond[:, 2] = 9.0
    torch.testing.assert_close(masks(beyond, reference, real)[1], other)


def test_a_shelf_learns_whose_items_are_whose() -> None:
    """Whoever had an item of the first half wants its other items, and the last favourite again."""
    random = seeded(0, "shelf")
    side = torch.randint(2, (200,), generator=random)
    favourites = side[:, None] * 4 + torch.stack([torch.randperm(4, generator=random)[:2] for _ in range(200)])
    wanted = torch.zeros(200, 8)
    wanted.scatter_(1, favourites[:, 1:], 0.4)
    fresh = torch.stack([((torch.arange(8) // 4) == s) for s in side])
    fresh.scatter_(1, favourites, False)
    wanted += 0.6 * fresh / fresh.sum(1, keepdim=True)
    features = torch.randn(8, 6, generator=random) + 3 * (torch.arange(8) // 4)[:, None]
    shelf = Shelf(features, torch.zeros(8), places=2, copies=0.4)
    gap = shelf.fit(favourites, wanted, steps=150, batch=64, lr=0.05, random=random)
    assert gap < 0.02
    offered = shelf.offer(favourites[:20], 5, list(range(20)))
    assert torch.equal(offered // 4, side[:20, None].expand(-1, 5))
    again = (offered == favourites[:20, 1:]).sum(1)
    assert float(again.float().mean()) > 1.8  # of five, 0.4 each
    assert torch.equal(shelf.offer(favourites[3:4], 5, [3]), offered[3:4])


def test_a_pair_needs_a_margin_a_floor_and_a_whole_picture() -> None:
    found = Candidates(
        codes_UnL=torch.zeros(4, 3, 1, dtype=torch.long),
        history_Un=torch.tensor([[0.1, 0.5, 0.9], [0.1, 0.5, 0.9], [0.5, 0.5, 0.5], [0.1, 0.5, 0.9]]),
        reference_Un=torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.5, 0.1], [0.9, 0.9, 0.9], [0.1, 0.1, 0.1]]),
        psnr_Un=torch.tensor([[30.0, 30.0, 10.0], [30.0] * 3, [30.0] * 3, [30.0] * 3]),
        nearest_Un=torch.zeros(4, 3, dtype=torch.long),
    )
    places, fits = choose(found, floor=0.4, margin=0.2, valid_db=25)
    assert fits.tolist() == [True, True, False, False]
    assert places[:2].tolist() == [[1, 0], [1, 0]]
    assert found.best().tolist() == [2, 0, 0, 2]


@pytest.fixture(scope="module")
def aligned(started: Path) -> tuple[Path, dict]:
    ctx = context(started, "pigeon", SMALL, INPUTS)
    align.run(ctx)
    return ctx.out, ctx.facts


def prepared(started: Path, name: str) -> tuple[align.Loop, AdaptedGenerator]:
    loop, scene = align.prepare(context(started, name, SMALL, INPUTS), SMALL)
    assert isinstance(scene.policy, AdaptedGenerator)
    return loop, scene.policy


def test_the_mask_generator_learns_from_the_reconstruction(started: Path) -> None:
    """In the released code no gradient arrives here at all."""
    loop, policy = prepared(started, "pigeon-gradient")
    phase = loop.phases[0]
    assert isinstance(phase, Reconstruction)
    phase.take(0).loss.backward()
    for name, value in [*policy.masks.named_parameters(), *policy.adapter.named_parameters()]:
        assert value.grad is not None, name
        # A bias on all keys of an attention changes no softmax; everything else moves.
        assert float(value.grad.abs().max()) > 0, name
    frozen = [p for p in policy.parameters() if p.grad is None]
    assert sum(p.numel() for p in frozen) > 0.8 * sum(p.numel() for p in policy.model.parameters())


def test_a_hidden_picture_of_the_history_is_nought_in_the_prompt(started: Path) -> None:
    _, policy = prepared(started, "pigeon-prompt")
    prompts = policy.prompts.build(np.arange(HISTORY)[None], references_U=torch.tensor([9]), hidden=0.5)
    x_UPD = policy.embed_prompt(prompts)
    pictures = x_UPD[prompts.item_UP >= 0]
    # Of four history pictures a fifth is left out: int(4 * 0.8) = 3 are kept.
    assert int((pictures == 0).all(-1).sum()) == 1
    plain = policy.prompts.build(np.arange(HISTORY)[None])
    assert torch.equal(policy.embed_prompt(plain), JanusGenerator.embed_prompt(policy, plain))
    assert prompts.ids_UP.shape[1] == plain.ids_UP.shape[1] + 1


def test_only_the_policys_adapter_learns_preferences(started: Path) -> None:
    loop, policy = prepared(started, "pigeon-two-adapters")
    loop.phases[0].begin()
    phase = loop.phases[1]
    assert isinstance(phase, Preference)
    phase.begin()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    optimiser = torch.optim.SGD(policy.parameters_to_train(), lr=1.0)
    phase.take(0).loss.backward()
    optimiser.step()
    moved = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(".policy." in name for name in moved)


def test_the_figures_at_a_fixed_ratio_stand_beside_the_best_of_eleven(aligned: tuple[Path, dict]) -> None:
    facts = aligned[1]
    for kind in ("history", "reference", "basket"):
        assert {f"pigeon_{kind}_at_{ratio}" for ratio in RATIOS} <= set(facts)
        assert {f"pigeon_{kind}_fixed", f"pigeon_{kind}_best_of_11"} <= set(facts)
        assert facts[f"pigeon_{kind}_fixed"] == facts[f"pigeon_{kind}_at_0.5"]
    both = ("pigeon_history", "pigeon_reference")
    assert sum(facts[f"{name}_best_of_11"] for name in both) >= sum(facts[f"{name}_fixed"] for name in both)
    assert facts["steps"] == SMALL.pigeon.steps + SMALL.pigeon.pairs.steps


def test_what_is_saved_draws_as_the_policy_did_with_its_adapter_added(aligned: tuple[Path, dict]) -> None:
    folder = aligned[0] / "model"
    found = JanusGenerator.load(folder)
    assert isinstance(found, PigeonGenerator)
    assert not [name for name in load_file(folder / "model.safetensors") if "lora" in name or "base_layer" in name]
    histories = np.array([[0, 5, 10, 15], [1, 6, -1, -1], [-1, -1, -1, -1]])
    codes = found.sample(histories, 10, seeds=[1, 2, 3])
    assert codes.shape == (3, 10, found.codes_per_picture)
    for u in range(3):
        assert torch.equal(found.sample(histories[u : u + 1], 10, seeds=[u + 1])[0], codes[u])
    assert not torch.equal(found.sample(histories, 10, seeds=[4, 5, 6]), codes)


def test_the_sum_of_weights_and_adapter_is_what_was_trained(started: Path, tmp_path: Path) -> None:
    loop, policy = prepared(started, "pigeon-saved")
    loop.phases[0].begin()
    for name, value in policy.named_parameters():
        if ".lora_B.policy." in name:
            value.data.normal_(generator=seeded(0, name), std=0.1)
    policy.eval().save(tmp_path)
    again = JanusGenerator.load(tmp_path)
    assert isinstance(again, PigeonGenerator)
    histories = np.array([[0, 5, 10, 15], [1, 6, -1, -1]])
    assert torch.equal(again.shelf.offer(histories, 4, [1, 2]), policy.shelf.offer(histories, 4, [1, 2]))
    prompts = policy.prompts.build(histories, references_U=torch.tensor([3, 4]), hidden=0.5)
    codes = policy.codes_IL[torch.tensor([[3, 5], [4, 6]])]
    torch.testing.assert_close(again.log_prob(prompts, codes), policy.log_prob(prompts, codes), atol=1e-4, rtol=1e-4)
    policy.use("reference")
    assert (again.log_prob(prompts, codes) - policy.log_prob(prompts, codes)).abs().max() > 0.01


@pytest.mark.parametrize("step", [4, 9, 16])
def test_kill_and_resume_gives_the_same_bits(started: Path, aligned: tuple[Path, dict], step: int) -> None:
    """In the first stage, at the last checkpoint before the second, and within the second."""
    name = f"pigeon-killed-{step}"
    with pytest.raises(Killed):
        align.run(context(started, name, SMALL, INPUTS, progress=KillAt(step)))
    again = context(started, name, SMALL, INPUTS)
    align.run(again)
    for file in ("model.safetensors", "pigeon.safetensors"):
        expected, found = (load_file(folder / "model" / file) for folder in (aligned[0], again.out))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    a, b = (pl.read_parquet(folder / "curves.parquet") for folder in (aligned[0], again.out))
    assert a.equals(b)


def test_no_pair_is_said_in_words(started: Path) -> None:
    strict = dataclasses.replace(SMALL.pigeon, steps=0, pairs=dataclasses.replace(SMALL.pigeon.pairs, margin=3.0))
    config = dataclasses.replace(SMALL, pigeon=strict)
    with pytest.raises(ConfigError, match=r"none gave a pair: rl\.pigeon\.pairs\.margin is 3\.0"):
        align.run(context(started, "pigeon-no-pair", config, INPUTS))
