"""Causal attention by PyTorch's own: rows are padded on the right, where causality hides it. Any device and dtype.

Legend: U lists, N rows of all lists, L longest list, A heads, E width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q_NAE: Tensor, k_NAE: Tensor, v_NAE: Tensor, offsets: Tensor) -> Tensor:
    """``[N, A, E]``; lists of one length are not copied."""
    lengths_U = offsets.diff()
    users, longest = len(lengths_U), int(lengths_U.max())
    if users * longest == len(q_NAE):
        return _attended(*(one.unflatten(0, (users, longest)) for one in (q_NAE, k_NAE, v_NAE))).flatten(0, 1)
    users_N = torch.repeat_interleave(lengths_U, output_size=len(q_NAE))
    place_N = torch.arange(len(q_NAE), device=offsets.device) + (users_N * longest - offsets[users_N])
    boxes = (
        one.new_zeros(users * longest, *one.shape[1:]).index_copy(0, place_N, one).unflatten(0, (users, longest))
        for one in (q_NAE, k_NAE, v_NAE)
    )
    return _attended(*boxes).flatten(0, 1)[place_N]


def _attended(q_ULAE: Tensor, k_ULAE: Tensor, v_ULAE: Tensor) -> Tensor:
    q_UALE, k_UALE, v_UALE = (one.transpose(1, 2) for one in (q_ULAE, k_ULAE, v_ULAE))
    return F.scaled_dot_product_attention(q_UALE, k_UALE, v_UALE, is_causal=True).transpose(1, 2)
