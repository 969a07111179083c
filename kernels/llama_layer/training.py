"""Decoder layers of Llama's form with a gradient, compiled for this processor: whole rows of a prompt and several
samples behind it, forwards in one call and backwards in another.

    x ─▶ norm ─▶ product ─▶ turn ─▶ attention ─▶ x + product ─▶ norm ─▶ product ─▶ gate ─▶ x + product ─▶ next layer

In a training pass of a small model PyTorch's products take two thirds of the time, and a hundred small passes over the
data between them the rest. Here (``train.c``) a user's tokens go through a layer together, so what is between stays in
a core's cache; threads take users; the matrices that read the same rows are one product, forwards and backwards; the
norms' weights are in the matrices that read what is normed, so that they cost nothing a token; and no attention is
computed that the mask forbids. The gradient is exact, and the same bits every time for a number of threads.

Cost of a pass with its gradient: O(6 U T L (2 D H d + 2 D G d + 3 D F)) multiply-adds of products; memory
O(U T L (4 D + (H + 2 G) d + H (P + S) + 2 F)) floats of what is kept for the gradient.

Legend: U users, n samples a user, P prompt tokens, S tokens a sample, T = P + n S, L layers, H heads, G key/value
heads, d width of a head, D width, F width of the gate.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from couturier.kernels import compiled, dispatch

_LANES = 16


class Weights(NamedTuple):
    """A layer's, ``[out, in]``, as they are."""

    norm: Tensor
    mlp_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Setting(NamedTuple):
    """What a pass must know beside its tensors: n, H, G, how many of a prompt's first tokens nobody wants to know the
    last hidden state of, and the norms' epsilon."""

    samples: int
    heads: int
    kv_heads: int
    skip: int
    eps: float


def covers(weights: Weights, *, head: int) -> bool:
    """Whether such layers can run here: float32 on a CPU with a C compiler, and widths that divide into vectors."""
    if dispatch.wish() != "auto" or head % _LANES:
        return False
    if any(one.device.type != "cpu" or one.dtype != torch.float32 or not one.is_contiguous() for one in weights):
        return False
    found = library(head)
    return found is not None and not any(size % 32 for one in weights for size in one.shape)


@functools.cache
def library(head: int) -> ctypes.CDLL | None:
    """The functions of ``train.c`` for a width of heads; None where they cannot be compiled."""
    found = compiled.library("llama_layer/train.c", W=head)
    if found is not None:
        found.scratch.restype = ctypes.c_int64
    return found


def layers(
    x_UTD: Tensor, weights: Sequence[Weights], mask_UP: Tensor, cos_UTd: Tensor, sin_UTd: Tensor, setting: Setting
) -> Tensor:
    """What the layers make of a prompt and its samples ``[U, T - skip, D]``, before the last norm, with a gradient for
    ``x_UTD`` and the weights: of each prompt without its first ``skip`` tokens.

    Args:
        x_UTD: prompts, left-padded, and behind each its samples, one after the other.
        mask_UP: True where a prompt token counts.
        cos_UTd, sin_UTd: rotary tables in transformers' half-split form.

    Raises:
        RuntimeError: :func:`covers` would have said no.
    """
    flat = [one for layer in weights for one in layer]
    return cast(Tensor, _Layers.apply(setting, mask_UP, cos_UTd, sin_UTd, x_UTD, *flat))


class _Pass(ctypes.Structure):
    """``Pass`` of ``train.c``."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("users", "threads", "heads", "kv_heads", "width", "wide"),
                *("prompt", "samples", "own", "skip", "keeps"),
            )
        ),
        *((name, ctypes.c_void_p) for name in ("mask", "cos", "sin")),
        ("eps", ctypes.c_float),
    ]


_PACKED = ("to_qkv", "to_out", "to_both", "to_down", "from_qkv", "from_out", "from_both", "from_down")
_GIVEN = (*Weights._fields, *_PACKED)
_KEPT = ("x", "qkv", "weight", "mixed", "mid", "both", "y")


class _Layer(ctypes.Structure):
    """``Layer`` of ``train.c``: weights, packed for forwards and for backwards, and what is kept."""

    _fields_ = [(name, ctypes.c_void_p) for name in (*_GIVEN, *_KEPT)]


class _Gradient(ctypes.Structure):
    """``Gradient`` of ``train.c``."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("qkv", "out", "both", "down", "norm", "mlp_norm")]


class _Run:
    """The buffers of one pass. Rows of what is kept are padded to an odd number of cache lines."""

    def __init__(
        self,
        setting: Setting,
        mask_UP: Tensor,
        cos_UTd: Tensor,
        sin_UTd: Tensor,
        x_UTD: Tensor,
        weights: Sequence[Weights],
        *,
        keep: bool,
    ) -> None:
        (users, tokens, width), prompt, half = x_UTD.shape, mask_UP.shape[1], cos_UTd.shape[-1] // 2
        heads, kv_heads, wide, d = setting.heads, setting.kv_heads, len(weights[0].gate), 2 * half
        own = (tokens - prompt) // setting.samples
        found = library(d)
        if found is None:
            raise RuntimeError(f"no compiled layers of heads {d} wide here; ask covers() first.")
        self.library, self.keep, self.weights = found, keep, weights
        threads = min(users, torch.get_num_threads())
        # Held, since a pointer does not hold what it points to.
        self._held = (mask_UP.contiguous(), cos_UTd[..., :half].contiguous(), sin_UTd[..., :half].contiguous())
        sizes = (users, threads, heads, kv_heads, width, wide, prompt, setting.samples, own, setting.skip, int(keep))
        self.facts = _Pass(*sizes, *(one.data_ptr() for one in self._held), setting.eps)
        joined, slots = (heads + 2 * kv_heads) * d, _up(prompt) + _up(own)
        rows = {"qkv": _padded(joined), "weight": heads * slots, "mixed": _padded(heads * d)}
        rows |= {"mid": _padded(width), "both": _padded(2 * wide)}
        count, at_once = len(weights), users if keep else threads
        kept = x_UTD.new_empty(count if keep else 1, at_once * tokens * sum(rows.values()))
        self.x_LUTX = x_UTD.new_empty(count + 1 if keep else 1, users, tokens, _padded(width))
        self.x_LUTX[0, ..., :width] = x_UTD
        per_layer = (joined * width, heads * d * width, 2 * wide * width, wide * width)
        self.packed = x_UTD.new_empty(count, 2 * sum(per_layer))
        self.room = x_UTD.new_empty(threads, found.scratch(ctypes.byref(self.facts)))
        self.layers = (_Layer * count)()
        for i, (layer, weight) in enumerate(zip(self.layers, weights, strict=True)):
            pointers = [one.data_ptr() for one in weight]
            pointers += _places(self.packed[i], [*per_layer, *per_layer])
            at = i if keep else 0
            between = dict(zip(rows, _places(kept[at], [at_once * tokens * row for row in rows.values()]), strict=True))
            between |= {"x": self.x_LUTX[at].data_ptr(), "y": self.x_LUTX[at + 1 if keep else 0].data_ptr()}
            for name, pointer in zip(_GIVEN, pointers, strict=True):
                setattr(layer, name, pointer)
            for name in _KEPT:
                setattr(layer, name, between[name])
        self._kept = kept
        self.per_layer, self.width, self.skip = per_layer, width, setting.skip

    def forward(self) -> Tensor:
        facts, count = ctypes.byref(self.facts), ctypes.c_int64(len(self.layers))
        self.library.pack_all(facts, self.layers, count)
        self.library.forward(facts, self.layers, count, ctypes.c_void_p(self.room.data_ptr()))
        return self.x_LUTX[-1, :, self.skip :, : self.width].contiguous()

    def backward(self, grad_UQD: Tensor, *, learns: bool) -> tuple[Tensor, list[Tensor]]:
        """Gradients of what came in and, where any learns, of all weights."""
        g_UTX = self.x_LUTX.new_empty(self.x_LUTX.shape[1:])
        g_UTX[:, : self.skip] = 0.0
        g_UTX[:, self.skip :, : self.width] = grad_UQD
        count, threads = len(self.layers), self.facts.threads if learns else 0
        size = sum(self.per_layer) + 2 * self.width
        sums = [g_UTX.new_zeros(count, size) for _ in range(threads)]
        pieces = [*self.per_layer, self.width, self.width]
        gradients = (_Gradient * (threads * count))(*(_Gradient(*_places(one, pieces)) for own in sums for one in own))
        self.library.backward(
            ctypes.byref(self.facts),
            self.layers,
            gradients if learns else None,
            *map(ctypes.c_int64, (count, size)),
            ctypes.c_void_p(g_UTX.data_ptr()),
            ctypes.c_void_p(self.room.data_ptr()),
        )
        found: list[Tensor] = []
        for own, weight in zip(sums[0] if learns else (), self.weights, strict=False):
            qkv, out, both, down, norm, mlp_norm = own.split(pieces)
            q, k, v = qkv.split([weight.q.numel(), weight.k.numel(), weight.v.numel()])
            gate, up = both.chunk(2)
            parts = Weights(norm=norm, mlp_norm=mlp_norm, q=q, k=k, v=v, out=out, gate=gate, up=up, down=down)
            found += [part.view_as(whole) for part, whole in zip(parts, weight, strict=True)]
        return g_UTX[..., : self.width], found


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, setting: Setting, mask_UP: Tensor, cos_UTd: Tensor, sin_UTd: Tensor, x_UTD: Tensor, *flat: Tensor
    ) -> Tensor:
        each = len(Weights._fields)
        weights = [Weights(*flat[i : i + each]) for i in range(0, len(flat), each)]
        run = _Run(setting, mask_UP, cos_UTd, sin_UTd, x_UTD, weights, keep=any(ctx.needs_input_grad))
        if run.keep:
            ctx.run = run
            ctx.save_for_backward(*flat)  # so that a change of a weight before the gradient is noticed
        return run.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_UQD: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        g_UTD, weights = ctx.run.backward(grad_UQD, learns=any(wanted[5:]))
        found = [g_UTD, *weights]
        return None, None, None, None, *(found[i] if want else None for i, want in enumerate(wanted[4:]))


def _places(flat: Tensor, sizes: Sequence[int]) -> list[int]:
    """Addresses of pieces of these sizes, one after the other."""
    at, found = flat.data_ptr(), []
    for size in sizes:
        found.append(at)
        at += 4 * size
    return found


def _up(count: int) -> int:
    """Up to whole vectors."""
    return -(-count // _LANES) * _LANES


def _padded(width: int) -> int:
    """As ``PAD`` of ``train.c``."""
    return (-(-width // _LANES) | 1) * _LANES
