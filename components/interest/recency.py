"""Where a behaviour stands in time, seen from the candidate: by position or by time interval, as an index of a table.

Letters: N history rows, U users.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from couturier.components.errors import ConfigError
from couturier.components.interest.layers import time_bucket
from couturier.components.interest.types import HistoryBatch

Time = Literal["position", "interval"]


def check_time(setting: str, value: str) -> None:
    """Raises:
    ConfigError: neither ``position`` nor ``interval``.
    """
    if value not in get_args(Time):
        raise ConfigError(f"{setting} is {value!r}; choose one of {', '.join(get_args(Time))}.")


def positions(history: HistoryBatch) -> Tensor:
    """int64 ``[N]``: 1 for each user's newest row, 2 for the one before it, and so on; rows stay where they stand.

    Of rows of the same age the later one is the newer.

    Example:
        >>> history = HistoryBatch(
        ...     features_ND=torch.zeros(4, 1),
        ...     age_days_N=torch.tensor([5.0, 9.0, 1.0, 0.0]),
        ...     weight_N=torch.ones(4),
        ...     offsets=torch.tensor([0, 3, 4]),
        ... )
        >>> positions(history).tolist()
        [2, 3, 1, 1]
    """
    users_N = history.users_N
    place_N = torch.arange(len(users_N), device=users_N.device)
    if history.in_time_order:
        return history.offsets[1:][users_N] - place_N
    oldest_first = history.age_days_N.argsort(descending=True, stable=True)
    order = oldest_first[users_N[oldest_first].argsort(stable=True)]
    out_N = torch.empty_like(place_N)
    out_N[order] = history.offsets[1:][users_N] - place_N
    return out_N


def time_index(history: HistoryBatch, by: Time, rows: int) -> Tensor:
    """int64 ``[N]`` between 1 and ``rows - 1``: rows of a table whose row 0 is the candidate's own, "now".

    ``position`` is 1 for the newest behaviour (Zhou et al., arXiv 2308.08487; its table has 431 rows); ``interval`` is
    1 plus the time bucket of the age (``layers.time_bucket``). What is older than the table is in its last row.
    """
    if by == "position":
        return positions(history).clamp(max=rows - 1)
    return 1 + time_bucket(history.age_days_N, rows - 1)
