"""The attention compiled for this processor (``attention.c``), where there is a C compiler.

The compiler is asked when a call is large enough (:mod:`couturier.kernels.compiled`): whether a call comes here hangs
on its sizes and the machine alone, so a resumed fit repeats to the bit, and a single request never waits for a
compiler. ``COUTURIER_KERNELS=torch`` keeps everything in PyTorch.

Legend: U lists, N rows of all lists, A heads, E width of a head, T threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from couturier.kernels import compiled, dispatch

# Numbers of the queries from which on a call is worth a compiler.
_LEAST = 1 << 15
_LANES = 16


class _Lists(ctypes.Structure):
    """``Lists`` of ``attention.c``."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("lists", "heads", "threads", "longest", "q_step", "k_step", "v_step")
    ] + [(name, ctypes.c_void_p) for name in ("offsets", "q", "k", "v")]


def library(width: int) -> ctypes.CDLL | None:
    """The kernels for a width of heads, compiled now if they were not yet; None where that cannot be done."""
    found = compiled.library("causal_attention/attention.c", E=width)
    if found is not None:
        found.room.restype, found.room.argtypes = ctypes.c_int64, [ctypes.c_int64]
    return found


def covers(q_NAE: Tensor) -> bool:
    """Whether a call with such queries is one for the compiled kernels."""
    if dispatch.wish() != "auto" or q_NAE.device.type != "cpu" or q_NAE.dtype != torch.float32:
        return False
    width = q_NAE.shape[2]
    if not width or width % _LANES or q_NAE.numel() < _LEAST:
        return False
    return library(width) is not None


def attend(q_NAE: Tensor, k_NAE: Tensor, v_NAE: Tensor, offsets: Tensor) -> Tensor:
    """``[N, A, E]``; differentiable once."""
    found_NAE: Tensor = _Attention.apply(*map(_rows, (q_NAE, k_NAE, v_NAE)), offsets.contiguous())
    return found_NAE


def _rows(x_NAE: Tensor) -> Tensor:
    """The same with a row's heads one after another; rows may lie apart, as halves of a wider product do."""
    return x_NAE if x_NAE.stride()[1:] == (x_NAE.shape[2], 1) else x_NAE.contiguous()


class _Attention(torch.autograd.Function):
    """The whole attention."""

    @staticmethod
    def forward(ctx: Any, q_NAE: Tensor, k_NAE: Tensor, v_NAE: Tensor, offsets: Tensor) -> Tensor:
        kernels = _Kernels(q_NAE, k_NAE, v_NAE, offsets)
        out_NAE = q_NAE.new_empty(q_NAE.shape)
        top_NA, rate_NA = q_NAE.new_empty(2, *q_NAE.shape[:2])
        kernels.run("forward", out_NAE, top_NA, rate_NA)
        ctx.save_for_backward(q_NAE, k_NAE, v_NAE, offsets, top_NA, rate_NA)
        return out_NAE

    @staticmethod
    @once_differentiable
    @dispatch.outside_autocast
    def backward(ctx: Any, grad_NAE: Tensor) -> tuple[Tensor | None, ...]:
        q_NAE, k_NAE, v_NAE, offsets, *made = ctx.saved_tensors
        grads = tuple(grad_NAE.new_empty(grad_NAE.shape) for _ in range(3))
        _Kernels(q_NAE, k_NAE, v_NAE, offsets).run("backward", *made, grad_NAE.contiguous(), *grads)
        return (*grads, None)


class _Kernels:
    """The compiled kernels with what both of them are told."""

    def __init__(self, q_NAE: Tensor, k_NAE: Tensor, v_NAE: Tensor, offsets: Tensor) -> None:
        found = library(q_NAE.shape[2])
        assert found is not None
        self._library = found
        lists, longest = offsets.numel() - 1, int(offsets.diff().max())
        threads = max(1, min(torch.get_num_threads(), lists))
        # Held, since a pointer does not hold what it points to.
        self._tensors = (offsets, q_NAE, k_NAE, v_NAE)
        steps = (one.stride(0) for one in self._tensors[1:])
        pointers = (one.data_ptr() for one in self._tensors)
        self._lists = _Lists(lists, q_NAE.shape[1], threads, longest, *steps, *pointers)
        self._between = q_NAE.new_empty(threads, found.room(longest))

    def run(self, name: str, *tensors: Tensor) -> None:
        """Call a kernel; the GIL is free meanwhile."""
        words = (ctypes.c_void_p(one.data_ptr()) for one in (self._between, *tensors))
        self._library[name](ctypes.byref(self._lists), *words)
