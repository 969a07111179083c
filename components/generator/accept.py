"""The gate of Nextdoor's subject lines (arXiv 2312.12457): what was generated is used only where a reward model prefers
it to what was there anyway.

Legend: U windows (or items), n candidates, T fallbacks.
"""

from __future__ import annotations

from torch import Tensor


def accept_or_fall_back(reward_Un: Tensor, fallback_UT: Tensor) -> tuple[Tensor, Tensor]:
    """Pair the T best candidates with T fallbacks, best with best; a candidate is accepted if it earns more.

    Args:
        reward_Un: of the candidates, n >= T;  fallback_UT: of what would be shown without them.

    Returns:
        Places ``[U, T]`` of the best candidates, and where they are accepted, bool ``[U, T]``, both in the order of
        the fallbacks given.

    Example:
        >>> import torch
        >>> accept_or_fall_back(torch.tensor([[0.2, 0.9, 0.5]]), torch.tensor([[0.6, 0.7]]))
        (tensor([[2, 1]]), tensor([[False,  True]]))
    """
    targets = fallback_UT.shape[1]
    place_UT = reward_Un.argsort(dim=1, descending=True, stable=True)[:, :targets]
    rank_UT = fallback_UT.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    place_UT = place_UT.gather(1, rank_UT)
    return place_UT, reward_Un.gather(1, place_UT) > fallback_UT
