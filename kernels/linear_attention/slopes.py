"""The two published schedules of decay, one slope a head. They are different models: keep the one you trained with."""

from __future__ import annotations

import torch
from torch import Tensor

from couturier.kernels.checks import KernelError


def slopes_tnl(heads: int, *, layer: int = 0, layers: int = 1) -> Tensor:
    """Slopes of TransNormerLLM's released code: those of ALiBi, fading from the first layer to the last.

    ``2 ** (-8 (h + 1) / H) * (1 - layer / (layers - 1) + 1e-5)`` for h from 0. Where H is no power of two, the first
    slopes are those of the power of two below it and the rest are every second slope of the one above.

    Args:
        heads: H. layer: from 0. layers: how many there are.

    Returns:
        float32 ``[heads]``, positive; decay a token is ``exp(-slope)``.

    Raises:
        KernelError: no head, or no such layer.

    Example:
        >>> [round(slope, 4) for slope in slopes_tnl(4).tolist()]
        [0.25, 0.0625, 0.0156, 0.0039]
    """
    _check(heads, layer, layers)
    below = 1 << (heads.bit_length() - 1)
    powers = [-8 * (h + 1) / below for h in range(below)]
    powers += [-4 * (h + 1) / below for h in range(0, 2 * below, 2)][: heads - below]
    fade = 1 - layer / max(layers - 1, 1) + 1e-5
    return torch.tensor([2**power * fade for power in powers])


def slopes_by_layer(heads: int, *, layer: int = 0, layers: int = 1) -> Tensor:
    """Slopes of flash-linear-attention's Lightning: ``(8 / H) * (1 - layer / layers) * h``. Head 0 forgets nothing.

    Args:
        heads: H. layer: from 0. layers: how many there are.

    Returns:
        float32 ``[heads]``, not negative.

    Raises:
        KernelError: no head, or no such layer.

    Example:
        >>> slopes_by_layer(4, layer=1, layers=2).tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    _check(heads, layer, layers)
    return torch.arange(heads) * (8 / heads * (1 - layer / layers))


def _check(heads: int, layer: int, layers: int) -> None:
    if heads < 1:
        raise KernelError(f"heads is {heads}; wanted at least 1")
    if not 0 <= layer < layers:
        raise KernelError(f"layer is {layer} of {layers} layers; wanted 0 to {layers - 1}")
