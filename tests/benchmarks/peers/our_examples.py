"""What our judges learn from in the comparison: histories out of the split, and rows or moments out of them.

A history is shown as its newest events, or as favourites: its distinct items by how often they were taken, decayed with
age, as the ``sequences`` stage shows them (then ``history`` counts distinct items).

Letters: U users, C candidates, P taken ones, N rows, I items, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from couturier.components.data.sequences import Config as SequencesConfig
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import FeatureConfig
from couturier.components.interest.log import Shard
from couturier.components.interest.log_examples import LogConfig, history_of, history_rows
from couturier.components.interest.loop import LoopConfig
from couturier.components.interest.sampling import Negatives
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import seeded_numpy

_LOOP = {field.name for field in fields(LoopConfig)}
_LOG = {field.name for field in fields(LogConfig)}
_DAY_S = 86_400
_HALF_LIFE_S = SequencesConfig().half_life_days * _DAY_S


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run's settings, parted: ``judge`` is the judge's own config, the rest the loop's, the log's and the items'."""

    loop: LoopConfig
    log: LogConfig
    features: FeatureConfig
    judge: dict[str, Any]
    favourites: bool = False
    """Whether histories are shown as favourites instead of newest events."""
    positives: int = 1
    """P of a moment, for judges that learn from candidates."""

    @classmethod
    def of(cls, config: dict[str, Any], seed: int, holdout: int = 0) -> Setting:
        loop = {name: value for name, value in config.items() if name in _LOOP}
        log = {name: value for name, value in config.items() if name in _LOG}
        return cls(
            loop=LoopConfig(**loop, seed=seed),
            log=LogConfig(**log, holdout=holdout),
            features=FeatureConfig(words=config.get("words", 16), ids=config.get("ids", 64)),
            judge=config.get("judge", {}),
            favourites=config.get("favourites", False),
            positives=config.get("positives", 1),
        )


class History:
    """Everybody's events in memory, to read the histories of rows from."""

    def __init__(self, events: dict[str, np.ndarray], setting: Setting) -> None:
        self.limit, self.favourites = setting.log.history, setting.favourites
        starts = np.flatnonzero(np.r_[True, np.diff(events["user"]) != 0])
        count = len(events["user"])
        self.row_of = {int(user): place for place, user in enumerate(events["user"][starts])}
        self._users = events["user"][starts]
        self.shard = Shard(
            users_U=events["user"][starts],
            offsets=np.r_[starts, count].astype(np.int64),
            item_N=events["item"] - 1,
            time_s_N=events["timestamp_us"] // 1_000_000,
            kind_N=np.zeros(count, dtype=np.int8),
            value_N=np.zeros(count, dtype=np.float32),
        )

    def batch(self, users: np.ndarray, lengths: np.ndarray, now_s: np.ndarray, items_ID: torch.Tensor) -> HistoryBatch:
        """What is shown of each user's first ``lengths`` events, seen from ``now_s``."""
        rows = np.searchsorted(self._users, users)
        begin = self.shard.offsets[:-1][rows]
        if self.favourites:
            return self._favourites(begin, begin + lengths, now_s, items_ID)
        index, offsets = history_rows(begin, begin + lengths, self.limit)
        return history_of(self.shard, index, offsets, now_s, items_ID)

    def _favourites(
        self, begin: np.ndarray, end: np.ndarray, now_s: np.ndarray, items_ID: torch.Tensor
    ) -> HistoryBatch:
        items, ages, weights, count = [], [], [], [0]
        for first, last, now in zip(begin, end, now_s, strict=True):
            taken, age_s = self.shard.item_N[first:last], now - self.shard.time_s_N[first:last]
            decayed = np.bincount(taken, weights=np.exp2(-age_s / _HALF_LIFE_S), minlength=len(items_ID))
            newest = np.zeros(len(items_ID))
            newest[taken] = age_s  # in time order, so the last one stays
            held = np.flatnonzero(decayed)
            best = held[np.argsort(-decayed[held], kind="stable")[: self.limit]]
            best = best[np.argsort(-newest[best], kind="stable")]
            items.append(best)
            ages.append(newest[best] / _DAY_S)
            weights.append(decayed[best])
            count.append(len(best))
        items_N = torch.from_numpy(np.concatenate(items))
        return HistoryBatch(
            features_ND=items_ID[items_N],
            age_days_N=torch.from_numpy(np.concatenate(ages).astype(np.float32)),
            weight_N=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
            offsets=torch.from_numpy(np.cumsum(count)),
            items_N=items_N,
            in_time_order=True,
        )

    def lengths(self, users: np.ndarray) -> np.ndarray:
        rows = np.searchsorted(self._users, users)
        return self.shard.offsets[1:][rows] - self.shard.offsets[:-1][rows]


class CtrExamples:
    """Feeds a fit from the split's own rows: each positive with the negatives that the peers get."""

    def __init__(self, rows: dict[str, np.ndarray], history: History, now_s: np.ndarray, setting: Setting) -> None:
        self.each = 1 + int(np.argmax(rows["label"][1:] == 1))
        self.items = rows["item"].reshape(-1, self.each) - 1
        self.users, self.lengths = rows["user"][:: self.each], rows["seq_len"][:: self.each]
        self.history, self.now_s, self.setting = history, now_s[:: self.each], setting
        self.steps_an_epoch = max(1, len(self.users) // setting.log.batch)
        self._chosen = np.zeros(0, dtype=np.int64)
        self._order = (-1, self._chosen)

    def rows(self) -> list[int]:
        return self._chosen.tolist()

    def state(self) -> dict[str, Any]:
        return {}

    def seek(self, state: dict[str, Any]) -> None:
        return None

    def batch(self, judge: ContentJudge, step: int) -> TrainBatch:
        """The batch of a step; every epoch has an order of its own."""
        epoch, place = divmod(step, self.steps_an_epoch)
        if self._order[0] != epoch:
            random = seeded_numpy(self.setting.loop.seed, "ctr", str(epoch))
            self._order = epoch, random.permutation(len(self.users))
        order = self._order[1]
        size = self.setting.log.batch
        chosen = self._chosen = order[place * size : (place + 1) * size]
        items_ID = judge.embed_items()
        items_UC = torch.from_numpy(self.items[chosen])
        return TrainBatch(
            history=self.history.batch(self.users[chosen], self.lengths[chosen], self.now_s[chosen], items_ID),
            items_UC=items_UC,
            candidates_UCD=items_ID[items_UC],
            positives=1,
            catalogue_ID=items_ID,
        )

    @torch.no_grad()
    def scores(self, judge: ContentJudge) -> np.ndarray:
        """Chances of being taken, a row each, in the order of the rows."""
        items_ID, found = judge.embed_items(), []
        for begin in range(0, len(self.users), 256):
            part = slice(begin, begin + 256)
            batch = self.history.batch(self.users[part], self.lengths[part], self.now_s[part], items_ID)
            found.append(judge.score(judge.encode(batch), items_ID[torch.from_numpy(self.items[part])]).sigmoid())
        return torch.cat(found).double().numpy().ravel()


class Moments:
    """Feeds a fit from moments: what somebody took together, and what they had done before it.

    Unlike ``LogExamples`` no history holds a part of the basket that is to be found, as none does when it is tested.
    """

    def __init__(self, history: History, setting: Setting, items: int) -> None:
        shard = history.shard
        self.history, self.setting, self.items = history, setting, items
        owner = np.repeat(np.arange(len(shard.users_U)), np.diff(shard.offsets))
        turn = np.r_[True, (np.diff(owner) != 0) | (np.diff(shard.time_s_N) != 0)]
        begin = np.flatnonzero(turn)
        end = np.r_[begin[1:], len(owner)]
        self.moment_N = turn.cumsum() - 1
        before = begin - shard.offsets[:-1][owner[begin]]
        usable = before > 0
        self.begin, self.end = begin[usable], end[usable]
        self.owner, self.before, self.number = owner[begin][usable], before[usable], np.flatnonzero(usable)
        counts_I = np.bincount(shard.item_N, minlength=items)
        self.negatives = Negatives(setting.log.negative_kind, counts_I)
        self._keys = np.unique(self.moment_N * items + shard.item_N)
        self._chosen = np.zeros(0, dtype=np.int64)

    def _held(self, moments: np.ndarray, items: np.ndarray) -> np.ndarray:
        keys = moments * self.items + items
        place = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.asarray(self._keys[place] == keys)

    def batch(self, judge: ContentJudge, step: int) -> TrainBatch:
        """The batch of a step: moments drawn alike."""
        shard, log = self.history.shard, self.setting.log
        random = seeded_numpy(self.setting.loop.seed, "moments", str(step))
        chosen = self._chosen = random.integers(len(self.begin), size=log.batch)
        size = self.end[chosen] - self.begin[chosen]
        place = np.floor(random.random((log.batch, self.setting.positives)) * size[:, None]).astype(np.int64)
        taken_UP = shard.item_N[self.begin[chosen][:, None] + place].astype(np.int64)
        bad = self.negatives.each(self.number[chosen], taken_UP, log.negatives, random, self._held)
        items_UC = torch.from_numpy(np.concatenate([taken_UP, bad], axis=1))
        items_ID = judge.embed_items()
        now_s = shard.time_s_N[self.begin[chosen]]
        users = shard.users_U[self.owner[chosen]]
        return TrainBatch(
            history=self.history.batch(users, self.before[chosen], now_s, items_ID),
            items_UC=items_UC,
            candidates_UCD=items_ID[items_UC.clamp_min(0)],
            positives=self.setting.positives,
            catalogue_ID=items_ID,
        )

    def rows(self) -> list[int]:
        return self._chosen.tolist()

    def state(self) -> dict[str, Any]:
        return {}

    def seek(self, state: dict[str, Any]) -> None:
        return None
