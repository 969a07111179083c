"""Lift worked out by hand, on windows small enough to count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from couturier.components.alignment import purchases
from couturier.components.data.formats import Windows

ITEMS = 4


def windows() -> Windows:
    """Three windows: histories {0, 1}, {0} and none; baskets {2}, {2, 3} and {3}."""
    return Windows(
        users=["a", "b", "c"],
        user_W=np.array([0, 1, 2], np.int32),
        time_W=np.zeros(3, np.int64),
        favourites_WK=np.array([[0, 1], [0, -1], [-1, -1]], np.int32),
        weight_WK=np.array([[3.0, 1.0], [1.0, 0.0], [0.0, 0.0]], np.float32),
        age_days_WK=np.zeros((3, 2), np.float32),
        recent_WK=np.array([[1, 0], [0, -1], [-1, -1]], np.int32),
        basket=np.array([2, 2, 3, 3], np.int32),
        basket_offsets=np.array([0, 1, 3, 4]),
        future=np.zeros(0, np.int32),
        future_offsets=np.zeros(4, np.int64),
    )


def test_lift_is_that_of_the_counts_shrunk_towards_none() -> None:
    found = purchases.lift(windows(), np.arange(3), ITEMS)
    p, s = 2.5 / 3, purchases.SHRINKAGE
    assert found[0, 2].item() == pytest.approx(math.log((2 + s * p) / (2 + s) / p), abs=1e-6)
    assert found[0, 3].item() == pytest.approx(math.log((1 + s * p) / (2 + s) / p), abs=1e-6)
    assert found[2, 3].item() == pytest.approx(0, abs=1e-6)  # in nobody's history: nothing is known
    assert not found.diagonal().any()


def test_columns_are_means_and_the_largest_over_the_history_and_zero_without_one() -> None:
    lift_II = torch.arange(16.0).view(4, 4)
    found = purchases.columns(windows(), np.array([0, 2]), lift_II)
    a, b = math.log1p(3), math.log1p(1)
    for item in range(ITEMS):
        mean, best, recent, place = found[0, item].tolist()
        assert mean == pytest.approx((a * item + b * (4 + item)) / (a + b), abs=1e-5)
        assert best == 4 + item
        assert recent == pytest.approx((1 * (4 + item) + 0.5 * item) / 1.5, abs=1e-5)
        assert place == {1: 1.0, 0: 0.5}.get(item, 0.0)
    assert not found[1].any()
