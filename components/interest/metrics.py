"""Ranking quality of a judge: AUC within a user, its weighted mean over users, and intervals over users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from couturier.components.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with a 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __iter__(self):
        return iter((self.mean, self.low, self.high))


@dataclass(frozen=True, kw_only=True)
class UserAuc:
    """AUC of each user who has both labels; ``users`` sorted, ``impressions`` how many rows each has."""

    users: np.ndarray
    auc: np.ndarray
    impressions: np.ndarray

    @property
    def gauc(self) -> float:
        """The impression-weighted mean over users (DIN's GAUC, arXiv 1706.06978)."""
        return float((self.auc * self.impressions).sum() / self.impressions.sum())


def user_auc(scores_N: np.ndarray, labels_N: np.ndarray, users_N: np.ndarray) -> UserAuc:
    """The chance, a user, that a row labelled 1 scores above a row labelled 0; ties count half.

    From mid-ranks within a user: (sum of positive ranks - p (p + 1) / 2) / (p n).

    Raises:
        DataError: no user has both labels, or a score is not a finite number.

    Example:
        >>> user_auc(np.array([2.0, 1.0, 0.0, 1.0]), np.array([1, 0, 0, 1]), np.array([7, 7, 7, 7])).gauc
        0.875
    """
    scores_N, labels_N = np.asarray(scores_N, np.float64), np.asarray(labels_N).astype(bool)
    if not np.isfinite(scores_N).all():
        raise DataError("scores hold NaN or infinity; AUC needs finite numbers.")
    users, owner_N = np.unique(users_N, return_inverse=True)
    order = np.lexsort((scores_N, owner_N))
    owner, score, label = owner_N[order], scores_N[order], labels_N[order]
    begins = np.flatnonzero(np.r_[True, np.diff(owner) != 0]) if len(owner) else np.zeros(0, int)
    within = np.arange(len(owner)) - np.repeat(begins, np.diff(np.r_[begins, len(owner)]))
    tie_begins = np.flatnonzero(np.r_[True, (np.diff(owner) != 0) | (np.diff(score) != 0)]) if len(owner) else begins
    tie_sizes = np.diff(np.r_[tie_begins, len(owner)])
    rank = np.repeat(within[tie_begins] + (tie_sizes + 1) / 2, tie_sizes)
    positives = np.bincount(owner, label, minlength=len(users))
    rows = np.bincount(owner, minlength=len(users))
    pairs = positives * (rows - positives)
    both = pairs > 0
    if not both.any():
        raise DataError("no user has both a positive and a negative row; GAUC is not defined. Bring more windows.")
    above = np.bincount(owner, rank * label, minlength=len(users)) - positives * (positives + 1) / 2
    return UserAuc(users=users[both], auc=above[both] / pairs[both], impressions=rows[both].astype(np.float64))


def bootstrap(
    values_U: np.ndarray, weights_U: np.ndarray, random: np.random.Generator, *, draws: int = 2000
) -> Interval:
    """The weighted mean over users and its 95 % percentile interval over ``draws`` resamplings of users."""
    counts = random.multinomial(len(values_U), np.full(len(values_U), 1 / len(values_U)), size=draws)
    means = (counts @ (values_U * weights_U)) / (counts @ weights_U)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean=float((values_U * weights_U).sum() / weights_U.sum()), low=float(low), high=float(high))


def difference(a: UserAuc, b: UserAuc, random: np.random.Generator) -> Interval:
    """The paired difference ``a - b`` over the same users and rows, with its interval.

    Raises:
        DataError: the two do not speak of the same users.
    """
    if not np.array_equal(a.users, b.users):
        raise DataError("the two sides of a paired difference hold different users; score the same rows with both.")
    return bootstrap(a.auc - b.auc, a.impressions, random)
