"""Small layers that several judges are made of.

Letters: N rows, X any leading axes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from couturier.kernels.target_attention import DiceGate

Drop = Callable[[Tensor], Tensor]
"""Takes rows ``[N, W]`` and drops units of them; each call is another layer's."""


def keep_all(x: Tensor) -> Tensor:
    """The dropout of a judge that is not learning."""
    return x


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


class RowDropout:
    """Dropout of rows, drawn before they are met, so that shares of them lose what they would lose as a whole.

    Args:
        share: of units that are dropped, to the nearest 256th; the others grow as much as keeps their mean.
        layers: how many times it will be called.
        noise: where it is drawn from; nothing is dropped without it.

    Example:
        >>> drop = RowDropout(0.25, rows=4, width=2, layers=1, noise=torch.Generator().manual_seed(0))
        >>> whole = drop.of(0, 4)(torch.ones(4, 2))
        >>> torch.equal(drop.of(1, 3)(torch.ones(2, 2)), whole[1:3])
        True
    """

    def __init__(
        self, share: float, *, rows: int = 0, width: int = 0, layers: int = 0, noise: torch.Generator | None = None
    ) -> None:
        self.dropped, self.width = round(256 * share) if noise is not None else 0, width
        # A byte a unit: eight times cheaper than a float each. The eighth of a word has the sign, which is never set.
        size = -(-rows * width // 7) if self.dropped else 0
        device = noise.device if noise is not None else None
        self._words = [
            torch.empty(size, dtype=torch.int64, device=device).random_(generator=noise)
            for _ in range(layers if self.dropped else 0)
        ]

    def of(self, start: int, stop: int) -> Drop:
        """The dropout of rows ``start`` to ``stop``: each call is that of the next layer."""
        if not self.dropped:
            return keep_all
        layers = iter(self._words)

        def drop(x_NW: Tensor) -> Tensor:
            first, last = start * self.width, stop * self.width
            words = next(layers)[first // 7 : -(-last // 7)]
            bytes_X = words.view(torch.uint8).view(-1, 8)[:, :7].reshape(-1)
            kept_NW = bytes_X[first % 7 :][: last - first].view(x_NW.shape) >= self.dropped
            return x_NW * kept_NW.to(x_NW.device).to(x_NW.dtype).mul_(256 / (256 - self.dropped))

        return drop


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
