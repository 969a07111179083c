"""Means over people with bootstrap intervals. A person's windows are averaged first: they are not independent.

Legend: V windows, U users. A value that is not known (NaN) is left out, and with it a user who has no other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from couturier.components.errors import DataError
from couturier.components.runtime import seeded_numpy


@dataclass(frozen=True)
class Interval:
    """A mean over users and the ends of its 95 % percentile interval.

    Example:
        >>> Interval(0.5, 0.4, 0.6).as_list()
        [0.5, 0.4, 0.6]
    """

    mean: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """``[mean, low, high]``, as it stands in ``table.json``."""
        return [self.mean, self.low, self.high]

    @classmethod
    def point(cls, value: float) -> Interval:
        """A figure of the whole row, which no person owns a share of: both ends are the figure itself."""
        return cls(value, value, value)


def user_means(values_V: np.ndarray, user_V: np.ndarray, users: int) -> np.ndarray:
    """Mean of each user's known windows, float64 ``[U]``; NaN for a user without one."""
    known = np.isfinite(values_V)
    total = np.bincount(user_V[known], weights=values_V[known], minlength=users)
    count = np.bincount(user_V[known], minlength=users)
    return np.divide(total, count, out=np.full(users, np.nan), where=count > 0)


def bootstrap(values_U: np.ndarray, *, seed: int, draws: int = 2000) -> Interval:
    """Mean over users with a percentile interval of the bootstrap over users (Efron 1979).

    Raises:
        DataError: no user has a value.
    """
    known = _known(values_U)
    means = _resamples(len(known), seed, draws) @ known
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(known.mean()), float(low), float(high))


def paired_difference(a_U: np.ndarray, b_U: np.ndarray, *, seed: int, draws: int = 2000) -> Interval:
    """Mean of ``a - b`` over the users who have both, with its interval. Both arrays are in the same user order."""
    return bootstrap(_same_length(a_U, b_U)[0] - b_U, seed=seed, draws=draws)


def paired_ratio(a_U: np.ndarray, b_U: np.ndarray, *, seed: int, draws: int = 2000) -> Interval:
    """Mean of ``a`` over mean of ``b``, on the users who have both, with its interval.

    Raises:
        DataError: ``b`` is zero on average, or no user has both.
    """
    a_U, b_U = _same_length(a_U, b_U)
    both = np.isfinite(a_U) & np.isfinite(b_U)
    a, b = _known(a_U[both]), b_U[both]
    if not b.mean():
        raise DataError("a ratio to a mean of zero was asked for; compare by a difference instead.")
    weights = _resamples(len(a), seed, draws)
    below = weights @ b
    ratios = np.divide(weights @ a, below, out=np.full(draws, np.nan), where=below != 0)
    low, high = np.nanquantile(ratios, (0.025, 0.975))
    return Interval(float(a.mean() / b.mean()), float(low), float(high))


@functools.lru_cache(maxsize=8)
def _resamples(users: int, seed: int, draws: int) -> np.ndarray:
    """How much each user counts in each draw, ``[draws, U]``, rows sum to one. The same draws for every metric."""
    random = seeded_numpy(seed, "bootstrap", str(users))
    return random.multinomial(users, np.full(users, 1 / users), size=draws) / users


def _known(values_U: np.ndarray) -> np.ndarray:
    known = values_U[np.isfinite(values_U)]
    if not len(known):
        raise DataError("no user has a value to average; evaluate at least one user with a next basket.")
    return known


def _same_length(a_U: np.ndarray, b_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if a_U.shape != b_U.shape:
        raise DataError(
            f"a pair of rows has {len(a_U)} and {len(b_U)} users; both must list the same users in one order."
        )
    return a_U, b_U
