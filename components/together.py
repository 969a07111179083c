"""Several processes that train one model: who is who, averaged gradients, one validation for all.

``torchrun`` starts them; alone, every function here is free. Each process has an equal share of every batch, so the
mean of the processes' gradients is the gradient of one process, for a loss that is a mean over users. A mean over
something else (places of a history, say) goes through ``mean_over``. What no average makes equal: noise, which each
process draws for its own users, and whatever compares the users of a batch with each other (batch statistics, contrast
within a batch), which sees one share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from couturier.components.errors import ConfigError


@contextmanager
def processes() -> Iterator[None]:
    """Join the other processes that ``torchrun`` started, for the length of a block; nothing to do alone.

    They speak over gloo, and over nccl where every process has a GPU of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.device_count() > own:
        torch.cuda.set_device(own)
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    else:
        distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number under ``torchrun``; 0 alone."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world() -> int:
    """How many processes fit together; 1 alone."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over processes, in one message a dtype and device; nothing to do alone.

    A parameter that no process has a gradient for keeps none, so that the optimiser passes it over as it would alone.
    One that is kept in shares has its average already.
    """
    if world() == 1:
        return
    copies = [value for value in parameters if not in_shares(value)]
    for kind in dict.fromkeys((value.dtype, value.device) for value in copies):
        some = [value for value in copies if (value.dtype, value.device) == kind]
        has = torch.tensor([value.grad is not None for value in some], dtype=kind[0], device=kind[1])
        grads = [value.grad if value.grad is not None else torch.zeros_like(value) for value in some]
        flat = torch.cat([has, *(grad.flatten() for grad in grads)])
        distributed.all_reduce(flat)
        anyone, mean = (flat[: len(some)] > 0).tolist(), flat[len(some) :] / world()
        for value, part, used in zip(some, mean.split([value.numel() for value in some]), anyone, strict=True):
            value.grad = part.view_as(value) if used else None


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


def agree(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with the first process's, in place: what each worked out alone may differ in its last bits."""
    if world() > 1:
        for tensor in tensors:
            if not in_shares(tensor):
                distributed.broadcast(tensor.detach(), src=0)


def everyones(share_N: Tensor) -> Tensor:
    """The rows that :func:`share` dealt out, put back in their order: ``[N, ...]`` → ``[N * world(), ...]``."""
    if world() == 1:
        return share_N
    parts = [torch.empty_like(share_N) for _ in range(world())]
    distributed.all_gather(parts, share_N.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def in_shares(tensor: Tensor) -> bool:
    """Whether every process keeps only its share of the tensor (FSDP)."""
    if world() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor kept in shares, put together, on every process; any other as it is. All processes must ask at once."""
    if world() == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_kept(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, if ``like`` is kept in shares; else the tensor itself."""
    if world() == 1:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Keep every layer of a module that is kept in shares whole for the length of a block, for work that does not go
    through the layers' own ``forward``; nothing to do for others."""
    if world() == 1:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    layers = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for layer in layers:
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()


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
