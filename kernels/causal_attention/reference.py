"""Causal attention as its definition says, list by list and head by head, in float64. For tests.

Legend: U lists, N rows of all lists, T rows of one, A heads, E width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q_NAE: Tensor, k_NAE: Tensor, v_NAE: Tensor, offsets: Tensor) -> Tensor:
    """``[N, A, E]`` in the dtype of the queries."""
    q, k, v = (one.double() for one in (q_NAE, k_NAE, v_NAE))
    lists = []
    for low, high in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        ahead_TT = torch.ones(high - low, high - low, dtype=torch.bool, device=q.device).triu(1)
        heads = []
        for a in range(q.shape[1]):
            score_TT = q[low:high, a] @ k[low:high, a].T / q.shape[2] ** 0.5
            heads.append(score_TT.masked_fill(ahead_TT, -torch.inf).softmax(-1) @ v[low:high, a])
        lists.append(torch.stack(heads, 1))
    return (torch.cat(lists) if lists else q).to(q_NAE.dtype)
