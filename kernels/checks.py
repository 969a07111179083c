"""What every kernel checks before it runs: types, shapes, devices and jagged offsets.

A kernel that is handed the wrong layout must say so, naming the axis and both sizes, and never compute something else.
Checks that need the values of a tensor run on the CPU only: on a GPU they would make the device wait for the host.

Legend: U users (lists), N behaviours in all lists, R rows (candidates).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class KernelError(ValueError):
    """A value, a shape or a setting that a kernel cannot work with. The message names what was seen and wanted."""


class KernelTypeError(KernelError, TypeError):
    """A tensor of the wrong dtype, or tensors of different dtypes where one is wanted."""


class BackendError(KernelError):
    """The backend that was asked for by name cannot run here."""


def check_axes(sizes: Mapping[str, int] | None = None, /, **tensors: tuple[Tensor, str]) -> dict[str, int]:
    """Match shapes against named axes, and return the size of every axis.

    Args:
        sizes: axes whose size is known already.
        tensors: ``name=(tensor, "N H")``: one word an axis, from the first to the last.

    Returns:
        Axis name -> size.

    Raises:
        KernelError: a tensor has another number of axes, or an axis has two sizes.

    Example:
        >>> check_axes(keys=(torch.zeros(5, 8), "N H"), queries=(torch.zeros(2, 8), "R H"))
        {'N': 5, 'H': 8, 'R': 2}
        >>> check_axes(keys=(torch.zeros(5, 8), "N H"), queries=(torch.zeros(2, 4), "R H"))
        Traceback (most recent call last):
        couturier.kernels.checks.KernelError: queries [R, H]: axis H has size 4, but keys has H = 8
    """
    known = dict(sizes or {})
    said_by = dict.fromkeys(known, "the call")
    for name, (tensor, axes) in tensors.items():
        words = axes.split()
        layout = f"{name} [{', '.join(words)}]"
        if tensor.dim() != len(words):
            raise KernelError(f"{layout} wants {len(words)} axes, got shape {tuple(tensor.shape)}")
        for word, size in zip(words, tensor.shape, strict=True):
            if known.setdefault(word, size) != size:
                raise KernelError(
                    f"{layout}: axis {word} has size {size}, but {said_by[word]} has {word} = {known[word]}"
                )
            said_by.setdefault(word, name)
    return known


def check_floats(**tensors: Tensor | None) -> None:
    """All tensors (those that are not None) share one floating dtype and one device.

    Raises:
        KernelTypeError: not floating, or dtypes differ.
        KernelError: devices differ.
    """
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise KernelTypeError(f"{name} has dtype {tensor.dtype}; wanted one of {', '.join(map(str, FLOATS))}")
        first = first or (name, tensor)
        if tensor.dtype != first[1].dtype:
            raise KernelTypeError(
                f"{name} has dtype {tensor.dtype}, but {first[0]} has {first[1].dtype}; cast one of them"
            )
        if tensor.device != first[1].device:
            raise KernelError(f"{name} is on {tensor.device}, but {first[0]} is on {first[1].device}; move one of them")


def check_offsets(offsets: Tensor, total: int, *, name: str = "offsets", of: str = "keys") -> int:
    """Offsets of jagged lists: int64, one axis, from 0 to ``total``, never falling. List u is ``[o[u], o[u + 1])``.

    Returns:
        The number of lists, U.

    Raises:
        KernelTypeError: not int64.
        KernelError: another shape, or values that are no offsets (looked at on the CPU only).

    Example:
        >>> check_offsets(torch.tensor([0, 2, 2, 5]), 5)
        3
        >>> check_offsets(torch.tensor([0, 3, 2, 5]), 5)
        Traceback (most recent call last):
        couturier.kernels.checks.KernelError: offsets falls from 3 to 2 at place 2; a list cannot have a negative length
    """
    if offsets.dtype != torch.int64:
        raise KernelTypeError(f"{name} has dtype {offsets.dtype}; wanted torch.int64: call .long() on it")
    if offsets.dim() != 1 or offsets.numel() == 0:
        raise KernelError(f"{name} [U + 1] wants one axis with at least one entry, got shape {tuple(offsets.shape)}")
    if offsets.device.type == "cpu":
        if int(offsets[0]) != 0:
            raise KernelError(f"{name} starts at {int(offsets[0])}; wanted 0")
        if int(offsets[-1]) != total:
            raise KernelError(f"{name} ends at {int(offsets[-1])}, but {of} has {total} rows; the two must be equal")
        falls = (offsets[1:] < offsets[:-1]).nonzero()
        if falls.numel():
            at = int(falls[0]) + 1
            raise KernelError(
                f"{name} falls from {int(offsets[at - 1])} to {int(offsets[at])} at place {at}; "
                "a list cannot have a negative length"
            )
    return offsets.numel() - 1


def check_index(index: Tensor, below: int, *, name: str, of: str, lowest: int = 0) -> None:
    """An int64 index tensor with values in ``[lowest, below)``.

    Raises:
        KernelTypeError: not int64.
        KernelError: a value outside (looked at on the CPU only).
    """
    if index.dtype != torch.int64:
        raise KernelTypeError(f"{name} has dtype {index.dtype}; wanted torch.int64: call .long() on it")
    if index.device.type == "cpu" and index.numel():
        low, high = (int(one) for one in index.aminmax())
        if low < lowest or high >= below:
            raise KernelError(f"{name} has values from {low} to {high}; wanted {lowest} to {below - 1} ({of})")
