"""Negative sampling in one place: what was not taken, drawn uniformly, by popularity, or out of the batch.

A draw knows its own odds, so a loss over sampled candidates can be corrected for them (logQ: subtract the log of the
expected number of times a candidate is drawn; Bengio and Senecal 2008; Yi et al. 2019).

Letters: U users, C candidates, S pool, I items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from couturier.components.errors import ConfigError

Kind = Literal["uniform", "popularity", "in_batch"]
_ROUNDS = 16

Held = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``(users_K, items_K) -> bool_K``: whether a user took an item; such an item is no negative."""


class Negatives:
    """Draws negatives of one kind.

    Args:
        kind: ``uniform`` over the catalogue, ``popularity`` (in proportion to ``counts_I``), or ``in_batch`` (what
            other users of the batch took).
        counts_I: how often each item was taken in training.

    Raises:
        ConfigError: another kind, or no item was ever taken.

    Example:
        >>> draw = Negatives("popularity", np.array([0, 0, 5]))
        >>> draw.pool(4, np.random.default_rng(0)).tolist()
        [2, 2, 2, 2]
    """

    def __init__(self, kind: Kind, counts_I: np.ndarray) -> None:
        if kind not in ("uniform", "popularity", "in_batch"):
            raise ConfigError(f"negatives is {kind!r}; choose one of uniform, popularity, in_batch.")
        if not counts_I.sum():
            raise ConfigError("no item was ever taken, so there is nothing to draw negatives from; add events.")
        self.kind = kind
        weights_I = np.ones(len(counts_I)) if kind == "uniform" else counts_I.astype(np.float64)
        self.chance_I = weights_I / weights_I.sum()
        self._cumulative_I = self.chance_I.cumsum()

    def pool(self, count: int, random: np.random.Generator) -> np.ndarray:
        """int64 ``[count]`` items for all users of a batch, with replacement."""
        place = np.searchsorted(self._cumulative_I, random.random(count) * self._cumulative_I[-1], side="right")
        return place.clip(max=len(self.chance_I) - 1)

    def log_q(self, items: np.ndarray, count: int) -> np.ndarray:
        """Log of the expected number of times each of ``items`` is among ``count`` draws, float32."""
        return np.log(np.maximum(count * self.chance_I[items], 1e-12)).astype(np.float32)

    def each(
        self, users_U: np.ndarray, taken_UP: np.ndarray, count: int, random: np.random.Generator, held: Held
    ) -> np.ndarray:
        """int64 ``[U, count]`` items that each user did not take; -1 where none was found.

        By rejection, so what is drawn has the kind's distribution given that the user did not take it. ``in_batch``
        draws from ``taken_UP``, what the users of this batch took.
        """
        shape = (len(users_U), count)
        found = self._draw(shape, taken_UP, random)
        owner = np.broadcast_to(users_U[:, None], shape)
        for _ in range(_ROUNDS):
            bad = held(owner.ravel(), found.ravel()).reshape(shape)
            if not bad.any():
                return found
            found[bad] = self._draw((int(bad.sum()),), taken_UP, random)
        found[held(owner.ravel(), found.ravel()).reshape(shape)] = -1
        return found

    def _draw(self, shape: tuple[int, ...], taken_UP: np.ndarray, random: np.random.Generator) -> np.ndarray:
        if self.kind == "in_batch":
            return taken_UP.ravel()[random.integers(taken_UP.size, size=shape)].astype(np.int64)
        return self.pool(int(np.prod(shape)), random).reshape(shape)
