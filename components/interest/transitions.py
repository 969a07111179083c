"""How often one item follows another in training data: a sparse table, counted a shard at a time.

Letters: I items, N pairs that occur, M chosen heads, S chosen columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from couturier.components.data.formats import Windows
from couturier.components.interest.log import Log


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """Item ``i`` was followed by ``next_N[n]`` ``count_N[n]`` times, ``n`` from ``offsets[i]`` to ``offsets[i + 1]``.

    Example:
        >>> found = Transitions.counted([(np.array([0, 0, 2]), np.array([1, 1, 0]))], items=3)
        >>> found.dense(torch.tensor([0, 1])).tolist()
        [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    """

    offsets: Tensor
    next_N: Tensor
    count_N: Tensor

    @classmethod
    def counted(cls, parts: Iterable[tuple[np.ndarray, np.ndarray]], *, items: int) -> Transitions:
        """Count ``(item, next item)`` rows, given a part at a time; memory holds the distinct pairs, not the rows."""
        keys_N, count_N = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        for head, following in parts:
            new, often = np.unique(head.astype(np.int64) * items + following, return_counts=True)
            keys_N, place = np.unique(np.concatenate([keys_N, new]), return_inverse=True)
            count_N = np.bincount(place, weights=np.concatenate([count_N, often]), minlength=len(keys_N))
        offsets = np.searchsorted(keys_N, np.arange(items + 1) * items)
        return cls(
            offsets=torch.from_numpy(offsets.astype(np.int64)),
            next_N=torch.from_numpy(keys_N % items),
            count_N=torch.from_numpy(count_N.astype(np.float32)),
        )

    @property
    def items(self) -> int:
        """I."""
        return self.offsets.numel() - 1

    def dense(self, heads_M: Tensor) -> Tensor:
        """Counts ``[M, I]`` of what followed each head; one may stand there twice."""
        lengths_M = self.offsets.diff()[heads_M]
        owner = torch.repeat_interleave(torch.arange(len(heads_M)), lengths_M)
        begin = lengths_M.cumsum(0) - lengths_M
        rows = torch.arange(len(owner)) + (self.offsets[heads_M] - begin)[owner]
        out_MI = self.count_N.new_zeros(len(heads_M), self.items)
        out_MI[owner, self.next_N[rows]] = self.count_N[rows]
        return out_MI


def log_transitions(log: Log, *, holdout: int) -> Transitions:
    """Consecutive events of each user, the last ``holdout`` left out; a shard is read at a time."""

    def parts() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for index in range(log.shards):
            shard = log.shard(index)
            owner = np.repeat(np.arange(len(shard.users_U)), np.diff(shard.offsets))
            followed = np.arange(len(owner)) + 1 < shard.offsets[1:][owner] - holdout
            place = np.flatnonzero(followed)
            yield shard.item_N[place], shard.item_N[place + 1]

    return Transitions.counted(parts(), items=log.items)


def window_transitions(windows: Windows, *, items: int) -> Transitions:
    """From the item of each window that was taken last to all of its next basket; windows keep no more order."""
    last_W = windows.recent_WK[:, 0] if windows.recent_WK.shape[1] else np.full(len(windows), -1)
    head = np.repeat(last_W, np.diff(windows.basket_offsets))
    known = head >= 0
    return Transitions.counted([(head[known], windows.basket[known])], items=items)
