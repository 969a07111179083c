"""The prospect on the planted world: people take two of the six items of their own kind, favourites no more often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from couturier.components.alignment.prospect import COLUMNS, Prospect, ProspectConfig
from couturier.components.alignment.rewards import membership
from couturier.components.data.formats import Windows
from couturier.components.errors import ConfigError
from couturier.components.interest import fit
from couturier.components.interest.judge import load_judge

from .conftest import HISTORY, ITEMS, KINDS, context

CONFIG = ProspectConfig(windows=180, others_share=0.5)


@pytest.fixture(scope="module")
def train(world: Path) -> Windows:
    return Windows.load(world / "sequences", "train")


@pytest.fixture(scope="module")
def fresh(world: Path, train: Windows) -> Prospect:
    """A prospect on a fitted judge, not fitted itself."""
    ctx = context(
        world,
        "prospect-judge",
        fit.Config(threads=1, steps=150),
        {"sequences": "sequences"},
    )
    fit.run(ctx)
    rate = np.bincount(train.basket, minlength=ITEMS) / len(train)
    return Prospect(load_judge(ctx.out / "judge"), torch.from_numpy(rate).float())


def test_columns_of_a_favourite_are_at_its_item_and_nowhere_else(fresh: Prospect, train: Windows) -> None:
    columns = fresh.columns(train, np.array([3]))[0]
    favourites = train.favourites_WK[3]
    place = columns[:, COLUMNS.index("place")].exp() - 1
    assert columns[:, COLUMNS.index("favourite")].sum() == HISTORY
    assert [round(place[item].item()) for item in favourites] == list(range(HISTORY))
    others = [item for item in range(ITEMS) if item not in favourites]
    assert not columns[others][:, COLUMNS.index("favourite") :].any()


def test_fitting_finds_who_takes_what_and_how_often(fresh: Prospect, world: Path, train: Windows) -> None:
    prospect = fresh.fit(train, CONFIG, seed=0)
    test = Windows.load(world / "sequences", "test")
    rows = np.arange(len(test))
    p = prospect.logits(test, rows).sigmoid()
    kind_U = torch.from_numpy(test.favourites_WK[:, 0].astype(np.int64)) % KINDS
    own_UI = kind_U[:, None] == torch.arange(ITEMS) % KINDS
    # Two of the six items of one's own kind, none of the others.
    assert p[own_UI].mean() == pytest.approx(1 / 3, abs=0.08)
    assert p[~own_UI].mean() < 0.05
    taken = membership([test.basket_of(row) for row in rows.tolist()], ITEMS).float()
    assert p.sum(1).mean() == pytest.approx(float(taken.sum(1).mean()), abs=0.4)


def test_the_same_seed_gives_the_same_bits_and_the_state_is_all_there_is(fresh: Prospect, train: Windows) -> None:
    rows = np.arange(5)
    first = fresh.fit(train, CONFIG, seed=1).logits(train, rows)
    state = {name: value.clone() for name, value in fresh.state().items()}
    other = fresh.fit(train, CONFIG, seed=2).logits(train, rows)
    assert not torch.equal(first, other)
    assert torch.equal(fresh.fit(train, CONFIG, seed=1).logits(train, rows), first)
    fresh.fit(train, CONFIG, seed=2).load(state)
    assert torch.equal(fresh.logits(train, rows), first)


NETWORK = ProspectConfig(windows=180, others_share=0.5, hidden=8, batch=256, lr=1e-2)


def test_the_network_finds_who_takes_what_too(fresh: Prospect, world: Path, train: Windows) -> None:
    prospect = fresh.fit(train, NETWORK, seed=0)
    test = Windows.load(world / "sequences", "test")
    p = prospect.logits(test, np.arange(len(test))).sigmoid()
    kind_U = torch.from_numpy(test.favourites_WK[:, 0].astype(np.int64)) % KINDS
    own_UI = kind_U[:, None] == torch.arange(ITEMS) % KINDS
    assert p[own_UI].mean() == pytest.approx(1 / 3, abs=0.1)
    assert p[~own_UI].mean() < 0.05


def test_the_network_is_the_same_by_seed_and_whole_in_its_state(fresh: Prospect, train: Windows) -> None:
    rows = np.arange(5)
    first = fresh.fit(train, NETWORK, seed=1).logits(train, rows)
    state = {name: value.clone() for name, value in fresh.state().items()}
    assert torch.equal(fresh.fit(train, NETWORK, seed=1).logits(train, rows), first)
    plain = fresh.fit(train, CONFIG, seed=2).logits(train, rows)
    assert not torch.equal(plain, first)
    fresh.load(state)
    assert torch.equal(fresh.logits(train, rows), first)
    fresh.fit(train, CONFIG, seed=2)
    assert torch.equal(fresh.logits(train, rows), plain)


@pytest.mark.parametrize(("name", "value"), [("hidden", -1), ("windows", 0), ("others_share", 0.0)])
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"rl.prospect.{name} is {value}"):
        ProspectConfig(**{name: value})  # type: ignore[arg-type]
