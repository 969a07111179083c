"""Small layers that several judges are made of.

Letters: N rows, X any leading axes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from couturier.kernels.target_attention import DiceGate


class Dice(nn.Module):
    """Data-adaptive activation: ``p x + (1 - p) alpha x`` with ``p = sigmoid((x - mean) / sqrt(var + eps))``.

    Zhou et al. 2018 (arXiv 1706.06978), equation 4; alpha a unit, 0 at first. Batch statistics in training, running
    ones afterwards. The released code multiplies the normalised value by a learned beta of 0; the paper does not, nor
    does this.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-8, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x_XD: Tensor) -> Tensor:
        return self.gate()(x_XD.flatten(0, -2)).view_as(x_XD)

    def gate(self) -> DiceGate:
        """It as data, for a kernel that can look inside."""
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        return DiceGate(
            alpha_F=self.alpha,
            mean_F=self.norm.running_mean,
            var_F=self.norm.running_var,
            training=self.training,
            eps=self.norm.eps,
        )


def mlp(widths: Sequence[int], activation: Callable[[int], nn.Module], *, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers through ``widths`` with an activation after each but the last.

    Example:
        >>> mlp([4, 8, 1], lambda width: nn.GELU())(torch.zeros(3, 4)).shape
        torch.Size([3, 1])
    """
    layers: list[nn.Module] = []
    for place, (into, out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layers.append(nn.Linear(into, out))
        if place < len(widths) - 2:
            layers.append(activation(out))
            if dropout:
                layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def time_bucket(age_days: Tensor, buckets: int) -> Tensor:
    """int64 buckets of an age, finer for the recent past: hours, days, weeks, seasons; the last holds the rest.

    ``floor(2 log2(1 + 24 age))``, so a bucket spans about 1.4 times the age of the one before (our choice).

    Example:
        >>> time_bucket(torch.tensor([0.0, 0.05, 1.0, 365.0]), 24).tolist()
        [0, 2, 9, 23]
    """
    return (2 * torch.log2(1 + 24 * age_days.clamp_min(0))).floor().long().clamp(max=buckets - 1)


@torch.no_grad()
def centre_inputs(layer: nn.Linear, vectors_IP: Tensor) -> None:
    """Start a layer so that what it makes of a catalogue's vectors has no common part, whatever their scale.

    The first P weights are divided by the vectors' root mean square distance from their mean, and the bias takes that
    mean out; vectors that are all alike leave the layer as it is. Ours: without it a judge whose content vectors share
    a large mean spends its first hundred steps on unlearning it.

    Args:
        layer: its first P inputs are content vectors; the others stay as they are.

    Example:
        >>> layer, vectors = nn.Linear(3, 2), torch.tensor([[9.0, 0.0], [11.0, 0.0]])
        >>> centre_inputs(layer, vectors)
        >>> bool(layer(torch.tensor([10.0, 0.0, 0.0])).abs().max() < 1e-6)
        True
    """
    if not len(vectors_IP):
        return
    mean_P = vectors_IP.mean(0)
    spread = float((vectors_IP - mean_P).square().sum(1).mean().sqrt())
    if spread > 1e-6:
        weight_WP = layer.weight[:, : vectors_IP.shape[1]]
        weight_WP /= spread
        layer.bias.copy_(-(weight_WP @ mean_P))
