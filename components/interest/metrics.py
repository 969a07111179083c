"""Does a judge know its user: grouped AUC against popularity-matched negatives, and what it is worth with wrong users.

Letters: W windows, C candidates of a window, U users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from couturier.components.data.formats import Windows
from couturier.components.errors import DataError

_ROUNDS = 16


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over users and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Candidates to be ranked: ``items_WC`` indices (-1 pads), and which of them were taken (``taken_WC``)."""

    items_WC: np.ndarray
    taken_WC: np.ndarray


class Popularity:
    """Draws negatives so that every item is as often a negative as it is taken: popularity alone then earns nothing.

    A window's positives are drawn from its basket alike, so an item is taken with ``share_I``: the mean over training
    windows of 1 / basket size where it is in. Drawing from that and refusing what the basket holds would make popular
    items rarer among negatives; the drawing weights make up for it, by iterative proportional fitting.

    Args:
        windows: the training windows.
        items: how many items the catalogue has.

    Raises:
        DataError: no training basket holds an item.
    """

    def __init__(self, windows: Windows, items: int) -> None:
        sizes_W = np.diff(windows.basket_offsets)
        if not sizes_W.sum():
            raise DataError("no training window has a basket, so there is nothing to learn a judge from; add events.")
        owner = np.repeat(np.arange(len(sizes_W)), sizes_W)
        self.share_I = np.bincount(windows.basket, weights=1 / sizes_W[owner], minlength=items) / (sizes_W > 0).sum()
        weights_I = self.share_I.copy()
        pairs = np.unique(owner * items + windows.basket)  # a basket may hold an item twice
        owner, held = pairs // items, pairs % items
        for _ in range(_ROUNDS):
            free_W = 1 - np.bincount(owner, weights=weights_I[held], minlength=len(sizes_W))
            odds_W = np.where(sizes_W > 0, 1 / free_W.clip(min=0.01), 0.0)
            left_I = odds_W.sum() - np.bincount(held, weights=odds_W[owner], minlength=items)
            drawn_I = weights_I * left_I / (sizes_W > 0).sum()
            weights_I = weights_I * (self.share_I / np.maximum(drawn_I, 1e-12)).clip(0.25, 4.0)
            weights_I /= weights_I.sum()
        self._cumulative_I = weights_I.cumsum()

    def draw(self, uniform: np.ndarray) -> np.ndarray:
        """Item indices of uniform numbers in [0, 1)."""
        place = np.searchsorted(self._cumulative_I, uniform * self._cumulative_I[-1], side="right")
        return place.clip(max=len(self._cumulative_I) - 1)


class Baskets:
    """Answers whether a window's next basket holds an item, for many pairs at once."""

    def __init__(self, windows: Windows, items: int) -> None:
        owner = np.repeat(np.arange(len(windows)), np.diff(windows.basket_offsets))
        self.items = items
        self._keys = np.unique(owner * items + windows.basket)

    def hold(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """bool of the shape of ``items``; ``rows`` broadcasts against it."""
        if not len(self._keys):
            return np.zeros(np.broadcast_shapes(rows.shape, items.shape), dtype=bool)
        keys = rows * self.items + items
        place = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return self._keys[place] == keys


def negatives(
    popularity: Popularity, baskets: Baskets, rows: np.ndarray, count: int, random: np.random.Generator
) -> np.ndarray:
    """Popularity-matched items ``[len(rows), count]`` that the window's basket does not hold; -1 where none was found.

    Drawn by rejection, so a negative is distributed as training baskets are, given that this basket lacks it.
    """
    found = popularity.draw(random.random((len(rows), count)))
    column = np.asarray(rows, dtype=np.int64)[:, None]
    for _ in range(_ROUNDS):
        bad = baskets.hold(column, found)
        if not bad.any():
            return found
        found[bad] = popularity.draw(random.random(int(bad.sum())))
    found[baskets.hold(column, found)] = -1
    return found


def trial(windows: Windows, popularity: Popularity, items: int, count: int, random: np.random.Generator) -> Trial:
    """Every window's basket (each item once) against ``count`` popularity-matched negatives."""
    rows = np.arange(len(windows))
    bad = negatives(popularity, Baskets(windows, items), rows, count, random)
    good = [np.unique(windows.basket_of(row)) for row in range(len(windows))]
    widest = max((len(basket) for basket in good), default=0)
    padded = np.full((len(windows), widest), -1, dtype=np.int64)
    for row, basket in zip(padded, good, strict=True):
        row[: len(basket)] = basket
    taken = np.concatenate([padded >= 0, np.zeros(bad.shape, dtype=bool)], axis=1)
    return Trial(items_WC=np.concatenate([padded, bad], axis=1), taken_WC=taken)


@dataclass(frozen=True, kw_only=True)
class UserAuc:
    """AUC of each user with both labels, by rising ``users``; ``impressions_U``: how many candidates each saw."""

    users: np.ndarray
    auc_U: np.ndarray
    impressions_U: np.ndarray

    @property
    def gauc(self) -> float:
        """The impression-weighted mean over users (GAUC; Zhou et al. 2018, arXiv 1706.06978). NaN without users."""
        weight = self.impressions_U.sum()
        return float((self.auc_U * self.impressions_U).sum() / weight) if weight else float("nan")


def user_auc(scores_WC: np.ndarray, trial: Trial, user_W: np.ndarray, *, keep_WC: np.ndarray | None = None) -> UserAuc:
    """AUC of each user over all candidates of the user's windows: the chance that a taken one outranks another.

    From mid-ranks, so that ties count half. Users without both a taken and another candidate are left out;
    ``keep_WC`` leaves candidates out.

    Raises:
        DataError: a score is not a finite number.

    Example:
        >>> t = Trial(items_WC=np.array([[0, 1, 2]]), taken_WC=np.array([[True, False, False]]))
        >>> user_auc(np.array([[0.5, 0.1, 0.9]]), t, np.array([7])).gauc
        0.5
    """
    there_WC = trial.items_WC >= 0 if keep_WC is None else (trial.items_WC >= 0) & keep_WC
    score_N, taken_N = np.asarray(scores_WC, dtype=np.float64)[there_WC], trial.taken_WC[there_WC]
    if not np.isfinite(score_N).all():
        raise DataError("a score is NaN or infinite, so candidates cannot be ranked; look at the judge's features.")
    users, owner_N = np.unique(np.broadcast_to(user_W[:, None], there_WC.shape)[there_WC], return_inverse=True)
    order = np.lexsort((score_N, owner_N))
    owner_N, score_N, taken_N = owner_N[order], score_N[order], taken_N[order]
    rows_U = np.bincount(owner_N, minlength=len(users))
    begins_U = np.r_[0, rows_U.cumsum()[:-1]].astype(np.int64) if len(users) else np.zeros(0, dtype=np.int64)
    first_N = np.r_[True, (np.diff(owner_N) != 0) | (np.diff(score_N) != 0)][: len(owner_N)]
    begin_T = np.flatnonzero(first_N)
    size_T = np.diff(np.r_[begin_T, len(owner_N)])
    rank_N = np.repeat(begin_T + (size_T + 1) / 2, size_T) - begins_U[owner_N]
    taken_U = np.bincount(owner_N, weights=taken_N, minlength=len(users))
    pairs_U = taken_U * (rows_U - taken_U)
    above_U = np.bincount(owner_N, weights=rank_N * taken_N, minlength=len(users)) - taken_U * (taken_U + 1) / 2
    both = pairs_U > 0
    return UserAuc(users=users[both], auc_U=above_U[both] / pairs_U[both], impressions_U=rows_U[both].astype(float))


def interval(
    values_U: np.ndarray, weights_U: np.ndarray, random: np.random.Generator, *, draws: int = 1000
) -> Interval:
    """Weighted mean over users, with the 2.5 % and 97.5 % quantiles of a bootstrap over users. NaN without users."""
    count = len(values_U)
    if not count:
        return Interval(mean=float("nan"), low=float("nan"), high=float("nan"))
    drawn = random.multinomial(count, np.full(count, 1 / count), size=draws)
    low, high = np.quantile((drawn @ (values_U * weights_U)) / (drawn @ weights_U), [0.025, 0.975])
    return Interval(mean=float((values_U * weights_U).sum() / weights_U.sum()), low=float(low), high=float(high))


def wrong_users(user_W: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """For each window a window of somebody else ``[W]``; its own index where there is nobody else.

    Users stand in a random ring, and each is lent the windows of the next, so that no history is lent twice as often.
    """
    users, index = np.unique(user_W, return_inverse=True)
    ring = random.permutation(len(users))
    following = np.empty(len(users), dtype=np.int64)
    following[ring] = np.roll(ring, -1)
    windows_of = np.split(np.argsort(index, kind="stable"), np.bincount(index).cumsum()[:-1]) if len(users) else []
    out = np.arange(len(user_W))
    for user, mine in enumerate(windows_of):
        theirs = windows_of[following[user]]
        out[mine] = theirs[np.arange(len(mine)) % len(theirs)] if following[user] != user else mine
    return out
