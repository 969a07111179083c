"""A batch of samples worked through in shares, side by side on the cores of one machine.

A decoding step of a small model is a hundred products and sums of some tens of microseconds each. Split over cores one
by one, they spend more time waiting for each other than working, and come to a standstill where another process holds a
core. Users do not depend on each other, so each core takes some of them through all steps instead. Torch lets go of the
interpreter's lock during a product; what is held back is only the little Python between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from couturier.components.runtime import threads
from couturier.components.together import world

_T = TypeVar("_T")
# Beyond this many weights a layer they no longer stay in each core's cache, and cores do better to share one product.
_SMALL_LAYER = 1 << 22
# With fewer samples a share the products are too short for the lock to be free most of the time; likewise with more
# shares.
_FEWEST_SAMPLES, _MOST_SHARES = 32, 4


def how_many(layer: nn.Module, users: int, samples: int) -> int:
    """Into how many shares a batch is best split: one wherever splitting it could not pay.

    Args:
        layer: one of the model's, or what of it is about as large.
        users: what is split.
        samples: of all users, those without the history included.
    """
    weights = list(layer.parameters())
    plain = world() == 1 and not torch.is_autocast_enabled("cpu")
    if not plain or weights[0].device.type != "cpu" or sum(weight.numel() for weight in weights) > _SMALL_LAYER:
        return 1
    return max(1, min(torch.get_num_threads(), users, samples // _FEWEST_SAMPLES, _MOST_SHARES))


def small_work(shares: int) -> AbstractContextManager[None]:
    """Around what little is done before work in so many shares: on one core, since the others would be waited for."""
    return threads(1 if shares > 1 else torch.get_num_threads())


def side_by_side(parts: Sequence[Callable[[], _T]]) -> list[_T]:
    """What each part returns; each runs in a thread of its own, on its share of torch's threads.

    Example:
        >>> side_by_side([lambda: 1, lambda: 2])
        [1, 2]
    """
    if len(parts) == 1:
        return [parts[0]()]
    before = torch.get_num_threads()
    settle, each = torch.set_num_threads, max(1, before // len(parts))
    with ThreadPoolExecutor(len(parts) - 1, initializer=settle, initargs=(each,)) as pool:
        others = [pool.submit(part) for part in parts[1:]]
        settle(each)
        try:
            return [parts[0](), *(one.result() for one in others)]
        finally:
            settle(before)


def shared_out(work: Callable[..., Tensor], rows: Sequence[Tensor], weights: Sequence[Tensor], shares: int) -> Tensor:
    """What ``work(*rows)`` returns, computed and differentiated by shares of its rows, side by side.

    Args:
        work: returns one tensor, whose row u depends on row u of its arguments, and on weights.
        rows: its arguments, all with as many rows.
        weights: all that it reads and that may need a gradient; their gradients are added up in the order of shares.
        shares: into how many to split.

    Example:
        >>> a, x = torch.ones(2, requires_grad=True), torch.arange(4.0).view(2, 2)
        >>> shared_out(lambda part: part * a, [x], [a], 2).sum().backward()
        >>> a.grad
        tensor([2., 4.])
    """
    return cast(Tensor, _SharedOut.apply(work, shares, len(rows), *rows, *weights))


def summed(parts: Sequence[Callable[..., Tensor]], shared: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum of the numbers that ``part(*shared)`` returns, computed side by side with their gradients in one go.

    Args:
        parts: each returns one number.
        shared: their arguments; what they need of gradients is added up in the order of the parts.
        weights: all else that they read and that may need a gradient.

    Example:
        >>> a, x = torch.ones(2, requires_grad=True), torch.ones(2)
        >>> (2 * summed([lambda x: (a * x).sum(), lambda x: a[0] * x[0]], [x], [a])).backward()
        >>> a.grad
        tensor([4., 2.])
    """
    return cast(Tensor, _Summed.apply(parts, len(shared), *shared, *weights))


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Sequence[Callable[..., Tensor]], shared: int, *tensors: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[2:]

        def one(part: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor | None]]:
            own = [x.detach().requires_grad_(x.requires_grad) for x in tensors[:shared]]
            with torch.set_grad_enabled(any(wanted)):
                out = part(*own)
            asked = [x for x, want in zip([*own, *tensors[shared:]], wanted, strict=True) if want]
            grads = torch.autograd.grad(out, asked, allow_unused=True) if asked else ()
            found = iter(grads)
            return out.detach(), [next(found) if want else None for want in wanted]

        done = side_by_side([partial(one, part) for part in parts])
        ctx.grads = [_total(each) for each in zip(*(grads for _, grads in done), strict=True)]
        return torch.stack([out for out, _ in done]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return None, None, *(None if one is None else one * grad for one in grads)


def _total(grads: Sequence[Tensor | None]) -> Tensor | None:
    """Their sum in their order; None counts for nothing."""
    given = [grad for grad in grads if grad is not None]
    return sum(given[1:], given[0]) if given else None


class _SharedOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Callable[..., Tensor], shares: int, rows: int, *tensors: Tensor) -> Tensor:
        count = len(tensors[0])
        cuts = [slice(i * count // shares, (i + 1) * count // shares) for i in range(shares)]

        def one(cut: slice) -> tuple[list[Tensor], Tensor]:
            own = [x[cut].detach().requires_grad_(x.requires_grad) for x in tensors[:rows]]
            with torch.enable_grad():
                return own, work(*own)

        ctx.parts = side_by_side([partial(one, cut) for cut in cuts])
        ctx.cuts, ctx.rows, ctx.weights = cuts, rows, tensors[rows:]
        return torch.cat([out.detach() for _, out in ctx.parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[3:]

        def one(cut: slice, own: list[Tensor], out: Tensor) -> list[Tensor | None]:
            asked = [x for x, want in zip([*own, *ctx.weights], wanted, strict=True) if want]
            found = iter(torch.autograd.grad(out, asked, grad[cut], allow_unused=True))
            return [next(found) if want else None for want in wanted]

        parts = [partial(one, cut, *part) for cut, part in zip(ctx.cuts, ctx.parts, strict=True)]
        ctx.parts = None
        together = list(zip(*side_by_side(parts), strict=True))
        whole = [
            torch.cat(cast("list[Tensor]", each)) if each[0] is not None else None for each in together[: ctx.rows]
        ]
        whole += [_total(each) for each in together[ctx.rows :]]
        return None, None, None, *whole
