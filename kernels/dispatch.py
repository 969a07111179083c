"""Which implementation of an operator runs: reference, torch or triton.

Each operator has a folder with modules of the same public names: ``reference`` (slow, obvious, any dtype),
``torch_impl`` (fast, differentiable, any device) and ``triton_impl`` (CUDA). The automatic choice is triton for CUDA
tensors when triton can be imported and the call is one that the kernel covers, torch otherwise.

The environment variable ``COUTURIER_KERNELS`` (``reference``, ``torch``, ``triton`` or ``auto``) or :func:`use` forces
one. A backend asked for by name never falls back: it runs or it says why it cannot. Triton also runs on CPU tensors,
thousands of times slower, under ``TRITON_INTERPRET=1``; only tests want that.

Nothing here imports triton until a triton implementation is really chosen.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from couturier.kernels.checks import BackendError

Backend = Literal["reference", "torch", "triton"]
Wish = Literal["auto", "reference", "torch", "triton"]

_Backward = TypeVar("_Backward", bound=Callable[..., Any])

VARIABLE = "COUTURIER_KERNELS"

# The one registry: operator -> backend -> module.
OPS: dict[str, dict[Backend, str]] = {
    op: {
        "reference": f"couturier.kernels.{op}.reference",
        "torch": f"couturier.kernels.{op}.torch_impl",
        "triton": f"couturier.kernels.{op}.triton_impl",
    }
    for op in ("attention_stats", "hash_sampling", "linear_attention", "target_attention", "topk_search")
}

_forced: ContextVar[Wish | None] = ContextVar("couturier_kernels", default=None)


@contextlib.contextmanager
def use(backend: Wish) -> Iterator[None]:
    """Force a backend inside a ``with`` block, before the environment variable.

    Example:
        >>> with use("reference"):
        ...     wish()
        'reference'
        >>> wish() == os.environ.get(VARIABLE, "auto")
        True
    """
    token = _forced.set(_checked(backend, "use()"))
    try:
        yield
    finally:
        _forced.reset(token)


def wish() -> Wish:
    """The backend that was asked for: by :func:`use`, else by ``COUTURIER_KERNELS``, else ``auto``.

    Raises:
        BackendError: the environment variable names no backend.
    """
    return _forced.get() or _checked(os.environ.get(VARIABLE) or "auto", f"environment variable {VARIABLE}")


def choose(op: str, tensor: Tensor, *, uncovered: str | None = None) -> Backend:
    """The backend for a call of ``op`` on tensors that live where ``tensor`` does.

    Args:
        op: a name in :data:`OPS`.
        tensor: any tensor of the call; its device decides.
        uncovered: why the triton kernel does not cover this call (``"three hidden layers"``), or None.

    Raises:
        BackendError: triton was asked for by name and cannot run this call here.
    """
    wanted = wish()
    if wanted in ("reference", "torch"):
        return cast(Backend, wanted)
    if wanted == "auto" and not tensor.is_cuda:
        return "torch"
    obstacle = _obstacle(tensor) or (f"its kernel does not cover {uncovered}" if uncovered else None)
    if wanted == "triton" and obstacle:
        raise BackendError(
            f"{op}: backend 'triton' was asked for, but {obstacle}. "
            f"Set {VARIABLE}=auto to let the kernel choose, or {VARIABLE}=torch"
        )
    if wanted == "triton":
        return "triton"
    return "triton" if obstacle is None else "torch"


def implementation(op: str, tensor: Tensor, *, uncovered: str | None = None) -> ModuleType:
    """The module that :func:`choose` names, imported now if it was not yet."""
    return importlib.import_module(OPS[op][choose(op, tensor, uncovered=uncovered)])


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants products in where ``tensor`` lives; None when autocast is off there."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def outside_autocast(backward: _Backward) -> _Backward:
    """Run the backward of an ``autograd.Function`` with autocast off: it computes in the dtypes its forward kept, also
    when somebody calls ``backward()`` inside the block."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        kind = next((grad.device.type for grad in grads if grad is not None), "cpu")
        with torch.autocast(kind, enabled=False):
            return backward(ctx, *grads)

    return cast(_Backward, run)


def triton_is_installed() -> bool:
    """Whether ``import triton`` would find something. Does not import it."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether triton kernels are interpreted on the CPU (``TRITON_INTERPRET=1``), as in the interpreter tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _obstacle(tensor: Tensor) -> str | None:
    if not triton_is_installed():
        return "triton is not installed (pip install -e '.[dev]')"
    if not tensor.is_cuda and not interpreting():
        return f"the tensors are on {tensor.device}, and triton needs CUDA (or TRITON_INTERPRET=1, for tests)"
    return None


def _checked(name: str, source: str) -> Wish:
    if name not in get_args(Wish):
        raise BackendError(f"{source} is {name!r}; wanted one of {', '.join(get_args(Wish))}")
    return cast(Wish, name)
