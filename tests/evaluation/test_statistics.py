"""Intervals that hold what they promise, on simulated people whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from couturier.components.errors import DataError
from couturier.components.evaluation.statistics import (
    Interval,
    bootstrap,
    paired_difference,
    paired_ratio,
    user_means,
)

WORLDS, USERS, DRAWS = 400, 80, 400


def _worlds(seed: int) -> np.ndarray:
    """Figures of skewed people, ``[worlds, U]``: shares such as basket precision are far from normal."""
    return np.random.default_rng(seed).beta(1, 9, size=(WORLDS, USERS))


def test_a_95_per_cent_interval_holds_the_truth_about_95_times_in_100() -> None:
    truth = 0.1
    found = [bootstrap(world, seed=i, draws=DRAWS) for i, world in enumerate(_worlds(0))]
    held = np.mean([one.low <= truth <= one.high for one in found])
    assert 0.90 <= held <= 0.98


def test_two_equal_generators_are_told_apart_about_5_times_in_100() -> None:
    a, b = _worlds(1), _worlds(2)
    told = [paired_difference(x, y, seed=i, draws=DRAWS) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    alarms = np.mean([one.low > 0 or one.high < 0 for one in told])
    assert 0.02 <= alarms <= 0.09


def test_pairing_sees_what_unpaired_intervals_hide() -> None:
    people = _worlds(3)[0]
    better = people + 0.01 + np.random.default_rng(4).normal(0, 0.005, USERS)
    alone, other = bootstrap(people, seed=0), bootstrap(better, seed=0)
    assert alone.high > other.low  # apart, the two cannot be told from one another
    assert paired_difference(better, people, seed=0).low > 0


def test_windows_of_one_person_count_as_one_person() -> None:
    values = np.array([1.0, 3.0, 10.0, np.nan])
    user = np.array([0, 0, 1, 2])
    means = user_means(values, user, 4)
    assert means[:2].tolist() == [2.0, 10.0]
    assert np.isnan(means[2:]).all()
    assert bootstrap(means, seed=0).mean == 6.0


def test_many_windows_of_few_people_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(5)
    people = rng.normal(size=20)
    once, often = np.arange(20), np.repeat(np.arange(20), 50)
    narrow = bootstrap(user_means(people[once], once, 20), seed=0)
    wide = bootstrap(user_means(people[often], often, 20), seed=0)
    assert wide.as_list() == pytest.approx(narrow.as_list())


def test_a_ratio_of_means_holds_the_truth() -> None:
    rng = np.random.default_rng(6)
    held = []
    for seed in range(200):
        below = rng.gamma(4, 0.25, USERS)
        above = 0.8 * below + rng.normal(0, 0.1, USERS)
        one = paired_ratio(above, below, seed=seed, draws=DRAWS)
        held.append(one.low <= 0.8 <= one.high)
    assert 0.89 <= np.mean(held) <= 0.99


def test_people_without_a_figure_on_both_sides_are_left_out_of_a_comparison() -> None:
    a, b = np.array([1.0, 2.0, np.nan, 4.0]), np.array([0.0, np.nan, 5.0, 2.0])
    assert paired_difference(a, b, seed=0).mean == 1.5
    assert paired_ratio(a, b, seed=0).mean == 2.5


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly_so() -> None:
    people = _worlds(7)[0]
    one, same, other = bootstrap(people, seed=0), bootstrap(people, seed=0), bootstrap(people, seed=1)
    assert one == same
    assert (one.low, one.high) != (other.low, other.high)
    assert one.low == pytest.approx(other.low, abs=0.1 * (one.high - one.low))


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e3, 1e3)))
def test_the_mean_lies_inside_its_interval_and_the_interval_inside_the_data(values: np.ndarray) -> None:
    found = bootstrap(values, seed=0, draws=100)
    slack = 1e-9 * (1 + np.abs(values).max())
    assert values.min() - slack <= found.low <= found.high <= values.max() + slack
    assert found.as_list() == [found.mean, found.low, found.high]


def test_what_cannot_be_compared_is_an_error_in_words() -> None:
    with pytest.raises(DataError, match="no user"):
        bootstrap(np.full(3, np.nan), seed=0)
    with pytest.raises(DataError, match="same users"):
        paired_difference(np.zeros(3), np.zeros(4), seed=0)
    with pytest.raises(DataError, match="mean of zero"):
        paired_ratio(np.ones(3), np.zeros(3), seed=0)


def test_a_figure_of_the_whole_row_has_no_spread() -> None:
    assert Interval.point(0.25).as_list() == [0.25, 0.25, 0.25]
