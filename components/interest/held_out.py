"""What users did last, kept from training: rank the whole catalogue for it, or a few candidates.

A user's last event is the test, the one before it validation (leave-last-out). The rank of the item taken is counted
among the whole catalogue, ties half, items already taken left out if asked for: then Hit@k and NDCG@k follow.

Letters: U users, I items, C candidates, K list length, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from couturier.components.errors import DataError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.log import Log, Shard
from couturier.components.interest.log_examples import history_of, history_rows
from couturier.components.interest.sampling import Negatives
from couturier.components.interest.types import HistoryBatch
from couturier.components.runtime import seeded_numpy

_CHUNK = 128
Place = Literal["valid", "test"]
_BACK = {"test": 1, "valid": 2}
_NOBODY = "no user has an event before the held-out one, so nobody can be ranked for; add events."
Scores = Callable[[Shard, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Per user (by rising number): the item taken, its rank from 1 (ties half), and the best ``K`` items."""

    users_U: np.ndarray
    taken_U: np.ndarray
    rank_U: np.ndarray
    top_UK: np.ndarray

    def hit(self, k: int) -> np.ndarray:
        """Hit@k of each user."""
        return (self.rank_U <= k).astype(np.float64)

    def ndcg(self, k: int) -> np.ndarray:
        """NDCG@k of each user, one item being relevant: 1 / log2(rank + 1), 0 beyond k."""
        return np.where(self.rank_U <= k, 1 / np.log2(self.rank_U + 1), 0.0)


class HeldOut:
    """The held-out moments of a log.

    Args:
        place: ``valid`` (each user's last but one event) or ``test`` (the last).
        history: how many of the newest behaviours before it a history holds at most.
        most_users: at most so many users, drawn by ``seed``; 0 for all.
    """

    def __init__(self, log: Log, place: Place, *, history: int, most_users: int = 0, seed: int = 0) -> None:
        self.log, self.back, self.history = log, _BACK[place], history
        chosen = seeded_numpy(seed, "held out").permutation(log.users)[: most_users or log.users]
        self.chosen = np.zeros(log.users, dtype=bool)
        self.chosen[chosen] = True

    def _parts(self) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """``(shard, user index, event index)`` of at most ``_CHUNK`` users with at least one event before."""
        for index in range(self.log.shards):
            shard = self.log.shard(index)
            target_U = shard.offsets[1:] - self.back
            usable = np.flatnonzero((target_U > shard.offsets[:-1]) & self.chosen[shard.users_U])
            for start in range(0, len(usable), _CHUNK):
                users = usable[start : start + _CHUNK]
                yield shard, users, target_U[users]

    def _history(self, shard: Shard, users: np.ndarray, target: np.ndarray, items_ID: torch.Tensor) -> HistoryBatch:
        rows, offsets = history_rows(shard.offsets[:-1][users], target, self.history)
        return history_of(shard, rows, offsets, shard.time_s_N[target], items_ID)

    @torch.no_grad()
    def rank(self, judge: ContentJudge, *, skip_seen: bool, k: int = 10) -> Ranking:
        """Rank the whole catalogue for every user; ``skip_seen`` leaves out what the user took before.

        Raises:
            DataError: no user has an event before the held-out one.
        """
        items_ID = judge.embed_items()

        def scores(shard: Shard, users: np.ndarray, target: np.ndarray) -> np.ndarray:
            state = judge.encode(self._history(shard, users, target, items_ID))
            return judge.score_all(state, items_ID).double().numpy()

        return self.rank_by(scores, skip_seen=skip_seen, k=k)

    def rank_by(self, scores: Scores, *, skip_seen: bool, k: int = 10) -> Ranking:
        """As ``rank``, by any scores: ``(shard, user index, event index) -> float64 [U, I]``, which may be changed."""
        parts: list[tuple[np.ndarray, ...]] = []
        for shard, users, target in self._parts():
            scores_UI = scores(shard, users, target)
            everyone = np.arange(len(users))
            taken = shard.item_N[target].astype(np.int64)
            own = scores_UI[everyone, taken].copy()
            if skip_seen:
                owner, items = self.taken_before(shard, users, target)
                scores_UI[owner, items] = -np.inf
            scores_UI[everyone, taken] = own
            above = (scores_UI > own[:, None]).sum(1)
            ties = (scores_UI == own[:, None]).sum(1) - 1
            best = np.argpartition(-scores_UI, min(k, scores_UI.shape[1]) - 1, axis=1)[:, :k]
            order = np.take_along_axis(scores_UI, best, axis=1).argsort(axis=1)[:, ::-1]
            parts.append((shard.users_U[users], taken, 1 + above + ties / 2, np.take_along_axis(best, order, axis=1)))
        if not parts:
            raise DataError(_NOBODY)
        users_U, taken_U, rank_U, top_UK = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Ranking(users_U=users_U, taken_U=taken_U, rank_U=rank_U, top_UK=top_UK)

    def taken_before(self, shard: Shard, users: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(place in users, item)`` of everything each user took before the held-out event."""
        rows, offsets = history_rows(shard.offsets[:-1][users], target, len(shard.item_N))
        return np.repeat(np.arange(len(users)), np.diff(offsets)), shard.item_N[rows]

    def repeat_share(self) -> float:
        """Share of held-out events that are about an item the user had taken before."""
        repeats = count = 0
        for shard, users, target in self._parts():
            owner, items = self.taken_before(shard, users, target)
            same = items == shard.item_N[target][owner]
            repeats += len(np.unique(owner[same]))
            count += len(users)
        return repeats / max(1, count)

    @torch.no_grad()
    def auc(self, judge: ContentJudge, negatives: Negatives, count: int, *, seed: int) -> np.ndarray:
        """AUC of each user: the item taken against ``count`` drawn ones the user never took before; ties half."""
        items_ID, parts = judge.embed_items(), []
        for shard, users, target in self._parts():
            taken = shard.item_N[target][:, None].astype(np.int64)
            rows, offsets = history_rows(shard.offsets[:-1][users], target + 1, len(shard.item_N))
            keys = np.unique(np.repeat(users, np.diff(offsets)) * self.log.items + shard.item_N[rows])

            def held(who: np.ndarray, items: np.ndarray, keys: np.ndarray = keys) -> np.ndarray:
                return np.isin(who * self.log.items + items, keys)

            random = seeded_numpy(seed, "auc", str(int(shard.users_U[users[0]])))
            bad = negatives.each(users, taken, count, random, held)
            items = torch.from_numpy(np.concatenate([taken, bad.clip(min=0)], axis=1))
            state = judge.encode(self._history(shard, users, target, items_ID))
            scores = judge.score(state, items_ID[items]).double().numpy()
            good, other = scores[:, :1], scores[:, 1:]
            real = bad >= 0
            won = ((good > other) + 0.5 * (good == other)) * real
            parts.append(won.sum(1) / np.maximum(real.sum(1), 1))
        if not parts:
            raise DataError(_NOBODY)
        return np.concatenate(parts)
