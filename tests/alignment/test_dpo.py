"""Preferences between the policy's own pictures are learned, the reference stands still, a killed run's bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from couturier.components.alignment import align, rewards
from couturier.components.alignment.distil import DistilConfig
from couturier.components.alignment.dpo import Dpo, DpoConfig, best_and_worst, dpo_loss
from couturier.components.alignment.rewards import Weights
from couturier.components.errors import ConfigError

from .conftest import CONFIG, INPUTS, KillAt, Killed, context, weights

ONLY = Weights(coverage=1, slate=0, judge=0, future=0, copying=0, validity=0, dissimilarity=0)
DPO = DpoConfig(rounds=2, steps=6, batch=8, share=0.5, candidates=4, lr=1e-3)
DPO_CONFIG = dataclasses.replace(
    CONFIG, method="dpo", dpo=DPO, distil=DistilConfig(steps=4, prompts=8, targets=3), checkpoint_every=5
)


def test_the_loss_falls_as_the_chosen_picture_gains_on_the_rejected_one() -> None:
    chosen = torch.tensor([-3.0], requires_grad=True)
    rejected = torch.tensor([-3.0], requires_grad=True)
    loss = dpo_loss(chosen, rejected, torch.tensor([-3.0]), torch.tensor([-3.0]), beta=0.5)
    loss.sum().backward()
    assert loss.item() == pytest.approx(np.log(2))
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.25) and rejected.grad.item() == pytest.approx(0.25)
    better = dpo_loss(torch.tensor(-2.0), torch.tensor(-4.0), torch.tensor(-3.0), torch.tensor(-3.0), beta=0.5)
    assert better.item() == pytest.approx(-np.log(1 / (1 + np.exp(-1.0))), rel=1e-5)


def test_pairs_that_hardly_differ_are_left_out() -> None:
    place, telling = best_and_worst(torch.tensor([[1.0, 0.0, 0.5], [0.30, 0.31, 0.32]]), 0.1)
    assert place.tolist() == [[0, 1], [2, 0]] and telling.tolist() == [True, False]


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"share": 0.0}, "rl.dpo.share is 0.0"), ({"candidates": 1}, "rl.dpo.candidates is 1"), ({"rounds": 0}, "rounds")],
)
def test_settings_out_of_range_are_named(settings: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DpoConfig(**settings)  # type: ignore[arg-type]


def test_one_sample_in_a_hundred_means_one_pair_every_third_step() -> None:
    config = DpoConfig(batch=32, share=0.01)
    assert (config.pairs, config.every) == (1, 3)
    assert (DpoConfig(batch=32, share=0.25).pairs, DpoConfig(batch=32, share=0.25).every) == (8, 1)


def test_a_planted_preference_is_learned_on_people_without_pairs(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items of even index are preferred: more and more of them, round after round, and the margin rises."""
    monkeypatch.setitem(rewards.TERMS, "coverage", lambda rollout, _: (rollout.nearest_Un % 2 == 0).float())
    dpo = DpoConfig(rounds=3, steps=10, batch=12, share=1.0, candidates=6, weight=5.0, lr=3e-3, beta=0.2)
    config = dataclasses.replace(
        CONFIG, method="dpo", dpo=dpo, weights=ONLY, distil=DistilConfig(steps=0, prompts=8, targets=2)
    )
    loop, scene = align.prepare(context(started, "dpo-planted", config, INPUTS), config)
    # What is imitated says nothing for or against even items here: DPO alone must bring them.
    even = torch.ones(30) / 30
    scene.wanted = lambda rows: even.expand(len(rows), -1)  # type: ignore[method-assign]
    loop.run()
    curves = pl.DataFrame(loop.curves, schema=["step", "name", "value"], orient="row")
    reward = curves.filter(pl.col("name") == "reward")["value"].to_list()
    assert len(reward) == 3 and reward[0] + 0.05 < reward[1] and reward[0] + 0.15 < reward[2]
    margin = curves.filter(pl.col("name") == "dpo_margin")["value"].to_list()
    assert margin[0] == pytest.approx(0, abs=1e-4) and margin[9] > 0.5
    assert margin[10] == pytest.approx(0, abs=1e-4)  # a new round, a new reference
    codes = scene.policy.eval().sample(scene.history(np.arange(100, 120)), 6, seeds=list(range(20)))
    seen = scene.book.look(codes.flatten(0, 1))
    shown = scene.book.nearest[seen]
    assert (shown % 2 == 0).float().mean() > reward[0]


def test_the_reference_is_the_policy_that_drew_the_pairs(started: Path) -> None:
    ctx = context(started, "dpo-reference", DPO_CONFIG, INPUTS)
    loop, _ = align.prepare(ctx, DPO_CONFIG)
    phase = loop.phases[1]
    assert isinstance(phase, Dpo)
    loop.run()
    before = phase.pairs["reference_P2"].clone()
    phase._preference(torch.arange(4))[0].backward()
    assert torch.equal(before, phase.pairs["reference_P2"]) and not before.requires_grad


@pytest.fixture(scope="module")
def preferred(started: Path) -> tuple[Path, dict]:
    ctx = context(started, "dpo", DPO_CONFIG, INPUTS)
    align.run(ctx)
    return ctx.out, ctx.facts


@pytest.mark.parametrize("step", [6, 11, 15])
def test_kill_and_resume_gives_the_same_bits(started: Path, preferred: tuple[Path, dict], step: int) -> None:
    name = f"dpo-killed-{step}"
    with pytest.raises(Killed):
        align.run(context(started, name, DPO_CONFIG, INPUTS, progress=KillAt(step)))
    again = context(started, name, DPO_CONFIG, INPUTS)
    align.run(again)
    expected, found = weights(preferred[0]), weights(again.out)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert again.facts == preferred[1]
