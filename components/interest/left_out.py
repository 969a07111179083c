"""What attention finds when one behaviour of a history is left out, for explanations whose cost grows with T, not T^2.

Letters: U users, C candidates of a user, T history length, E width of a value.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_AT_ONCE = 128  # history items left out at a time


def each_left_out(weight_UCT: Tensor, values_UTE: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``(places, pooled [U, C, t, E])``: the weighted mean of the values without each place; zeros if nothing is left.

    Weights are 0 where padded and sum to one (or zero, for an empty history). A place is taken out of the sum and the
    rest made to sum to one again. Subtracting what is nearly everything would leave rounding errors, so the place with
    the largest weight is left out by summing the others; no other place can hold more than half.

    Example:
        >>> weight, values = torch.tensor([[[0.25, 0.75]]]), torch.tensor([[[1.0], [5.0]]])
        >>> [pooled.flatten().tolist() for _, pooled in each_left_out(weight, values)]
        [[5.0, 1.0]]
    """
    length = weight_UCT.shape[-1]
    if not length:
        return
    top_UC1 = weight_UCT.argmax(-1, keepdim=True)
    rest_UCT = weight_UCT.scatter(-1, top_UC1, 0.0)
    rest_UCT = rest_UCT / rest_UCT.sum(-1, keepdim=True).clamp_min(torch.finfo(weight_UCT.dtype).tiny)
    without_top_UC1E = (rest_UCT @ values_UTE)[:, :, None]
    pooled_UC1E = (weight_UCT @ values_UTE)[:, :, None]
    at_T = torch.arange(length, device=weight_UCT.device)
    for start in range(0, length, _AT_ONCE):
        places = slice(start, min(start + _AT_ONCE, length))
        own_UCT1 = weight_UCT[..., places, None]
        others_UCTE = (pooled_UC1E - own_UCT1 * values_UTE[:, None, places]) / (1 - own_UCT1).clamp_min(0.5)
        is_top_UCT1 = (at_T[places] == top_UC1)[..., None]
        yield places, torch.where(is_top_UCT1, without_top_UC1E, others_UCTE)
