"""The semantic-temporal correlation: against a plain count, its limits, and what attention learned for the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from couturier.components.errors import DataError
from couturier.components.interest.correlation import learned_correlation, measured_correlation, retrieval_quality


def counted(target: np.ndarray, label: np.ndarray, behaviour: np.ndarray, c: int, a: int, p: int) -> float:
    """Mutual information of two bits, cell by cell, as the paper's released code writes it."""
    rows = target == c
    present, taken, total = behaviour[rows, p] == a, label[rows], rows.sum()
    out = 0.0
    for here in (True, False):
        for yes in (True, False):
            cell = ((present == here) & (taken == yes)).sum()
            if cell:
                out += cell / total * np.log2(cell * total / ((present == here).sum() * (taken == yes).sum()))
    return out


def test_agrees_with_counting() -> None:
    random = np.random.default_rng(0)
    target, label = random.integers(3, size=400), random.random(400) < 0.4
    behaviour = random.integers(-1, 3, size=(400, 4))
    behaviour[label, 1] = target[label]
    found = measured_correlation(target, label, behaviour, categories=3)
    for place in np.ndindex(3, 3, 4):
        assert found[place] == pytest.approx(counted(target, label, behaviour, *place), abs=1e-12)
    assert (found >= -1e-12).all()


def test_what_decides_has_all_the_information_and_what_does_not_has_none() -> None:
    target, label = np.zeros(64, dtype=int), np.arange(64) % 2 == 0
    decides, not_at_all = np.where(label, 1, 0), np.arange(64) // 2 % 2
    found = measured_correlation(target, label, np.stack([decides, not_at_all], axis=1), categories=2)
    assert found[0].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert found[1].tolist() == [[0.0, 0.0], [0.0, 0.0]], "no sample is about this target"


@pytest.mark.parametrize(
    ("target", "behaviour"), [(np.array([0, 2]), np.zeros((2, 1), int)), (np.array([0, 1]), np.full((2, 1), 2))]
)
def test_a_category_that_there_is_not_is_refused(target: np.ndarray, behaviour: np.ndarray) -> None:
    with pytest.raises(DataError, match="goes from"):
        measured_correlation(target, np.array([True, False]), behaviour, categories=2)


def test_lengths_that_do_not_agree_are_refused() -> None:
    with pytest.raises(DataError, match="wanted as many"):
        measured_correlation(np.zeros(3, int), np.zeros(2, bool), np.zeros((3, 1), int), categories=1)


def test_learned_is_greatest_where_meaning_and_time_fit_and_lies_in_zero_to_one() -> None:
    categories, times = 3 * torch.eye(4)[:, :3], torch.zeros(2, 3)
    times[0] = 0.5
    found = learned_correlation(categories, times, torch.full((3,), 0.5))
    assert found.shape == (4, 4, 2) and found.amin() == 0 and found.amax() == 1
    for category in range(3):
        assert divmod(int(found[category].argmax()), 2) == (category, 0)


def test_learned_without_time_says_the_same_of_every_position() -> None:
    found = learned_correlation(torch.randn(4, 3), torch.zeros(5, 3), torch.zeros(3))
    assert torch.equal(found, found[..., :1].expand(-1, -1, 5))


def test_a_search_is_as_good_as_what_it_found() -> None:
    information = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    found = torch.tensor([[0, 2], [1, -1], [2, -1]])
    assert retrieval_quality(found, information).tolist() == [1.0, 1.0, 0.0]
