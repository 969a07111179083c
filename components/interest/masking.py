"""Histories with some behaviours left out at random, as a loss may want them; all chance comes from its ``noise``.

Letters: U users, N history rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from couturier.components.interest.types import HistoryBatch


def kept(history: HistoryBatch, keep_N: Tensor) -> HistoryBatch:
    """Only the rows where ``keep_N`` is True; users stay, some perhaps with nothing.

    Example:
        >>> two = HistoryBatch(
        ...     features_ND=torch.zeros(3, 1), age_days_N=torch.zeros(3), weight_N=torch.ones(3),
        ...     offsets=torch.tensor([0, 2, 3]),
        ... )
        >>> kept(two, torch.tensor([True, True, False])).lengths.tolist()
        [2, 0]
    """
    total = torch.cat([keep_N.new_zeros(1, dtype=torch.int64), keep_N.cumsum(0)])
    return history.rows(keep_N.nonzero()[:, 0], total[history.offsets])


def thinned(history: HistoryBatch, share: float, noise: torch.Generator) -> HistoryBatch:
    """Each row left out with probability ``share``."""
    drawn_N = torch.rand(len(history.features_ND), generator=noise, device=noise.device)
    return kept(history, (drawn_N >= share).to(history.offsets.device))


def with_strangers(history: HistoryBatch, share: float, noise: torch.Generator) -> HistoryBatch:
    """Each user's whole history left out with probability ``share``: a judge learns what to say of strangers."""
    drawn_U = torch.rand(len(history), generator=noise, device=noise.device)
    return kept(history, (drawn_U >= share).to(history.offsets.device)[history.users_N])
