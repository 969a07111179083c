"""Social Reward in a planted community: people come back to pictures with one trait, whatever they are asked for."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from couturier.components.alignment import align
from couturier.components.alignment.distil import DistilConfig
from couturier.components.alignment.grpo import GrpoConfig
from couturier.components.alignment.rewards import Weights
from couturier.components.alignment.social import PEOPLE, SocialReward, accuracy, fit, prove, right, scorer, untrained
from couturier.components.alignment.triplets import SPLITS, SocialConfig, Triplets, hold_out, mine
from couturier.components.data.formats import Catalogue
from couturier.components.data.reuse import REUSE, reuse_of
from couturier.components.errors import ConfigError, DataError

from .conftest import CONFIG, INPUTS, context

PROMPTS, CREATORS, WIDTH, TRIED = 24, 8, 12, 300
QUICK = SocialConfig(steps=150, batch=128, width=16)


@pytest.fixture(scope="module")
def community() -> tuple[Catalogue, pl.DataFrame, Tensor]:
    """Items of every prompt and creator; the first feature is what people come back for, the others say nothing."""
    random = torch.Generator().manual_seed(0)
    items = PROMPTS * CREATORS
    features = torch.randn(items, WIDTH, generator=random)
    prompt, creator = np.divmod(np.arange(items), CREATORS)
    frame = pl.DataFrame(
        {
            "item_id": [f"{p:02d}-{c}" for p, c in zip(prompt, creator, strict=True)],
            "title": ["a thing"] * items,
            "text": [""] * items,
            "kind": [f"thing number{p}" for p in prompt],
            "brand": [f"maker {c}" for c in creator],
        }
    )
    blank = np.zeros((items, 2, 2, 3), np.uint8)
    catalogue = Catalogue(items=frame, rgb_IHWC=blank, attributes=("kind", "brand"), attribution="")
    kept = (TRIED * torch.sigmoid(1.5 * features[:, 0])).round().long()
    return catalogue, both_folds(frame["item_id"].to_list(), TRIED, kept.tolist()), features


def both_folds(item_ids: list[str], tried: int, kept: list[int]) -> pl.DataFrame:
    """Re-use, the same in both halves of the people."""
    half = pl.DataFrame({"item_id": item_ids, "fold": 0, "tried": tried // 2, "kept": [count // 2 for count in kept]})
    return pl.concat([half, half.with_columns(fold=pl.lit(1, pl.Int32))], how="vertical_relaxed")


@pytest.fixture(scope="module")
def triplets(community: tuple[Catalogue, pl.DataFrame, Tensor]) -> Triplets:
    catalogue, reuse, _ = community
    return mine(catalogue, reuse, QUICK, seed=0)


def test_people_who_took_an_item_again_or_praised_it_came_back() -> None:
    days = [datetime(2024, 1, day, tzinfo=UTC) for day in (1, 1, 1, 2, 1, 2, 1)]
    events = pl.DataFrame(
        {
            "user_id": ["once", "twice at once", "twice at once", "twice", "twice", "looks", "looks"],
            "item_id": ["x"] * 7,
            "timestamp": [days[i] for i in (0, 0, 0, 0, 3, 0, 3)],
            "kind": ["purchase"] * 5 + ["view"] * 2,
        }
    )
    found = reuse_of(events)
    assert found.select("tried", "kept").sum().row(0) == (4, 1)
    assert found["fold"].to_list() == [0, 1]
    liked = events.with_columns(kind=pl.when(pl.col("user_id") == "once").then(pl.lit("like")).otherwise("kind"))
    assert reuse_of(liked).select("tried", "kept").sum().row(0) == (4, 2)


def test_pairs_are_of_one_prompt_and_differ_beyond_chance(
    community: tuple[Catalogue, pl.DataFrame, Tensor], triplets: Triplets
) -> None:
    kept_I = torch.tensor(community[1].filter(pl.col("fold") == 0)["kept"].to_list()) * 2
    assert len(triplets) > PROMPTS * CREATORS
    assert torch.equal(triplets.prompt_I[triplets.kept_T], triplets.prompt_I[triplets.left_T])
    assert torch.equal(triplets.prompt_I[triplets.kept_T], triplets.prompt_T)
    gap_T = kept_I[triplets.kept_T] - kept_I[triplets.left_T]
    # Two shares of 300 people about a half: 1.96 standard errors are 24 people; fewer towards the ends.
    assert gap_T.min() > 0 and (gap_T >= 24).float().mean() > 0.9


def test_what_is_held_out_is_new(triplets: Triplets) -> None:
    parts = hold_out(triplets, 0.25, seed=0)
    seen = {name: set(part.prompt_T.tolist()) for name, part in parts.items()}
    made = {name: set(part.creator_I[torch.cat([part.kept_T, part.left_T])].tolist()) for name, part in parts.items()}
    assert sum(len(part) for part in parts.values()) == len(triplets)
    assert seen["train"].isdisjoint(seen["prompts"] | seen["both"])
    new = set(range(CREATORS)) - made["train"]
    assert len(new) == CREATORS // 4 and made["prompts"].isdisjoint(new)
    for name in ("creators", "both"):
        part = parts[name]
        sides = torch.stack([part.creator_I[part.kept_T], part.creator_I[part.left_T]])
        assert torch.isin(sides, torch.tensor(sorted(new))).any(0).all()


def test_the_fit_beats_the_untrained_on_new_prompts_and_creators(
    community: tuple[Catalogue, pl.DataFrame, Tensor], triplets: Triplets
) -> None:
    catalogue, reuse, features = community
    found = prove(catalogue, reuse, triplets, features, QUICK, seed=0)
    for name in (*SPLITS, PEOPLE):
        fitted, controls = found[name], [found[f"{name}_{of}"] for of in ("untrained", "popularity", "attributes")]
        assert isinstance(fitted, list) and fitted[0] > 0.85
        assert all(isinstance(control, list) and fitted[1] > control[2] for control in controls), name
    # Everything was tried by as many: a table of that ties, and a tie is wrong.
    assert found["prompts_popularity"] == [0.0, 0.0, 0.0]


def test_swapped_pairs_are_right_as_often_as_the_others_are_wrong(
    community: tuple[Catalogue, pl.DataFrame, Tensor], triplets: Triplets
) -> None:
    features = community[2]
    score = scorer(fit(triplets, features, QUICK, seed=1), triplets, features)
    assert accuracy(score, triplets.swapped())[0] == pytest.approx(1 - accuracy(score, triplets)[0], abs=2e-4)


def test_a_tie_is_not_right(triplets: Triplets) -> None:
    assert not right(lambda prompt, item: torch.zeros(len(item)), triplets).any()


def test_the_same_seed_fits_the_same_bits(
    community: tuple[Catalogue, pl.DataFrame, Tensor], triplets: Triplets
) -> None:
    features, few = community[2], dataclasses.replace(QUICK, steps=5)
    one, two, other = (fit(triplets, features, few, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["bag.weight"], other["bag.weight"])
    start = untrained(triplets, features, few, seed=0).state_dict()
    assert not torch.equal(one["bag.weight"], start["bag.weight"])


def test_as_a_reward_it_compares_pictures_of_one_kind(community: tuple[Catalogue, pl.DataFrame, Tensor]) -> None:
    catalogue, reuse, features = community
    reward = SocialReward(catalogue, reuse, features, QUICK, seed=0)
    items = torch.arange(len(catalogue)).view(PROMPTS, CREATORS)
    score = reward.score(features[items], items)
    assert score.mean(1).abs().max() < 1e-4, "each kind has its own zero"
    assert score.std() == pytest.approx(1, abs=0.05)
    assert torch.corrcoef(torch.stack([score.flatten(), features[:, 0]]))[0, 1] > 0.8
    # A picture is judged by itself, not by the item it is nearest to.
    assert reward.score(features[items].flip(1), items).flip(1) == pytest.approx(score, abs=1e-5)


def test_what_cannot_be_compared_is_named(community: tuple[Catalogue, pl.DataFrame, Tensor]) -> None:
    catalogue, reuse, _ = community
    with pytest.raises(DataError, match=r"no two items of one prompt differ.*rl\.weights\.social at 0"):
        SocialReward(catalogue, reuse.with_columns(kept=pl.lit(10)), community[2], QUICK, seed=0)
    with pytest.raises(ConfigError, match=r"rl\.social\.creator is 'colour'.*kind, brand"):
        mine(catalogue, reuse, dataclasses.replace(QUICK, creator="colour"), seed=0)
    with pytest.raises(ConfigError, match=r"rl\.social\.held_out is 0"):
        SocialConfig(held_out=0.0)


def test_stage_rl_rewards_it_where_it_has_a_weight(started: Path) -> None:
    """The even items of every kind are those that people come back to."""
    items = Catalogue.load(started / "sequences").item_ids
    kept = [180 if i % 2 == 0 else 40 for i in range(len(items))]
    both_folds(items, 200, kept).write_parquet(started / "sequences" / REUSE)
    config = dataclasses.replace(
        CONFIG,
        weights=Weights(social=1, slate=0, coverage=0, judge=0, copying=0, validity=0, dissimilarity=0),
        social=dataclasses.replace(QUICK, creator=""),
        distil=DistilConfig(steps=0),
        grpo=GrpoConfig(steps=12, prompts=8, group=6, lr=2e-3, kl=0.0, warm_up_steps=2),
    )
    ctx = context(started, "social", config, INPUTS)
    align.run(ctx)
    curve = pl.read_parquet(ctx.out / "curves.parquet").filter(pl.col("name") == "reward_social").sort("step")
    value = curve["value"].to_numpy()
    assert value[-4:].mean() > value[:3].mean() + 0.3
    found = ctx.facts["social_accuracy"]
    assert found["prompts_pairs"] > 0 and found["creators_pairs"] == 0 and found["people_pairs"] > 0
