"""Reward terms on groups small enough to check by hand, and as properties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from couturier.components.alignment.rewards import (
    TERMS,
    Rollout,
    Weights,
    advantages,
    membership,
    score,
)

ITEMS = 6


def rollout(
    nearest: list[int],
    *,
    basket: Sequence[int] = (),
    future: Sequence[int] = (),
    history: Sequence[int] = (),
    psnr: float = 40.0,
) -> Rollout:
    n = len(nearest)
    features = torch.nn.functional.one_hot(torch.tensor([nearest]), ITEMS).float()
    return Rollout(
        nearest_Un=torch.tensor([nearest]),
        psnr_Un=torch.full((1, n), psnr),
        features_UnD=features,
        liking_Un=torch.zeros(1, n),
        wanted_UI=torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05, 0.0]]),
        basket_UI=membership([np.array(basket, int)], ITEMS),
        future_UI=membership([np.array(future, int)], ITEMS),
        history_UI=membership([np.array(history, int)], ITEMS),
    )


def test_coverage_is_what_the_group_would_lose_without_the_picture() -> None:
    found = TERMS["coverage"](rollout([0, 0, 1, 5], basket=[0, 1, 2]), Weights())
    assert found.tolist() == [[0.0, 0.0, 1.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=8),
    st.sets(st.integers(0, ITEMS - 1)),
)
def test_coverage_equals_the_leave_one_out_definition(nearest: list[int], basket: set[int]) -> None:
    found = TERMS["coverage"](rollout(nearest, basket=sorted(basket)), Weights())[0].tolist()
    whole = len(set(nearest) & basket)
    assert found == [whole - len(set(nearest[:i] + nearest[i + 1 :]) & basket) for i in range(len(nearest))]


def test_the_slate_pays_an_item_as_often_as_it_is_wanted() -> None:
    # Of four pictures two should show item 0: both earn it, a third one nothing. Item 5 is wanted by nobody.
    assert TERMS["slate"](rollout([0, 0, 1, 5]), Weights())[0].tolist() == pytest.approx([1, 1, 0.8, 0])
    assert TERMS["slate"](rollout([0, 0, 0, 5]), Weights())[0].tolist() == pytest.approx([0, 0, 0, 0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=8))
def test_the_slate_is_what_the_agreement_would_lose_without_the_picture(
    nearest: list[int],
) -> None:
    group = rollout(nearest)
    wanted_I = group.wanted_UI[0] * len(nearest)

    def agreement(items: list[int]) -> float:
        return float(torch.bincount(torch.tensor(items, dtype=torch.long), minlength=ITEMS).minimum(wanted_I).sum())

    lost = [agreement(nearest) - agreement(nearest[:i] + nearest[i + 1 :]) for i in range(len(nearest))]
    assert TERMS["slate"](group, Weights())[0].tolist() == pytest.approx(lost, abs=1e-5)


def test_future_is_shared_among_pictures_of_one_item() -> None:
    assert TERMS["future"](rollout([3, 3, 4, 0], future=[3, 4]), Weights()).tolist() == [[0.5, 0.5, 1.0, 0.0]]


def test_copies_cost_nothing_up_to_the_allowed_share_and_then_more_and_more() -> None:
    weights = Weights(copy_allowed=0.5)
    free = TERMS["copying"](rollout([0, 1, 2, 3], history=[0, 1]), weights)
    assert free.abs().max() == 0
    some = TERMS["copying"](rollout([0, 1, 0, 3], history=[0, 1]), weights)
    all_of_them = TERMS["copying"](rollout([0, 1, 0, 1], history=[0, 1]), weights)
    assert some[0, 3] == 0 and some[0, 0] == pytest.approx(-0.5)
    assert all_of_them[0].tolist() == pytest.approx([-1.0] * 4)


def test_mush_is_punished_by_its_pixels() -> None:
    weights = Weights(valid_db=26)
    assert TERMS["validity"](rollout([0], psnr=30), weights).item() == 0
    assert TERMS["validity"](rollout([0], psnr=21), weights).item() == pytest.approx(-0.5)
    assert TERMS["validity"](rollout([0], psnr=5), weights).item() == -1


def test_dissimilarity_is_highest_when_all_differ_and_zero_alone() -> None:
    same = TERMS["dissimilarity"](rollout([0, 0, 0]), Weights())
    different = TERMS["dissimilarity"](rollout([0, 1, 2]), Weights())
    assert same.abs().max() == pytest.approx(0, abs=1e-6) and (different > 0.4).all()
    assert TERMS["dissimilarity"](rollout([0]), Weights()).item() == 0


def test_the_total_is_the_weighted_sum_of_all_named_terms() -> None:
    weights = Weights(coverage=1.5, future=0.5)
    total, terms = score(rollout([0, 1, 5], basket=[0], future=[1], history=[5]), weights)
    assert set(terms) == set(TERMS) == set(weights.of())
    torch.testing.assert_close(total, sum(weights.of()[k] * v for k, v in terms.items()))


def test_advantages_are_centred_and_equal_rewards_give_none() -> None:
    a = advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert a.sum(1).abs().max() < 1e-5
    assert a[0, 2] == pytest.approx(1.2247, abs=1e-3)
    assert a[1].abs().max() == 0
    assert advantages(torch.tensor([[1.0, 3.0]]), by_std=False).tolist() == [[-1.0, 1.0]]
