"""The next code of every sample, drawn in one compiled call: guidance, softmax, and a point in its running sums.

    mixed = without + guidance (with - without)      p = softmax(mixed / temperature)
    code  = the first k with p_0 + .. + p_k > point

A sampled batch of a small model draws a hundred times, and each draw is some thirty PyTorch calls over a few thousand
numbers, for which threads that sample side by side wait for each other. The points are those of systematic sampling
(Madow 1949): the m samples of a user that have all codes in common so far take (v + rank / m) mod 1 with one fresh v.

The caller has the same in PyTorch's calls, for any device, for top-k and top-p, and where there is no compiler.

Legend: U users, n samples, K codes (the codebook).
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from couturier.kernels import compiled, dispatch

_LANES = 16
# Logits of a draw from which on a call is worth a compiler.
_LEAST = 1 << 12


class _Draw(ctypes.Structure):
    """``Draw`` of ``draw.c``."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("users", "samples", "codes"),
                *("user_step", "fresh_step", "fresh_user_step", "out_step", "out_user_step"),
            )
        ),
        *((name, ctypes.c_void_p) for name in ("with_", "without", "fresh", "alike", "out")),
        *((name, ctypes.c_float) for name in ("guidance", "rate")),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The function of ``draw.c``; None where it cannot be compiled."""
    found = compiled.library("systematic_draw/draw.c")
    if found is not None:
        found.draw.restype = ctypes.c_int64
    return found


def covers(logits: Tensor) -> bool:
    """Whether draws from such logits ``[..., K]`` can run here: float32 on a CPU with a C compiler, whole vectors."""
    if dispatch.wish() != "auto" or logits.device.type != "cpu" or logits.dtype != torch.float32:
        return False
    return logits.shape[-1] % _LANES == 0 and logits.numel() >= _LEAST and library() is not None


def draw(
    logits_BUnK: Tensor,
    fresh_Un: Tensor,
    alike_Unn: Tensor | None,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, int]:
    """Codes int64 ``[U, n]``, and how many pairs of samples are still alike (each with itself among them).

    Args:
        logits_BUnK: float32; of a second row without the condition, whose first dimension is then 2.
        fresh_Un: float64 numbers in [0, 1).
        alike_Unn: bool, which samples of a user have all codes in common so far; changed in place. None: each sample's
            own number decides.
        temperature: above 0.

    Raises:
        RuntimeError: :func:`covers` would have said no.
    """
    found = library()
    if found is None:
        raise RuntimeError("draws cannot be compiled here; ask covers() first.")
    branches, users, n, codes = logits_BUnK.shape
    logits = logits_BUnK if logits_BUnK.stride()[2:] == (codes, 1) else logits_BUnK.contiguous()
    out_Un, scratch = torch.empty(users, n, dtype=torch.int64), logits.new_empty(codes)
    assert fresh_Un.dtype == torch.float64
    assert alike_Unn is None or (alike_Unn.is_contiguous() and alike_Unn.dtype == torch.bool)
    with_ = logits.data_ptr()
    facts = _Draw(
        *(users, n, codes, logits.stride(1), fresh_Un.stride(1), fresh_Un.stride(0), 1, n),
        *(with_, with_ + 4 * logits.stride(0) if branches == 2 else None, fresh_Un.data_ptr()),
        *(None if alike_Unn is None else alike_Unn.data_ptr(), out_Un.data_ptr(), guidance, 1 / temperature),
    )
    left = found.draw(ctypes.byref(facts), ctypes.c_void_p(scratch.data_ptr()))
    return out_Un, int(left)
