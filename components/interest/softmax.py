"""Cross-entropy over a whole catalogue without its logits: made, used and forgotten piece by piece.

Letters: K rows that are learned from, S the others that an item is told from, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PIECE = 1 << 18  # logits at a time, so that a piece stays in the cache
_CALM = 40.0  # sums of exponentials of so much, and gradients made of them, are far from overflow


def softmax_in_pieces(
    states_KW: Tensor,
    own_K: Tensor,
    items_SW: Tensor,
    bias_S: Tensor,
    pool_S: Tensor | None,
    items_K: Tensor,
    share_K: Tensor,
) -> Tensor:
    """Cross-entropy of each row's own item against others, summed over rows times their shares.

    Args:
        own_K: the logit of the row's own item, which is not among the others, whatever they hold.
        items_SW: the others.
        bias_S: added to their logits.
        pool_S: which catalogue items they are; None for the whole catalogue in its order.
        items_K: which catalogue item is the row's own.

    Example:
        >>> one, none = torch.ones(1), torch.zeros(1)
        >>> others = torch.zeros(3, 2)
        >>> own = torch.tensor([0])
        >>> round(softmax_in_pieces(torch.ones(1, 2), none, others, torch.zeros(3), None, own, one).exp().item(), 4)
        3.0
    """
    found: Tensor = _Softmax.apply(states_KW, own_K, items_SW, bias_S, pool_S, items_K, share_K)
    return found


class _Softmax(torch.autograd.Function):
    """The cross-entropy and its gradients in one pass over pieces: the ``[K, S]`` logits never exist as a whole."""

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
            total, *found = _cross_entropy(
                states_KW.float(), own_K.float(), items_SW.float(), bias_S.float(), pool_S, items_K, share_K.float()
            )
        ctx.save_for_backward(*found)
        ctx.dtypes = states_KW.dtype, own_K.dtype, items_SW.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_states, d_own, d_items = (
            (grad * value).to(dtype) for value, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return d_states, d_own, d_items, None, None, None, None


def _cross_entropy(
    states: Tensor,
    own: Tensor,
    items: Tensor,
    bias_S: Tensor,
    pool_S: Tensor | None,
    items_K: Tensor,
    share_K: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients for the states, the own scores and the items.

    Where no logit can be so large that its exponential overflows, as nearly always, none is searched for a largest.
    """
    d_states, d_items, mass_K = torch.empty_like(states), torch.zeros_like(items), torch.empty_like(own)
    calm = _reach(states, own, items, bias_S) < _CALM
    biased, top_K, made = bool(bias_S.any()), torch.zeros_like(own), None
    for piece in _pieces(len(states), len(items)):
        rows = piece.stop - piece.start
        made = logits = states.new_empty(rows, len(items)) if made is None else made[:rows]
        if biased:
            torch.addmm(bias_S, states[piece], items.T, out=logits)
        else:
            torch.mm(states[piece], items.T, out=logits)
        # The item itself is not among the others.
        if pool_S is None:
            logits.scatter_(1, items_K[piece, None], -torch.inf)
        else:
            logits.masked_fill_(pool_S == items_K[piece, None], -torch.inf)
        if not calm:
            top_K[piece] = torch.maximum(logits.amax(1), own[piece])
            logits.sub_(top_K[piece, None])
        chance = logits.exp_()
        mass = chance.sum(1).add_((own[piece] - top_K[piece]).exp_())
        mass_K[piece] = mass
        rate_K1 = (share_K[piece] / mass)[:, None]
        torch.mm(chance, items, out=d_states[piece]).mul_(rate_K1)
        d_items.addmm_(chance.T, states[piece] * rate_K1)
    total = ((mass_K.log() + top_K - own) * share_K).sum()
    return total, d_states, ((own - top_K).exp_() / mass_K - 1) * share_K, d_items


def _reach(states: Tensor, own: Tensor, items: Tensor, bias_S: Tensor) -> float:
    """No logit is further from 0; NaN where a number is none."""
    if not len(states) or not len(items):
        return math.inf
    long = states.norm(dim=1).amax() * items.norm(dim=1).amax() + bias_S.abs().amax()
    return float(torch.maximum(long, own.abs().amax()))


def _pieces(rows: int, wide: int) -> Iterator[slice]:
    step = max(1, _PIECE // max(1, wide))
    return (slice(at, min(rows, at + step)) for at in range(0, rows, step))
