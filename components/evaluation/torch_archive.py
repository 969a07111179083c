"""Weights out of a ``.pth`` file without unpickling it.

A file that torch saved before version 1.6 is five pickles (magic number, protocol, machine facts, the state dict, the
list of storage keys) and then the raw storages: for each key an int64 count and the little-endian values. Unpickling
may call any function that the file names. This reader calls none: :func:`pickletools.genops` only *lists* the opcodes,
and a small stack machine reads them as data. The four names that a state dict of tensors needs are known by what they
stand for; any other name, and any opcode that is not on the list, is refused.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from couturier.components.errors import DataError

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES: dict[str, np.dtype[Any]] = {"torch FloatStorage": np.dtype("<f4"), "torch LongStorage": np.dtype("<i8")}
_REBUILD = "torch._utils _rebuild_tensor_v2"
_ORDERED = "collections OrderedDict"
_KNOWN = {*_DTYPES, _REBUILD, _ORDERED}


class UnsafeArchiveError(DataError):
    """The file asks for something beyond plain tensors, or is not a whole torch archive."""


@dataclass(frozen=True)
class _Name:
    """A global that the file names. It is never imported."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """Where a tensor's values lie: the key of a storage and its type."""

    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True)
class _TensorView:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a legacy torch ``.pth`` file, by name, float32 or int64, each with its own memory.

    Raises:
        UnsafeArchiveError: the file is of another format, is cut short, or holds anything but named tensors.
    """
    raw = path.read_bytes()
    stream = io.BytesIO(raw)
    magic, _protocol, machine, state, keys = (_read_plain(stream, path) for _ in range(5))
    if magic != _MAGIC or not isinstance(machine, dict) or not machine.get("little_endian"):
        raise UnsafeArchiveError(
            f"{path.name} is no little-endian legacy torch archive. Convert it to safetensors first."
        )
    if not isinstance(state, dict) or not isinstance(keys, list):
        raise UnsafeArchiveError(f"{path.name} holds no state dict of tensors. Convert it to safetensors first.")
    views = {str(name): view for name, view in state.items() if isinstance(view, _TensorView)}
    if len(views) != len(state):
        raise UnsafeArchiveError(f"{path.name} holds values that are no tensors. Convert it to safetensors first.")
    storages = _storages(raw, stream.tell(), keys, {view.storage.key: view.storage for view in views.values()}, path)
    return {name: _tensor(view, storages[view.storage.key], path) for name, view in views.items()}


def _storages(
    raw: bytes, start: int, keys: list[Any], wanted: dict[str, _Storage], path: Path
) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {}
    at = start
    for key in keys:
        storage = wanted.get(key)
        count = int.from_bytes(raw[at : at + 8], "little")
        if storage is None or count != storage.count:
            raise UnsafeArchiveError(f"{path.name}: storage {key!r} does not fit what the state dict says of it.")
        end = at + 8 + count * storage.dtype.itemsize
        if end > len(raw):
            raise UnsafeArchiveError(f"{path.name} is cut short: {len(raw)} bytes, storage {key!r} ends at {end}.")
        found[key] = np.frombuffer(raw, storage.dtype, count, at + 8)
        at = end
    if missing := wanted.keys() - found.keys():
        raise UnsafeArchiveError(f"{path.name} lacks the storages {sorted(missing)[:3]}.")
    return found


def _tensor(view: _TensorView, values: np.ndarray[Any, Any], path: Path) -> Tensor:
    last = view.offset + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))
    count = math.prod(view.shape)
    if view.offset < 0 or min((*view.stride, 0)) < 0 or (count and last >= values.size):
        raise UnsafeArchiveError(f"{path.name}: a tensor of shape {view.shape} reaches outside its storage.")
    flat = torch.from_numpy(values.copy())
    return flat.as_strided(view.shape, view.stride, view.offset).contiguous()


class _Machine:
    """Reads one listing of pickle opcodes as plain values. Nothing is imported and nothing is called."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        taken = self.stack[at:]
        del self.stack[at:]
        return taken

    def tuple_of(self, count: int) -> None:
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        self.stack.append(tuple(taken))

    def name(self, text: str) -> None:
        if text not in _KNOWN:
            raise ValueError(f"it names {text!r}")
        self.stack.append(_Name(text))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        called = self.stack.pop()
        if called == _Name(_ORDERED) and arguments == ():
            self.stack.append({})
        elif called == _Name(_REBUILD):
            storage, offset, shape, stride = arguments[:4]
            if not isinstance(storage, _Storage):
                raise ValueError("a tensor without a storage")
            whole = [int(offset), *map(int, shape), *map(int, stride)]
            split = 1 + len(shape)
            self.stack.append(_TensorView(storage, whole[0], tuple(whole[1:split]), tuple(whole[split:])))
        else:
            raise ValueError(f"it calls {called!r}")

    def persistent(self) -> None:
        kind, name, key, _place, count, view = self.stack.pop()
        if kind != "storage" or view is not None:
            raise ValueError(f"a persistent id of kind {kind!r}")
        self.stack.append(_Storage(str(key), _DTYPES[name.text], int(count)))

    def append_one(self) -> None:
        value = self.stack.pop()
        self.stack[-1].append(value)

    def append_all(self) -> None:
        taken = self.since_mark()
        self.stack[-1].extend(taken)

    def set_items(self) -> None:
        pairs = self.since_mark()
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def set_item(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.stack[-1][key] = value


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


# BUILD carries the state dict's ``_metadata``, which nothing here needs: its argument is dropped.
_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, a: None,
    **dict.fromkeys(("LONG1", "BININT", "BININT1", "BININT2", "BINUNICODE"), _push),
    "NONE": lambda m, a: _push(m, None),
    "NEWTRUE": lambda m, a: _push(m, True),
    "NEWFALSE": lambda m, a: _push(m, False),
    "EMPTY_DICT": lambda m, a: _push(m, {}),
    "EMPTY_LIST": lambda m, a: _push(m, []),
    "EMPTY_TUPLE": lambda m, a: _push(m, ()),
    "MARK": lambda m, a: m.marks.append(len(m.stack)),
    "TUPLE": lambda m, a: _push(m, tuple(m.since_mark())),
    "TUPLE1": lambda m, a: m.tuple_of(1),
    "TUPLE2": lambda m, a: m.tuple_of(2),
    "TUPLE3": lambda m, a: m.tuple_of(3),
    "APPEND": lambda m, a: m.append_one(),
    "APPENDS": lambda m, a: m.append_all(),
    "SETITEM": lambda m, a: m.set_item(),
    "SETITEMS": lambda m, a: m.set_items(),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, a: m.memo.update({a: m.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, a: _push(m, m.memo[a])),
    "GLOBAL": lambda m, a: m.name(a),
    "REDUCE": lambda m, a: m.reduce(),
    "BINPERSID": lambda m, a: m.persistent(),
    "BUILD": lambda m, a: m.stack.pop(),
}


def _read_plain(stream: io.BytesIO, path: Path) -> Any:
    machine = _Machine()
    try:
        for opcode, argument, _position in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.stack.pop()
            _STEPS[opcode.name](machine, argument)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise UnsafeArchiveError(
            f"{path.name} is not a plain archive of tensors ({error}). Nothing of it was run. Use a safetensors file."
        ) from error
    raise UnsafeArchiveError(f"{path.name} ends inside a pickle.")
