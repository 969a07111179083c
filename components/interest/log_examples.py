"""Training examples streamed from a log: a user's newest behaviours before a moment, and what came then.

    shards, shuffled ─▶ a few at a time in memory ─▶ their (user, moment) pairs, shuffled ─▶ batches

Memory holds ``buffer_shards`` shards, whatever the length of the log, and an epoch reads each shard once, so the cost
of a fit grows with the events and no faster. A sequence judge (``every_position``) learns from every place of a
history, so for it a user's log is cut into pieces of that length instead of one example an event.

Letters: U users of a batch, P positives, C candidates, H history length, I items, S pool, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.log import Log, Shard
from couturier.components.interest.sampling import Kind, Negatives
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.interest.window_examples import share_of
from couturier.components.runtime import seeded_numpy
from couturier.components.together import rank, world

_DAY_S = 86_400.0
_NOTHING = "no user has two events before the last {holdout}: nothing to learn from. Add events or lower log.holdout."


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is cut out of a log."""

    batch: int = 128
    """Histories a step."""
    history: int = 50
    """H, how many of the newest behaviours a history holds at most."""
    negatives: int = 4
    """Candidates of an example that were not taken."""
    negative_kind: Kind = "popularity"
    """How they are drawn: uniform, popularity or in_batch."""
    pool: int = 0
    """S, negatives shared by a batch, for judges with a sampled softmax; 0 for none, -1 for the whole catalogue."""
    holdout: int = 2
    """Each user's last events, which are for validation and test and are never trained on."""
    buffer_shards: int = 8
    """Shards in memory at a time; examples are shuffled among them."""

    def __post_init__(self) -> None:
        for name in ("batch", "history", "negatives", "buffer_shards"):
            if vars(self)[name] < 1:
                raise ConfigError(f"log.{name} is {vars(self)[name]}; it must be at least 1.")
        if self.holdout < 0 or self.pool < -1:
            raise ConfigError(f"log.holdout is {self.holdout} and log.pool {self.pool}; wanted >= 0 and >= -1.")


def moments(shard: Shard, *, holdout: int, history: int, pieces: bool) -> tuple[np.ndarray, np.ndarray]:
    """``(user index, event index)`` of each example of a shard: the event is what is taken, what is before it known.

    With ``pieces`` a user's events are cut from the newest backwards into pieces of ``history + 1``.
    """
    lengths_U = np.diff(shard.offsets) - holdout
    if pieces:
        count_U = np.maximum(0, -(-(lengths_U - 1) // history))
        owner = np.repeat(np.arange(len(lengths_U)), count_U)
        back = np.arange(len(owner)) - np.repeat(count_U.cumsum() - count_U, count_U)
        return owner, shard.offsets[:-1][owner] + lengths_U[owner] - 1 - back * history
    count_U = np.maximum(0, lengths_U - 1)
    owner = np.repeat(np.arange(len(lengths_U)), count_U)
    place = np.arange(len(owner)) - np.repeat(count_U.cumsum() - count_U, count_U)
    return owner, shard.offsets[:-1][owner] + 1 + place


def history_rows(begin_U: np.ndarray, target_U: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """``(event index [N], offsets [U + 1])`` of the newest ``limit`` events from ``begin_U`` before ``target_U``."""
    first_U = np.maximum(begin_U, target_U - limit)
    lengths_U = target_U - first_U
    offsets = np.concatenate([[0], lengths_U.cumsum()]).astype(np.int64)
    return np.arange(offsets[-1]) + np.repeat(first_U - offsets[:-1], lengths_U), offsets


def history_of(
    shard: Shard, rows_N: np.ndarray, offsets: np.ndarray, now_s_U: np.ndarray, items_ID: torch.Tensor
) -> HistoryBatch:
    """A judge's history out of events of a shard."""
    items_N = torch.from_numpy(shard.item_N[rows_N].astype(np.int64))
    age_N = (np.repeat(now_s_U, np.diff(offsets)) - shard.time_s_N[rows_N]) / _DAY_S
    return HistoryBatch(
        features_ND=items_ID.index_select(0, items_N),
        age_days_N=torch.from_numpy(age_N.astype(np.float32)),
        weight_N=torch.ones(len(rows_N)),
        offsets=torch.from_numpy(offsets),
        kind_N=torch.from_numpy(shard.kind_N[rows_N].astype(np.int64)),
        value_N=torch.from_numpy(shard.value_N[rows_N].astype(np.float32)),
        items_N=items_N,
        in_time_order=True,
    )


class LogExamples:
    """Feeds a fit from a log, epoch after epoch.

    Args:
        pieces: whether to cut a user's log into pieces (for ``every_position`` judges).

    Raises:
        DataError: no user has two events before the holdout.
    """

    def __init__(self, config: LogConfig, log: Log, *, pieces: bool, seed: int) -> None:
        self.config, self.log, self.pieces, self.seed = config, log, pieces, seed
        self.counts_I = log.counts(config.holdout)
        if not self.counts_I.sum():
            raise DataError(_NOTHING.format(holdout=config.holdout))
        self.negatives = Negatives(config.negative_kind, self.counts_I)
        self.epoch, self.group, self.place = 0, 0, 0
        self._loaded: tuple[int, int] | None = None
        self._rows: list[int] = []
        self._empty_groups = 0

    @property
    def groups(self) -> int:
        """How many times shards are read in an epoch."""
        return -(-self.log.shards // self.config.buffer_shards)

    def rows(self) -> list[int]:
        """The users of the last batch."""
        return self._rows

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "group": self.group, "place": self.place}

    def seek(self, state: dict[str, Any]) -> None:
        self.epoch, self.group, self.place = state["epoch"], state["group"], state["place"]

    def batch(self, judge: ContentJudge, step: int) -> TrainBatch:
        """The next batch; this process's share of it under ``torchrun``."""
        config, chosen = self.config, self._next()
        users_U, target_U = self.owner[chosen], self.target[chosen]
        random = seeded_numpy(self.seed, "log", str(step))
        shard = self.shard
        rows_N, offsets = history_rows(shard.offsets[:-1][users_U], target_U, config.history)
        taken_U1 = shard.item_N[target_U][:, None].astype(np.int64)
        bad_UN = self.negatives.each(users_U, taken_U1, config.negatives, random, self._held)
        items_UC = torch.from_numpy(np.concatenate([taken_U1, bad_UN], axis=1))
        items_ID = judge.embed_items()
        self._rows = shard.users_U[users_U].tolist()
        pool = self._pool(random)
        whole = TrainBatch(
            history=history_of(shard, rows_N, offsets, shard.time_s_N[target_U], items_ID),
            items_UC=items_UC,
            candidates_UCD=items_ID[items_UC.clamp_min(0)],
            positives=1,
            pool_S=pool,
            pool_log_q_S=None if pool is None else self._log_q(pool),
            catalogue_ID=items_ID,
        )
        return share_of(whole, rank(), world())

    def _pool(self, random: np.random.Generator) -> torch.Tensor | None:
        if self.config.pool == 0:
            return None
        if self.config.pool < 0:
            return torch.arange(self.log.items)
        return torch.from_numpy(self.negatives.pool(self.config.pool, random).astype(np.int64))

    def _log_q(self, pool: torch.Tensor) -> torch.Tensor:
        if self.config.pool < 0:
            return torch.zeros(len(pool))
        return torch.from_numpy(self.negatives.log_q(pool.numpy(), self.config.pool))

    def _held(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        keys = users * self.log.items + items
        place = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.asarray(self._keys[place] == keys)

    def _next(self) -> np.ndarray:
        """Indices of the examples of the next batch, reading the next shards when these are used up."""
        while True:
            self._load()
            begin = self.place
            size = min(self.config.batch, len(self.order))
            if size and begin + size <= len(self.order):
                self.place, self._empty_groups = begin + size, 0
                return self.order[begin : begin + size]
            self._empty_groups += size == 0
            if self._empty_groups > self.groups:
                raise DataError(_NOTHING.format(holdout=self.config.holdout))
            self.group, self.place = self.group + 1, 0
            if self.group == self.groups:
                self.epoch, self.group = self.epoch + 1, 0

    def _load(self) -> None:
        """Bring the shards of this group into memory, with their examples in this epoch's order."""
        if self._loaded == (self.epoch, self.group):
            return
        shuffle = seeded_numpy(self.seed, "log", "epoch", str(self.epoch))
        shards = shuffle.permutation(self.log.shards)[self.group * self.config.buffer_shards :][
            : self.config.buffer_shards
        ]
        self.shard = Shard.joined([self.log.shard(int(index)) for index in sorted(shards)])
        self.owner, self.target = moments(
            self.shard, holdout=self.config.holdout, history=self.config.history, pieces=self.pieces
        )
        shuffle = seeded_numpy(self.seed, "log", "epoch", str(self.epoch), "group", str(self.group))
        self.order = shuffle.permutation(len(self.owner))
        users_N = np.repeat(np.arange(len(self.shard.users_U)), np.diff(self.shard.offsets))
        seen = np.arange(len(users_N)) < self.shard.offsets[1:][users_N] - self.config.holdout
        self._keys = np.unique(users_N[seen] * self.log.items + self.shard.item_N[seen])
        self._loaded = (self.epoch, self.group)
