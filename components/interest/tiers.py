"""Likeness of content as numbers a network can read: unit vectors, buckets of a cosine, histograms over a history.

SimTier (Sheng et al. 2024; here as in MUSE, arXiv 2512.07216, and DMF, arXiv 2510.11066) does not show a ranking
network the content of a candidate and a history, only how alike they are: the cosine of the candidate with every
behaviour, counted in tiers. Both judges that use it share this file.

What is ours: a behaviour may count for more or less than one (:class:`Amount`), and a hair is taken off every cosine
before it is put into a tier, so that rounding cannot move the cosines that occur exactly (1 of an item with itself, 0
of an item without content) from one tier to the next.

Letters: U users, C candidates of a user, T history length, N history rows, P picture width, B tiers or buckets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.interest.items import Content
from couturier.components.interest.layers import time_bucket
from couturier.components.interest.types import HistoryBatch

_HAIR = 1e-5
_TIMES = 24
_STRIDE = 10.0  # a few hundred steps of AdamW move a weight by less than one, and old may have to mean nothing


class Looks(nn.Module):
    """The picture part of features as unit vectors around the catalogue's mean, whose products are cosines.

    Frozen: a tier or a search has no slope, so nothing here learns (the papers freeze their content vectors too).
    """

    def __init__(self, content: Content) -> None:
        super().__init__()
        pictures_IP = content.pictures_IP
        mean_P = pictures_IP.mean(0) if len(pictures_IP) else pictures_IP.new_zeros(pictures_IP.shape[1])
        self.mean_P: Tensor
        self.register_buffer("mean_P", mean_P.clone())

    @torch.no_grad()
    def forward(self, features_XD: Tensor) -> Tensor:
        """Features ``[..., D]`` -> ``[..., P]``."""
        return F.normalize(features_XD[..., : len(self.mean_P)] - self.mean_P, dim=-1)


class Amount(nn.Module):
    """How many times a behaviour counts: its weight times a learned factor of its age, 1 at first.

    For plain events (weight 1) of an untrained judge every behaviour counts once, as in the papers. A product's
    favourites carry a decayed count as their weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_age = nn.Embedding(_TIMES, 1)
        nn.init.zeros_(self.by_age.weight)

    def forward(self, history: HistoryBatch) -> Tensor:
        """``[N]``, not negative."""
        factor_N = 2 * torch.sigmoid(_STRIDE * self.by_age(time_bucket(history.age_days_N, _TIMES)))[:, 0]
        return history.weight_N.clamp_min(0) * factor_N


class SimTier(nn.Module):
    """``log(1 + n_b) e_b`` a tier ``b``, where ``n_b`` behaviours are in it and ``e_b`` is learned."""

    def __init__(self, tiers: int) -> None:
        super().__init__()
        self.tiers = tiers
        self.value_B = nn.Parameter(torch.rand(tiers))

    def forward(self, counts_UCB: Tensor) -> Tensor:
        """How many behaviours are in each tier (see :func:`tier_sums`) -> ``[U, C, B]``; any leading axes."""
        return counts_UCB.log1p() * self.value_B


def tier_sums(tier_UCT: Tensor, amount_UCT: Tensor, tiers: int) -> Tensor:
    """Sum of amounts by tier, ``[U, C, B]``; ``amount_UCT`` may be broadcast over candidates.

    Example:
        >>> tier_sums(torch.tensor([[[0, 2, 2]]]), torch.ones(1, 1, 3), 3).tolist()
        [[[1.0, 0.0, 2.0]]]
    """
    out = amount_UCT.new_zeros(*tier_UCT.shape[:-1], tiers)
    return out.scatter_add(-1, tier_UCT, amount_UCT.expand(tier_UCT.shape))


def tiers_in(step: float) -> int:
    """How many tiers MUSE has for steps of that width: 22 for 0.1."""
    return 2 * round(1 / step) + 2


def tier(cosine: Tensor, step: float = 0.1) -> Tensor:
    """MUSE's tier of a cosine, int64: ``ceil(cosine / step) + 1 / step``; 0 for -1, 20 for 1 where ``step`` is 0.1.

    Example:
        >>> tier(torch.tensor([-1.0, -0.95, 0.0, 0.05, 1.0])).tolist()
        [0, 1, 10, 11, 20]
    """
    found = ((cosine - _HAIR) * (1 / step)).ceil().long() + round(1 / step)
    return found.clamp(0, tiers_in(step) - 1)


def bucket(cosine: Tensor, buckets: int) -> Tensor:
    """One of ``buckets`` equal parts of -1..1, int64 from 0.

    Example:
        >>> bucket(torch.tensor([-1.0, -0.01, 0.0, 1.0]), 10).tolist()
        [0, 4, 5, 9]
    """
    return ((cosine + 1 + _HAIR) * (buckets / 2)).floor().long().clamp(0, buckets - 1)


def attention_weights(logit_UCT: Tensor, amount_UCT: Tensor) -> Tensor:
    """Softmax in which a behaviour counts ``amount`` times; 0 for one that counts not at all, and for nobody's.

    Adding ``log(amount)`` to a logit is the same as repeating the behaviour, so amounts of 1 are a plain softmax.
    """
    lowest = math.log(1e-30)
    biased = logit_UCT + amount_UCT.clamp_min(1e-30).log()
    return biased.masked_fill(amount_UCT <= 0, lowest * 1e3).softmax(-1) * (amount_UCT > 0)
