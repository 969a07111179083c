"""Tiers and buckets of a cosine, and histograms in which nothing is lost and nothing padded is counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from couturier.components.interest.items import Content
from couturier.components.interest.tiers import (
    Amount,
    Looks,
    SimTier,
    attention_weights,
    bucket,
    tier,
    tier_sums,
    tiers_in,
)
from couturier.components.interest.types import HistoryBatch


def test_tiers_are_those_of_the_released_formula() -> None:
    """``ceil(c / 0.1) + 10``, on random cosines (none of which lies on the edge of a tier)."""
    cosine = 2 * torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    inside = (cosine * 10 - (cosine * 10).round()).abs() > 1e-3
    wanted = np.ceil(cosine[inside].numpy() / 0.1).astype(int) + 10
    assert tiers_in(0.1) == 22 and tier(cosine[inside]).tolist() == wanted.tolist()


@pytest.mark.parametrize("nearly", [-1e-6, 0.0, 1e-6])
def test_cosines_that_occur_exactly_fall_into_one_legal_tier_whatever_the_rounding(nearly: float) -> None:
    exact = torch.tensor([-1.0, 0.0, 1.0]) + nearly
    assert tier(exact).tolist() == [0, 10, 20]
    assert bucket(exact, 35).tolist() == [0, 17, 34]
    assert bucket(exact, 10).tolist() == [0, 5, 9]
    assert int(tier(torch.tensor([1.1])).max()) < tiers_in(0.1)


def test_buckets_are_equal_parts() -> None:
    cosine = torch.linspace(-1, 1, 7001)[1:-1]
    counts = torch.bincount(bucket(cosine, 35), minlength=35)
    assert len(counts) == 35 and int(counts.max() - counts.min()) <= 2


def test_sums_hold_every_amount_and_nothing_padded() -> None:
    random = torch.Generator().manual_seed(1)
    cosine, amount = 2 * torch.rand(3, 5, 8, generator=random) - 1, torch.rand(3, 1, 8, generator=random)
    amount[1, :, 5:] = 0
    sums = tier_sums(tier(cosine), amount, 22)
    torch.testing.assert_close(sums.sum(-1), amount.sum(-1).expand(3, 5))
    assert bool((tier_sums(tier(cosine), torch.ones(3, 1, 8), 22).sum(-1) == 8).all())
    by_hand = [float(amount[1, 0, tier(cosine)[1, 2] == place].sum()) for place in range(22)]
    torch.testing.assert_close(sums[1, 2], torch.tensor(by_hand))


def test_simtier_is_the_log_of_the_count_times_a_learned_value() -> None:
    simtier = SimTier(3)
    shown = simtier(torch.tensor([0.0, 1.0, 7.0]))
    torch.testing.assert_close(shown, torch.tensor([0.0, math.log(2), math.log(8)]) * simtier.value_B)


def test_weights_of_amounts_are_those_of_repeats() -> None:
    logit = torch.tensor([[[0.3, -1.0, 2.0]]])
    once = attention_weights(logit[..., [0, 1, 1, 1, 2]], torch.ones(1, 1, 5))
    many = attention_weights(logit, torch.tensor([[[1.0, 3.0, 1.0]]]))
    torch.testing.assert_close(many[0, 0], torch.stack([once[0, 0, 0], once[0, 0, 1:4].sum(), once[0, 0, 4]]))
    torch.testing.assert_close(attention_weights(logit, torch.ones(1, 1, 3)), logit.softmax(-1))
    padded = attention_weights(torch.tensor([[[0.3, 99.0]]]), torch.tensor([[[1.0, 0.0]]]))
    assert padded.tolist() == [[[1.0, 0.0]]]
    assert attention_weights(logit, torch.zeros(1, 1, 3)).abs().max() == 0


def test_an_untrained_judge_counts_a_plain_event_once() -> None:
    history = HistoryBatch(
        features_ND=torch.zeros(3, 2),
        age_days_N=torch.tensor([0.0, 30.0, 900.0]),
        weight_N=torch.tensor([1.0, 1.0, 2.5]),
        offsets=torch.tensor([0, 3]),
    )
    assert Amount()(history).tolist() == [1.0, 1.0, 2.5]


def test_looks_are_of_unit_length_around_the_mean_and_learn_nothing() -> None:
    vectors = 5 + torch.randn(20, 4, generator=torch.Generator().manual_seed(2))
    looks = Looks(Content.of_vectors(vectors))
    shown = looks(torch.cat([vectors, torch.ones(20, 3)], dim=1))
    torch.testing.assert_close(shown.norm(dim=-1), torch.ones(20))
    assert float((shown @ shown.T).mean()) < 0.2 and not list(looks.parameters())
