"""Search by its definition: score everything, sort everything, row by row. Slow; the specification for the others.

Legend: U people (lists), N behaviours, R rows (candidates), H width of the vectors, k behaviours wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def search(
    queries_RH: Tensor,
    keys_NH: Tensor,
    offsets: Tensor,
    row_user: Tensor,
    k: int,
    cosine: bool,
    bias_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Index ``[R, k]`` (-1: none) and score ``[R, k]`` (-inf: none), best first, of equals the newest first."""
    index_Rk = torch.full((queries_RH.shape[0], k), -1)
    score_Rk = torch.full((queries_RH.shape[0], k), float("-inf"), dtype=queries_RH.dtype)
    for row, user in enumerate(row_user.tolist()):
        first, after = offsets[user].item(), offsets[user + 1].item()
        query, keys = _wide(queries_RH[row]), _wide(keys_NH[first:after])
        score = keys @ query
        if cosine:
            norms = keys.norm(dim=1) * query.norm()
            score = torch.where(norms > 0, score / norms, 0.0)
        if bias_N is not None:
            score = score + _wide(bias_N[first:after])
        # Sorting is stable: with the newest first, the newest of equals stays first.
        best, place = score.flip(0).sort(descending=True, stable=True)
        found = min(k, int((best > float("-inf")).sum()))
        index_Rk[row, :found] = int(after) - 1 - place[:found]
        score_Rk[row, :found] = best[:found].to(score_Rk.dtype)
    return index_Rk.to(keys_NH.device), score_Rk.to(keys_NH.device)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
