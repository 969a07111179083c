"""What follows what: counted as a plain loop counts it, over shards, without what is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from couturier.components.data.formats import Windows
from couturier.components.interest.log import Log, write_log
from couturier.components.interest.transitions import Transitions, log_transitions, window_transitions

from .worlds.base import planted_log

ITEMS = 7


def histories(users: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(ITEMS, size=random.integers(1, 12)).tolist() for _ in range(users)]


def by_hand(lists: list[list[int]], holdout: int) -> torch.Tensor:
    table = torch.zeros(ITEMS, ITEMS)
    for taken in lists:
        kept = taken[: len(taken) - holdout] if holdout else taken
        for head, following in zip(kept[:-1], kept[1:], strict=True):
            table[head, following] += 1
    return table


def test_a_log_is_counted_shard_by_shard_without_its_holdout(tmp_path: Path) -> None:
    lists = histories(40)
    planted_log(tmp_path, lists, ITEMS)
    log: Log = write_log(
        tmp_path / "events.parquet", [f"i{i:06d}" for i in range(ITEMS)], tmp_path / "s", rows_per_shard=30
    )
    assert log.shards > 4
    for holdout in (0, 2):
        found = log_transitions(log, holdout=holdout)
        assert torch.equal(found.dense(torch.arange(ITEMS)), by_hand(lists, holdout))


def test_chosen_rows_may_repeat_and_be_empty() -> None:
    found = Transitions.counted([(np.array([4, 4]), np.array([1, 1])), (np.array([4]), np.array([0]))], items=ITEMS)
    rows = found.dense(torch.tensor([4, 2, 4]))
    assert rows[0].tolist() == [1, 2, 0, 0, 0, 0, 0] and torch.equal(rows[0], rows[2]) and not rows[1].any()
    assert found.dense(torch.zeros(0, dtype=torch.int64)).shape == (0, ITEMS)


def test_windows_give_the_newest_item_before_each_basket() -> None:
    windows = Windows(
        users=["u"],
        user_W=np.zeros(3, dtype=np.int32),
        time_W=np.arange(3, dtype=np.int64),
        favourites_WK=np.full((3, 2), -1, dtype=np.int32),
        weight_WK=np.zeros((3, 2), dtype=np.float32),
        age_days_WK=np.zeros((3, 2), dtype=np.float32),
        recent_WK=np.array([[3, 1], [-1, -1], [0, 3]], dtype=np.int32),
        basket=np.array([1, 1, 2, 5, 4], dtype=np.int32),
        basket_offsets=np.array([0, 3, 4, 5]),
        future=np.zeros(0, dtype=np.int32),
        future_offsets=np.zeros(4, dtype=np.int64),
    )
    found = window_transitions(windows, items=ITEMS).dense(torch.arange(ITEMS))
    assert found[3].tolist() == [0, 2, 1, 0, 0, 0, 0] and found[0, 4] == 1 and found.sum() == 4
