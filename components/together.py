"""Several processes that train one model: who is who, averaged gradients, one validation for all.

``torchrun`` starts them; alone, every function here is free. Each process has an equal share of every batch, so the
mean of the processes' gradients is the gradient of one process, for a loss that is a mean over users. A mean over
something else (places of a history, say) goes through ``mean_over``. What no average makes equal: noise, which each
process draws for its own users, and whatever compares the users of a batch with each other (batch statistics, contrast
within a batch), which sees one share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, distributed

from couturier.components.errors import ConfigError


def rank() -> int:
    """This process's number under ``torchrun``; 0 alone."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world() -> int:
    """How many processes fit together; 1 alone."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average gradients over processes in one message; nothing to do alone."""
    if world() == 1:
        return
    grads = [value.grad if value.grad is not None else torch.zeros_like(value) for value in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    flat /= world()
    for value, part in zip(parameters, flat.split([value.numel() for value in parameters]), strict=True):
        value.grad = part.view_as(value)


def mean_over(total: Tensor, count: Tensor) -> Tensor:
    """``total / count`` (0 where nothing is counted), so scaled that its gradients average to those of one process.

    Example:
        >>> mean_over(torch.tensor(6.0), torch.tensor(3)).item()
        2.0
    """
    if world() == 1:
        return total / count.clamp_min(1)
    everyone = count.detach().float().clone()
    distributed.all_reduce(everyone)
    return total * world() / everyone.clamp_min(1)


def from_first(figure: Callable[[], float]) -> float:
    """A figure that the first process works out and every other is told, so that all decide alike."""
    if world() == 1:
        return figure()
    told = torch.tensor(figure() if rank() == 0 else 0.0, dtype=torch.float64)
    distributed.broadcast(told, src=0)
    return float(told)


def told(figures: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Figures that every process must agree on: the first process's, which all are told.

    All work them out, because the work may itself use the processes together.
    """
    found = figures()
    if world() == 1:
        return found
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    distributed.broadcast(values, src=0)
    return dict(zip(found, values.tolist(), strict=True))


def means(values: Mapping[str, float]) -> dict[str, float]:
    """Figures averaged over processes, which all name the same ones.

    Example:
        >>> means({"loss": 2.0})
        {'loss': 2.0}
    """
    if world() == 1:
        return dict(values)
    told = torch.tensor(list(values.values()), dtype=torch.float64)
    distributed.all_reduce(told)
    return dict(zip(values, (told / world()).tolist(), strict=True))


def share(size: int) -> slice:
    """This process's part of a batch of ``size``: every ``world()``-th, from its own number.

    Raises:
        ConfigError: the batch does not divide into equal shares.

    Example:
        >>> list(range(4))[share(4)]
        [0, 1, 2, 3]
    """
    if size % world():
        raise ConfigError(
            f"a batch of {size} cannot be shared by {world()} processes; choose a multiple of {world()}, or start "
            "another number of processes."
        )
    return slice(rank(), size, world())
