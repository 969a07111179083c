"""What is taken after what: how much oftener an item is in the next basket of those who have another in their history.

    lift[i, j] = log( (n(i, j) + s p(j)) / (n(i) + s) / p(j) )

``n(i)`` windows have item i among their favourites, in ``n(i, j)`` of them j is in the next basket, and ``p(j)`` is the
share of all windows with it: association rules' lift, shrunk towards none by ``s`` imagined windows.

Legend: U windows, I items, K favourites, R recent items.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from couturier.components.alignment.rewards import membership
from couturier.components.data.formats import Windows

COLUMNS = ("follows", "follows best", "follows recent", "recent")
SHRINKAGE = 20.0
_CHUNK = 1024


def lift(windows: Windows, rows: np.ndarray, items: int) -> Tensor:
    """``[I, I]`` from some windows; an item says nothing of itself."""
    both_II, had_I, taken_I = torch.zeros(items, items), torch.zeros(items), torch.zeros(items)
    for start in range(0, len(rows), _CHUNK):
        some = rows[start : start + _CHUNK]
        history_UI = membership(list(windows.favourites_WK[some]), items).float()
        basket_UI = membership([windows.basket_of(row) for row in some], items).float()
        both_II += history_UI.T @ basket_UI
        had_I += history_UI.sum(0)
        taken_I += basket_UI.sum(0)
    p_I = (taken_I + 0.5) / max(len(rows), 1)
    found_II = ((both_II + SHRINKAGE * p_I) / (had_I[:, None] + SHRINKAGE) / p_I).log()
    return found_II.fill_diagonal_(0)


def columns(windows: Windows, rows: np.ndarray, lift_II: Tensor) -> Tensor:
    """``[U, I, 4]``: the history's mean lift of each item, by weight; its largest; the recent items' mean, the newest
    counting most; and one over the item's place among the recent ones, 0 for others."""
    favourites_UK = torch.from_numpy(windows.favourites_WK[rows].astype(np.int64))
    recent_UR = torch.from_numpy(windows.recent_WK[rows].astype(np.int64))
    weight_UK = torch.from_numpy(windows.weight_WK[rows]).float().clamp_min(0).log1p() * (favourites_UK >= 0)
    place_UR = (1 / torch.arange(1, recent_UR.shape[1] + 1)) * (recent_UR >= 0)
    each_UKI = lift_II[favourites_UK.clamp_min(0)]
    best_UI = each_UKI.masked_fill((favourites_UK < 0)[..., None], float("-inf")).amax(1)
    recent_UI = torch.zeros(len(rows), len(lift_II)).scatter_add_(1, recent_UR.clamp_min(0), place_UR)
    return torch.stack(
        [
            _mean(each_UKI, weight_UK),
            best_UI.where(best_UI.isfinite(), torch.zeros(())),
            _mean(lift_II[recent_UR.clamp_min(0)], place_UR),
            recent_UI,
        ],
        -1,
    )


def _mean(values_UKI: Tensor, weight_UK: Tensor) -> Tensor:
    return torch.einsum("uk,uki->ui", weight_UK / weight_UK.sum(1, keepdim=True).clamp_min(1e-6), values_UKI)
