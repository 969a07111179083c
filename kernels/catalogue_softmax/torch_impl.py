"""The loss and its gradients with PyTorch's calls, piece by piece: any device, any size of logits.

Letters: K rows that are learned from, S the others that an item is told from, W width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE = 1 << 18  # logits at a time, so that a piece stays in the cache


def loss_and_gradients(
    states: Tensor,
    own: Tensor,
    items: Tensor,
    bias_S: Tensor,
    pool_S: Tensor | None,
    items_K: Tensor,
    share_K: Tensor,
    *,
    calm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients for the states, the own scores and the items.

    Args:
        calm: no logit can be so large that its exponential overflows, so none is searched for a largest.
    """
    d_states, d_items, mass_K = torch.empty_like(states), torch.zeros_like(items), torch.empty_like(own)
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


def _pieces(rows: int, wide: int) -> Iterator[slice]:
    step = max(1, _PIECE // max(1, wide))
    return (slice(at, min(rows, at + step)) for at in range(0, rows, step))
