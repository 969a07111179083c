"""Cross-entropy of rows against a whole catalogue, with all gradients, without its logits.

A judge that learns what comes next compares every row with every item: 5,000 rows and 1,700 items make 9 million
logits a step, three products of them, and nothing of them is wanted afterwards. Here some rows at a time are compared,
their exponentials used for both gradients while they lie in the cache, and forgotten. The loss and its gradients are
made together, so backward only multiplies.

    logit[k, s] = <state_k, item_s> + bias_s          no logit where item s is row k's own
    loss        = sum_k share_k (log(exp(own_k) + sum_s exp(logit[k, s])) - own_k)

On a CPU in float32 it is compiled (``softmax.c``) where there is a C compiler and no exponential can overflow, which is
bounded first; elsewhere PyTorch's calls over pieces of rows (``torch_impl``). ``COUTURIER_KERNELS=torch`` forces those.

Letters: K rows that are learned from, S the others that an item is told from, W width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from couturier.kernels import dispatch
from couturier.kernels.catalogue_softmax import native, torch_impl
from couturier.kernels.checks import KernelError, check_axes, check_index

_CALM = 40.0  # sums of exponentials of so much, and gradients made of them, are far from overflow


def cross_entropy(
    states_KW: Tensor,
    own_K: Tensor,
    items_SW: Tensor,
    bias_S: Tensor,
    pool_S: Tensor | None,
    items_K: Tensor,
    share_K: Tensor,
) -> Tensor:
    """Cross-entropy of each row's own item against others, summed over rows times their shares, in float32.

    Args:
        own_K: the logit of the row's own item, which is not among the others, whatever they hold.
        items_SW: the others.
        bias_S: added to their logits; no gradient.
        pool_S: which catalogue items they are; None for the whole catalogue in its order.
        items_K: which catalogue item is the row's own, int64.
        share_K: how much a row counts; no gradient.

    Raises:
        KernelError: sizes do not fit; there are no others; ``items_K`` is not int64 or holds what is no item.

    Example:
        >>> one, none = torch.ones(1), torch.zeros(1)
        >>> others = torch.zeros(3, 2)
        >>> own = torch.tensor([0])
        >>> round(cross_entropy(torch.ones(1, 2), none, others, torch.zeros(3), None, own, one).exp().item(), 4)
        3.0
    """
    sizes = check_axes(
        states=(states_KW, "K W"),
        own=(own_K, "K"),
        items=(items_SW, "S W"),
        bias=(bias_S, "S"),
        items_of_rows=(items_K, "K"),
        share=(share_K, "K"),
    )
    if not sizes["S"]:
        raise KernelError("items [S, W] is empty: there is nothing to tell a row's own item from.")
    if pool_S is None:
        check_index(items_K, sizes["S"], name="items_K", of="items")
    else:
        check_axes(sizes, pool=(pool_S, "S"))
    found: Tensor = _CrossEntropy.apply(states_KW, own_K, items_SW, bias_S, pool_S, items_K, share_K)
    return found


class _CrossEntropy(torch.autograd.Function):
    """The loss and its gradients in one pass: the ``[K, S]`` logits never exist as a whole."""

    @staticmethod
    def forward(
        ctx: Any,
        states_KW: Tensor,
        own_K: Tensor,
        items_SW: Tensor,
        bias_S: Tensor,
        pool_S: Tensor | None,
        items_K: Tensor,
        share_K: Tensor,
    ) -> Tensor:
        # In full width even in mixed precision: a log of a sum over a catalogue has no digits to give away.
        with torch.autocast(states_KW.device.type, enabled=False):
            floats = (states_KW.float(), own_K.float(), items_SW.float(), bias_S.float())
            calm = _reach(*floats) < _CALM
            if calm and native.covers(floats[0], items_SW):
                total, *found = native.loss_and_gradients(*floats, pool_S, items_K, share_K.float())
            else:
                total, *found = torch_impl.loss_and_gradients(*floats, pool_S, items_K, share_K.float(), calm=calm)
        ctx.save_for_backward(*found)
        ctx.dtypes = states_KW.dtype, own_K.dtype, items_SW.dtype
        return total

    @staticmethod
    @once_differentiable
    @dispatch.outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_states, d_own, d_items = (
            (grad * value).to(dtype) for value, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return d_states, d_own, d_items, None, None, None, None


def _reach(states_KW: Tensor, own_K: Tensor, items_SW: Tensor, bias_S: Tensor) -> float:
    """No logit is further from 0; NaN where a number is none."""
    if not len(states_KW):
        return math.inf
    long = states_KW.norm(dim=1).amax() * items_SW.norm(dim=1).amax() + bias_S.abs().amax()
    return float(torch.maximum(long, own_K.abs().amax()))
