"""The loss and its gradients compiled for this processor (``softmax.c``), where there is a C compiler.

Whether a call comes here hangs on its sizes, its numbers and the machine alone, so a resumed fit repeats to the bit.

Letters: K rows that are learned from, S the others that an item is told from, R those up to whole panels, W width,
P columns of a panel, T threads.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from couturier.kernels import compiled, dispatch

# Multiply-adds of one of the three products from which on a call is worth a compiler.
_LEAST = 1 << 22
_TALL = 8
# Exponentials at a time, and rows: more rows make longer sums in registers, fewer stay nearer in the cache.
_EXPONENTIALS, _MOST_ROWS = 1 << 17, 64
_NONE = -1e4  # a bias whose exponential is as good as none


class _Batch(ctypes.Structure):
    """``Batch`` of ``softmax.c``."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "items", "some", "threads")] + [
        (name, ctypes.c_void_p)
        for name in (
            "states",
            "own",
            "own_item",
            "share",
            "vectors",
            "packed",
            "bias",
            "numbers",
            "d_states",
            "d_items",
            "mass",
        )
    ]


def library(width: int) -> ctypes.CDLL | None:
    """The kernel for a width, compiled now if it was not yet; None where that cannot be done."""
    return compiled.library("catalogue_softmax/softmax.c", W=width)


def covers(states_KW: Tensor, items_SW: Tensor) -> bool:
    """Whether a call whose logits are known to be calm is one for the compiled kernel."""
    (rows, width), items = states_KW.shape, len(items_SW)
    if dispatch.wish() != "auto" or states_KW.device.type != "cpu" or rows * items * width < _LEAST:
        return False
    if not 16 <= width <= 256 or width % 16:
        return False
    found = library(width)
    return found is not None and width % found.panel() == 0


def loss_and_gradients(
    states: Tensor,
    own: Tensor,
    items: Tensor,
    bias_S: Tensor,
    pool_S: Tensor | None,
    items_K: Tensor,
    share_K: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients for the states, the own scores and the items; all float32."""
    (rows, width), others, threads = states.shape, len(items), torch.get_num_threads()
    kernel = library(width)
    assert kernel is not None, "ask covers() first"
    panel = kernel.panel()
    behind = -others % panel
    room = others + behind
    some = min(_MOST_ROWS, max(2 * _TALL, _EXPONENTIALS // room // _TALL * _TALL))
    vectors_RW = F.pad(items, (0, 0, 0, behind))
    numbers_S = torch.arange(others, dtype=torch.int32) if pool_S is None else pool_S.int()
    d_states, d_items_TRW = torch.empty_like(states), states.new_zeros(threads, room, width)
    mass_K = torch.empty_like(own)
    tensors = (
        states.contiguous(),
        own.contiguous(),
        items_K.contiguous(),
        share_K.contiguous(),
        vectors_RW,
        vectors_RW.view(-1, panel, width).transpose(1, 2).contiguous(),
        F.pad(bias_S, (0, behind), value=_NONE),
        F.pad(numbers_S, (0, behind), value=-1),
        d_states,
        d_items_TRW,
        mass_K,
    )
    batch = _Batch(rows, room, some, threads, *(one.data_ptr() for one in tensors))
    scratch = states.new_empty(threads * some * (room + width))
    kernel.cross_entropy(ctypes.byref(batch), ctypes.c_void_p(scratch.data_ptr()))
    total = ((mass_K.log() - own) * share_K).sum()
    return total, d_states, (own.exp() / mass_K - 1) * share_K, d_items_TRW.sum(0)[:others]
