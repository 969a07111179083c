"""How far each token looks back, and how much later tokens look at it: statistics of causal attention, without its map.

Windowed average attention distance (WAAD), future attention influence (FAI) and span, of each head, after "Attention
Illuminates LLM Reasoning" (arXiv 2510.13554). All three are linear in the attention map, so a blocked pass over q and k
gives them and keeps nothing of size rows times keys. Called by ``couturier.components.alignment.credit``. Formula, cost
and limits: ``README.md`` here.

Legend: B sequences, H heads, G key heads (H a multiple of G), R rows (queries), S keys, d width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.checks import KernelError, check_axes, check_floats, check_index

__all__ = ["AttentionStats", "attention_stats"]


class AttentionStats(NamedTuple):
    """What :func:`attention_stats` found: float32, or float64 where q is float64."""

    waad_BHR: Tensor
    """Mean distance that a row looks back, in tokens, each distance counted as ``window`` at most."""
    span_BHR: Tensor
    """Mean distance that a row looks back, in tokens."""
    influence_BHS: Tensor
    """FAI: mean attention that a key gets from the rows ``near`` to ``far`` tokens after it; 0 where there is none."""


@torch.no_grad()
def attention_stats(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    start: Tensor | None = None,
    scale: float | None = None,
    window: int = 10,
    near: int = 10,
    far: int | None = 50,
) -> AttentionStats:
    """WAAD, span and FAI of causal softmax attention whose rows are the last R of S tokens.

    Row r stands at token ``t = S - R + r`` and sees the keys ``start <= s <= t`` with the weight
    ``A[r, s] = exp(scale q_r . k_s - lse_r)``. Then ``waad_r = sum_s A[r, s] min(t - s, window)``,
    ``span_r = sum_s A[r, s] (t - s)``, and ``influence_s`` is the mean of ``A[r, s]`` over the rows with
    ``s + near <= t <= s + far`` (arXiv 2510.13554, from a card on the paper; positions are rotated before the call).
    There is no backward: these are weights of a loss, never part of it.

    Args:
        q: ``[B, H, R, d]``.
        k: ``[B, G, S, d]``; head h reads key head ``h // (H // G)``, as in grouped-query attention.
        lse: ``[B, H, R]``, float32 or float64: log of the sum of ``exp(scale q_r . k_s)`` over what the row sees, if an
            attention kernel left it; None computes it.
        start: int64 ``[B]``, the first key that counts (left padding before it); None for 0. A row before it gets 0.
        scale: of the products; None for ``d ** -0.5``.
        window: tokens, 1 or more.
        near, far: tokens, ``0 <= near <= far``; far None reaches to the last row.

    Raises:
        KernelError: shapes or settings that do not fit together.
        KernelTypeError: a wrong dtype, or dtypes that differ.
        BackendError: a backend was forced that cannot run this call.

    Example:
        >>> q, k = torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1)  # every token looks evenly at all it can see
        >>> found = attention_stats(q, k, window=1, near=1, far=2)
        >>> found.waad_BHR.flatten().tolist(), found.span_BHR.flatten().tolist()
        ([0.0, 0.5, 0.6666666865348816], [0.0, 0.5, 1.0])
        >>> [round(one, 4) for one in found.influence_BHS.flatten().tolist()]  # token 0: mean of 1/2 and 1/3
        [0.4167, 0.3333, 0.0]
    """
    check_floats(q=q, k=k)
    sizes = check_axes(q=(q, "B H R d"), k=(k, "B G S d"))
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise KernelError(f"q has {sizes['H']} heads, k has {sizes['G']}; wanted a multiple")
    if sizes["R"] > sizes["S"]:
        raise KernelError(f"q has {sizes['R']} rows, k {sizes['S']} keys; rows are the last tokens, so wanted no more")
    far = sizes["S"] if far is None else far
    if window < 1:
        raise KernelError(f"window is {window}; wanted 1 or more")
    if not 0 <= near <= far:
        raise KernelError(f"near is {near} and far {far}; wanted 0 <= near <= far")
    _check_optional(q, sizes, lse, start)
    scale = sizes["d"] ** -0.5 if scale is None else scale
    run = dispatch.implementation("attention_stats", q, uncovered=_uncovered(q))
    # Distances in 16 bits would be off by whole tokens.
    with torch.autocast(q.device.type, enabled=False):
        return AttentionStats(*run.stats(q.detach(), k.detach(), lse, start, scale, window, near, far))


def _check_optional(q: Tensor, sizes: dict[str, int], lse: Tensor | None, start: Tensor | None) -> None:
    for name, tensor, axes in (("lse", lse, "B H R"), ("start", start, "B")):
        if tensor is None:
            continue
        check_axes(sizes, **{name: (tensor, axes)})
        if tensor.device != q.device:
            raise KernelError(f"{name} is on {tensor.device}, but q is on {q.device}; move one of them")
    if lse is not None:
        check_floats(lse=lse)
    if start is not None:
        check_index(start, sizes["S"] + 1, name="start", of="the keys, or one beyond for nothing")


def _uncovered(q: Tensor) -> str | None:
    """Why the Triton kernels do not cover this call: they want a head's width in one tile, and no float64."""
    if q.dtype == torch.float64:
        return "float64"
    return f"heads wider than 128 (d = {q.shape[3]})" if q.shape[3] > 128 else None
