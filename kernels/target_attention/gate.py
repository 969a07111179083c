"""Dice, the activation of DIN's paper, as data, so that a fast path can look inside.

Legend: M rows, F units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import batch_norm


@dataclass(frozen=True, kw_only=True)
class DiceGate:
    """``p x + (1 - p) alpha x`` with ``p = sigmoid((x - mean) / sqrt(var + eps))``, a callable over rows ``[M, F]``.

    Zhou et al. 2018 (arXiv 1706.06978), equation 4. Statistics are those of the rows in training, which then move the
    running ones; else, and for one row, which has no spread, the running ones.

    Args:
        alpha_F: how much is let through below.
        mean_F, var_F: the running statistics, changed in place in training.
        training: whether rows are normalised by their own statistics.
        momentum: how far a call moves the running statistics.
        eps: added to the variance.

    Example:
        >>> gate = DiceGate(alpha_F=torch.zeros(1), mean_F=torch.zeros(1), var_F=torch.ones(1), training=False)
        >>> gate(torch.tensor([[0.0], [100.0]])).tolist()
        [[0.0], [100.0]]
    """

    alpha_F: Tensor
    mean_F: Tensor
    var_F: Tensor
    training: bool
    momentum: float = 0.1
    eps: float = 1e-8

    def __call__(self, x_MF: Tensor) -> Tensor:
        """The activation of every row, ``[M, F]``."""
        learns = self.training and len(x_MF) > 1
        normal_MF = batch_norm(x_MF, self.mean_F, self.var_F, training=learns, momentum=self.momentum, eps=self.eps)
        return x_MF * torch.addcmul(self.alpha_F, normal_MF.sigmoid(), 1 - self.alpha_F)

    @torch.no_grad()
    def moved(self, mean_F: Tensor, squares_F: Tensor, rows: int) -> None:
        """Move the running statistics towards those of a batch: ``squares_F`` sums the squared distances to its
        mean."""
        self.mean_F.lerp_(mean_F.to(self.mean_F.dtype), self.momentum)
        self.var_F.lerp_((squares_F / (rows - 1)).to(self.var_F.dtype), self.momentum)
