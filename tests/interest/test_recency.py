"""Where a behaviour stands in time: positions whatever the order of the rows, and intervals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from couturier.components.errors import ConfigError
from couturier.components.interest.recency import check_time, positions, time_index
from couturier.components.interest.types import HistoryBatch

AGES = torch.tensor([3.0, 0.5, 40.0, 3.0, 7.0])
HISTORY = HistoryBatch(
    features_ND=torch.zeros(5, 1), age_days_N=AGES, weight_N=torch.ones(5), offsets=torch.tensor([0, 4, 4, 5])
)


def test_the_newest_is_one_and_rows_stay_where_they_stand() -> None:
    assert positions(HISTORY).tolist() == [3, 1, 4, 2, 1]


def test_positions_agree_with_a_history_put_in_order() -> None:
    ordered = HISTORY.oldest_first()
    assert positions(ordered).tolist() == [4, 3, 2, 1, 1]
    assert positions(replace(ordered, in_time_order=False)).tolist() == positions(ordered).tolist()


def test_what_is_older_than_the_table_is_in_its_last_row() -> None:
    assert time_index(HISTORY, "position", 4).tolist() == [3, 1, 3, 2, 1]
    by_interval = time_index(HISTORY, "interval", 8)
    assert by_interval.max() == 7 and by_interval.min() >= 1
    assert time_index(HistoryBatch.empty(users=2, width=1), "position", 4).tolist() == []


def test_another_measure_of_time_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"judge\.tin\.time is 'moon'"):
        check_time("judge.tin.time", "moon")
