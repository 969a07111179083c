"""The definition of linear attention, twice: as the recurrence, token by token, and as the masked square. For tests.

Legend: N tokens of all sequences, U sequences, T tokens of one, H heads, D width of keys, E width of values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention(
    q_NHD: Tensor,
    k_NHD: Tensor,
    v_NHE: Tensor,
    slopes_H: Tensor,
    state_UHDE: Tensor,
    offsets: Tensor,
    length: int | None = None,
    chunk: int = 1,
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(-slope) S_(t-1) + k_t v_t^T`` and ``o_t = S_t^T q_t``, one token after the other.

    ``length`` and ``chunk`` are hints to the fast paths, not used here.

    Returns:
        ``[N, H, E]`` and the states after the last tokens, ``[U, H, D, E]``. Differentiable.
    """
    lam_H11 = torch.exp(-slopes_H).to(state_UHDE.dtype)[:, None, None]
    outs, states = [], []
    for u, (low, high) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        state_HDE = state_UHDE[u]
        for t in range(low, high):
            q_HD, k_HD, v_HE = (x[t].to(state_HDE.dtype) for x in (q_NHD, k_NHD, v_NHE))
            state_HDE = lam_H11 * state_HDE + k_HD[:, :, None] * v_HE[:, None]
            outs.append((state_HDE * q_HD[:, :, None]).sum(1))
        states.append(state_HDE)
    out = torch.stack(outs).to(v_NHE.dtype) if outs else v_NHE.clone()
    return out, torch.stack(states) if states else state_UHDE.clone()


def quadratic(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHE: Tensor, slopes_H: Tensor) -> Tensor:
    """``o_t = sum over j <= t of exp(-slope (t - j)) (q_t . k_j) v_j``: all pairs, O(T^2). What others write."""
    t = torch.arange(q_BTHD.shape[1], device=q_BTHD.device)
    apart_TT = t[:, None] - t
    decay_HTT = torch.exp(-slopes_H[:, None, None] * apart_TT.clamp_min(0)) * (apart_TT >= 0)
    scores_BHTT = torch.einsum("bthd,bjhd->bhtj", q_BTHD, k_BTHD) * decay_HTT.to(q_BTHD.dtype)
    return torch.einsum("bhtj,bjhe->bthe", scores_BHTT, v_BTHE)
