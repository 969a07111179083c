"""Ranking figures against their definitions, and the draws that make popularity worthless."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from couturier.components.data.formats import Windows
from couturier.components.errors import DataError
from couturier.components.interest.metrics import (
    Baskets,
    Popularity,
    Trial,
    interval,
    negatives,
    trial,
    user_auc,
    wrong_users,
)

from .planted import ITEMS, World


def _by_definition(scores: np.ndarray, taken: np.ndarray) -> float:
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[taken] for b in scores[~taken]]
    return float(np.mean(pairs))


@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_auc_is_the_share_of_pairs_in_order(seed: int, levels: int) -> None:
    random = np.random.default_rng(seed)
    scores_WC = random.integers(levels, size=(6, 5)).astype(float)
    of = Trial(items_WC=random.integers(-1, 4, size=(6, 5)), taken_WC=random.random((6, 5)) < 0.4)
    user_W = random.integers(3, size=6)
    found = user_auc(scores_WC, of, user_W)
    weights, values = [], []
    for user in range(3):
        there = (of.items_WC >= 0) & (user_W == user)[:, None]
        scores, taken = scores_WC[there], of.taken_WC[there]
        if taken.any() and not taken.all():
            values.append(_by_definition(scores, taken))
            weights.append(len(scores))
    np.testing.assert_allclose(found.auc_U, values)
    if values:
        assert found.gauc == pytest.approx(np.average(values, weights=weights))
    else:
        assert np.isnan(found.gauc)


def test_auc_only_sees_the_order() -> None:
    random = np.random.default_rng(0)
    of = Trial(items_WC=np.zeros((9, 7), int), taken_WC=random.random((9, 7)) < 0.3)
    scores, users = random.normal(size=(9, 7)), np.arange(9) // 3
    assert user_auc(scores, of, users).gauc == user_auc(np.exp(3 * scores) - 5, of, users).gauc
    assert user_auc(-scores, of, users).gauc == pytest.approx(1 - user_auc(scores, of, users).gauc)


def test_a_score_that_is_no_number_cannot_be_ranked() -> None:
    of = Trial(items_WC=np.zeros((1, 2), int), taken_WC=np.array([[True, False]]))
    with pytest.raises(DataError, match="NaN"):
        user_auc(np.array([[np.nan, 1.0]]), of, np.array([0]))


def test_left_out_candidates_do_not_count() -> None:
    of = Trial(items_WC=np.array([[0, 1, 2]]), taken_WC=np.array([[True, False, False]]))
    scores = np.array([[0.5, 0.9, 0.1]])
    assert user_auc(scores, of, np.array([0]), keep_WC=np.array([[True, False, True]])).gauc == 1
    assert len(user_auc(scores, of, np.array([0]), keep_WC=np.array([[False, True, True]])).users) == 0


def test_an_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = interval(random.normal(0.6, 0.2, 80), np.ones(80), random, draws=300)
        hits += found.low <= 0.6 <= found.high
    assert 180 <= hits <= 200


def test_an_interval_weighs_users_and_is_the_same_for_the_same_seed() -> None:
    values, weights = np.array([0.0, 1.0]), np.array([3.0, 1.0])
    one, two = (interval(values, weights, np.random.default_rng(1)) for _ in range(2))
    assert one == two and one.mean == 0.25
    assert np.isnan(interval(np.zeros(0), np.zeros(0), np.random.default_rng(1)).mean)


def test_wrong_users_are_never_the_own_one() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        user_W = random.integers(5, size=23)
        lent_W = wrong_users(user_W, random)
        assert (user_W[lent_W] != user_W).all()
    assert wrong_users(np.zeros(3, int), np.random.default_rng(0)).tolist() == [0, 1, 2]


def test_negatives_are_never_in_the_basket_and_popularity_earns_nothing(world: World) -> None:
    train = Windows.load(world.folder, "train")
    popularity, baskets = Popularity(train, ITEMS), Baskets(train, ITEMS)
    rows = np.arange(len(train))
    drawn_WN = negatives(popularity, baskets, rows, 200, np.random.default_rng(0))
    for row in rows[:50]:
        assert not set(drawn_WN[row]) & set(train.basket_of(row))
    as_negative = np.bincount(drawn_WN.ravel(), minlength=ITEMS) / drawn_WN.size
    taken_share = np.zeros(ITEMS)
    for row in rows:
        basket = train.basket_of(int(row))
        np.add.at(taken_share, basket, 1 / len(basket) / len(rows))
    np.testing.assert_allclose(as_negative, taken_share, rtol=0.1, atol=0.001)


def test_a_basket_that_holds_everything_has_no_negatives(world: World) -> None:
    train = Windows.load(world.folder, "train")
    full = replace(
        train,
        basket=np.tile(np.arange(ITEMS, dtype=np.int32), len(train)),
        basket_offsets=np.arange(len(train) + 1) * ITEMS,
    )
    drawn = negatives(Popularity(train, ITEMS), Baskets(full, ITEMS), np.arange(3), 4, np.random.default_rng(0))
    assert (drawn == -1).all()


def test_a_trial_shows_each_item_of_the_basket_once(world: World) -> None:
    test = Windows.load(world.folder, "test")
    of = trial(test, Popularity(test, ITEMS), ITEMS, 10, np.random.default_rng(0))
    for row in range(len(test)):
        assert sorted(of.items_WC[row][of.taken_WC[row]]) == sorted(set(test.basket_of(row)))
    assert of.items_WC.shape[1] == of.taken_WC.shape[1] == max(of.taken_WC.sum(1)) + 10
