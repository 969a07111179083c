"""Causal attention within lists of unlike length: a row reads those of its list that are not later than itself.

What a sequence judge does with histories of many people in one batch. ``README.md`` beside this file has the formula,
the backward and the costs.

Legend: U people (lists), N rows of all people, A heads, E width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.causal_attention import native, reference, torch_impl
from couturier.kernels.checks import KernelError, check_axes, check_floats, check_offsets

__all__ = ["causal_attention"]


def causal_attention(q_NAE: Tensor, k_NAE: Tensor, v_NAE: Tensor, offsets: Tensor) -> Tensor:
    """``out_i = sum_(j <= i) softmax_j(q_i . k_j / sqrt(E)) v_j`` over the rows of one's own list, head by head.

    Args:
        q_NAE, k_NAE, v_NAE: queries, keys and values of all lists, one after another, from the oldest to the newest.
        offsets: int64 ``[U + 1]``: list u has the rows ``[offsets[u], offsets[u + 1])``.

    Returns:
        ``[N, A, E]``. Differentiable (once) in every tensor. Under autocast all tensors take its dtype first, as in a
        matrix product.

    Raises:
        KernelError: shapes or offsets that do not fit together.
        KernelTypeError: a wrong dtype, or dtypes that differ.

    Example:
        >>> values = torch.tensor([1.0, 3.0, 5.0])[:, None, None]
        >>> causal_attention(torch.zeros(3, 1, 1), torch.zeros(3, 1, 1), values, torch.tensor([0, 2, 3])).flatten()
        tensor([1., 2., 5.])
    """
    if (dtype := dispatch.autocast_dtype(q_NAE)) is not None:
        q_NAE, k_NAE, v_NAE = (one.to(dtype) for one in (q_NAE, k_NAE, v_NAE))
    check_floats(q=q_NAE, k=k_NAE, v=v_NAE)
    sizes = check_axes(q=(q_NAE, "N A E"), k=(k_NAE, "N A E"), v=(v_NAE, "N A E"))
    check_offsets(offsets, sizes["N"], of="q")
    if not sizes["A"] or not sizes["E"]:
        raise KernelError(f"q [N, A, E] has shape {tuple(q_NAE.shape)}; wanted a head and a width of 1 at least")
    if not sizes["N"]:
        # Nothing, but with a gradient.
        return q_NAE + k_NAE + v_NAE
    with torch.autocast(q_NAE.device.type, enabled=False):
        if native.covers(q_NAE):
            return native.attend(q_NAE, k_NAE, v_NAE, offsets)
        run = reference if dispatch.wish() == "reference" else torch_impl
        return run.attend(q_NAE, k_NAE, v_NAE, offsets)
