"""The accept-or-fall-back rule of card 7, and fine-tuning on what stands."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from couturier.components.alignment import align, rewards
from couturier.components.alignment.distil import DistilConfig
from couturier.components.alignment.rejection import RejectionConfig
from couturier.components.alignment.rewards import Weights
from couturier.components.errors import ConfigError
from couturier.components.generator.accept import accept_or_fall_back

from .conftest import CONFIG, INPUTS, KillAt, Killed, context, weights


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 2**31))
def test_what_stands_is_worth_at_least_as_much_as_either_arm(targets: int, more: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    reward, fallback = torch.rand(3, targets + more, generator=random), torch.rand(3, targets, generator=random)
    place, accepted = accept_or_fall_back(reward, fallback)
    stands = torch.where(accepted, reward.gather(1, place), fallback)
    assert (stands >= fallback).all()
    best = reward.topk(targets).values.sort(1).values
    assert (stands.sort(1).values >= best - 1e-6).all()
    assert all(len(set(row)) == targets for row in place.tolist())


def test_a_reward_that_knows_nothing_gains_nothing() -> None:
    """With a random reward the gate's picks are worth what a random pick is worth: no gain in what truly counts."""
    random = torch.Generator().manual_seed(0)
    worth, own = torch.rand(4000, 4, generator=random), torch.rand(4000, 1, generator=random)
    place, accepted = accept_or_fall_back(torch.rand(4000, 4, generator=random), torch.rand(4000, 1, generator=random))
    stands = torch.where(accepted, worth.gather(1, place), own)
    assert abs(float(stands.mean()) - 0.5) < 0.02
    place, accepted = accept_or_fall_back(worth, own)
    assert float(torch.where(accepted, worth.gather(1, place), own).mean()) > 0.8


def test_more_targets_than_candidates_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rl\.rejection\.targets is 6"):
        RejectionConfig(targets=6, candidates=5)


REJECTION = dataclasses.replace(
    CONFIG,
    method="rejection",
    rejection=RejectionConfig(steps=14, prompts=8, candidates=6, targets=3, lr=2e-3),
    distil=DistilConfig(steps=0),
    checkpoint_every=5,
)


def test_pictures_that_are_rewarded_become_more(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rewards.TERMS, "coverage", lambda rollout, _: (rollout.nearest_Un % 2 == 0).float())
    only = Weights(coverage=1, slate=0, judge=0, future=0, copying=0, validity=0, dissimilarity=0)
    ctx = context(started, "rejection-planted", dataclasses.replace(REJECTION, weights=only), INPUTS)
    align.run(ctx)
    curves = pl.read_parquet(ctx.out / "curves.parquet")
    reward = curves.filter(pl.col("name") == "reward").sort("step")["value"].to_numpy()
    assert reward[-4:].mean() > reward[:3].mean() + 0.15
    assert {"accepted", "fallback_reward", "rejection_nats"} <= set(curves["name"])


def test_kill_and_resume_gives_the_same_bits(started: Path) -> None:
    whole = context(started, "rejection", REJECTION, INPUTS)
    align.run(whole)
    with pytest.raises(Killed):
        align.run(context(started, "rejection-killed", REJECTION, INPUTS, progress=KillAt(8)))
    again = context(started, "rejection-killed", REJECTION, INPUTS)
    align.run(again)
    expected, found = weights(whole.out), weights(again.out)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
