"""The loss as its formula says, with all logits: slow, any dtype, differentiable.

Letters: K rows that are learned from, S the others that an item is told from, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(
    states_KW: Tensor,
    own_K: Tensor,
    items_SW: Tensor,
    bias_S: Tensor,
    pool_S: Tensor | None,
    items_K: Tensor,
    share_K: Tensor,
) -> Tensor:
    """As :func:`couturier.kernels.catalogue_softmax.cross_entropy`."""
    pool_S = torch.arange(len(items_SW), device=items_SW.device) if pool_S is None else pool_S
    logits_KS = (states_KW @ items_SW.T + bias_S).masked_fill(pool_S == items_K[:, None], -torch.inf)
    all_K = torch.cat([own_K[:, None], logits_KS], 1).logsumexp(1)
    return ((all_K - own_K) * share_K).sum()
