"""Search in PyTorch: blocks of lists of nearly one length, pieces of bounded size, one selection that settles ties too.

Legend: U people (lists), N behaviours, R rows (candidates), H width of the vectors, k behaviours wanted; inside a block
G lists, C rows a list, L behaviours a list.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from couturier.kernels.jagged import blocks

# Scores held at one time, unless a single list is longer: 1 MB as int64, so that selecting stays in a core's cache.
_PIECE = 1 << 17

_LOW = 0x7FFFFFFF


def search(
    queries_RH: Tensor,
    keys_NH: Tensor,
    offsets: Tensor,
    row_user: Tensor,
    k: int,
    cosine: bool,
    bias_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    rows = queries_RH.shape[0]
    index_Rk = torch.full((rows, k), -1, device=keys_NH.device)
    score_Rk = torch.full((rows, k), float("-inf"), dtype=queries_RH.dtype, device=keys_NH.device)
    for block in blocks(offsets, row_user, width=queries_RH.shape[1]):
        keys_GLH = _prepared(block.behaviours.take(keys_NH), cosine)
        bias_GL = None if bias_N is None else _wide(block.behaviours.take(bias_N))
        lists, length = keys_GLH.shape[:2]
        for row_GC in block.rows.index.split(max(1, _PIECE // (lists * length)), 1):
            queries_GCH = _prepared(queries_RH[row_GC], cosine)
            score_GCL = torch.bmm(queries_GCH, keys_GLH.transpose(1, 2))
            if bias_GL is not None:
                score_GCL += bias_GL[:, None]
            if block.behaviours.pad is not None:
                score_GCL.masked_fill_(block.behaviours.pad[:, None], float("-inf"))
            score, place = _select(score_GCL, min(k, length))
            index = torch.gather(block.behaviours.index[:, None].expand(-1, place.shape[1], -1), 2, place)
            index.masked_fill_(score == float("-inf"), -1)
            # Padding repeats a row of the list, so what is written twice is the same.
            at = row_GC.reshape(-1)
            index_Rk[at, : place.shape[2]] = index.flatten(0, 1)
            score_Rk[at, : place.shape[2]] = score.flatten(0, 1).to(score_Rk.dtype)
    return index_Rk, score_Rk


def _select(score_GCL: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores and their places, best first, of equals the later place first."""
    if score_GCL.dtype == torch.float64:
        score, place = score_GCL.flip(2).sort(dim=2, descending=True, stable=True)
        return score[..., :k], score_GCL.shape[2] - 1 - place[..., :k]
    # A float32 as an integer of the same order (its bits, all but the sign turned when negative), with the place below
    # it: no two are equal, so one selection settles the ties. Adding 0 turns -0 into 0, which equals it.
    bits = score_GCL.add_(0.0).view(torch.int32)
    order = (bits ^ ((bits >> 31) & _LOW)).long().bitwise_left_shift_(32)
    order |= torch.arange(score_GCL.shape[2], device=score_GCL.device)
    best = order.topk(k, dim=2).values
    place = best & 0xFFFFFFFF
    return torch.gather(score_GCL, 2, place), place


def _prepared(vectors: Tensor, cosine: bool) -> Tensor:
    return normalize(_wide(vectors), dim=-1, eps=torch.finfo(torch.float32).tiny) if cosine else _wide(vectors)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
