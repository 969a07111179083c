"""Decoder layers of Llama's form, compiled for this processor: a whole decoding step in one call.

A decoding step of a small model is products of a few tens of microseconds with five times as many small calls between
them: norms, rotations, writing keys, attention over a prompt and a few tokens, the gate. Together those take as long as
the products, and threads that work side by side wait for the interpreter's lock between them. Here all layers of a step
are one call (``layer.c``): each pass stays in registers, and the products read weights that were packed once, which at
these sizes is a fifth faster than the library's.

    x ─▶ norm ─▶ product ─▶ turn, keep, attend ─▶ x + product ─▶ norm ─▶ product ─▶ gate ─▶ x + product ─▶ next layer

Samples of one prompt share its keys and values; each has its own behind them, stored so that sixteen keys are met at a
time, and meets no key of its mates. Where there is no compiler, and on any other device, the caller does the same with
PyTorch's calls; ``COUTURIER_KERNELS=torch`` forces that. Cost of a step: O(M L (4 D^2 + 3 D F + (P + T) H d))
multiply-adds.

Legend: N prompts, P prompt tokens, R rows (a prompt with some of its samples), n samples a row, M = R n, T tokens a
sample can have, L layers, H heads, G key/value heads, d width of a head, D width, F width of the gate.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couturier.kernels import compiled, dispatch

_LANES = 16


def covers(*widths: int, head: int, like: Tensor) -> bool:
    """Whether layers can run here: float32 on a CPU with a C compiler, and widths that divide into vectors.

    Args:
        widths: what products make: queries, keys and values side by side, D, and 2 F.
        head: d.
        like: a weight.
    """
    if dispatch.wish() != "auto" or like.device.type != "cpu" or like.dtype != torch.float32 or head % _LANES:
        return False
    found = library(head)
    return found is not None and not any(width % found.panel() for width in widths)


@functools.cache
def library(head: int) -> ctypes.CDLL | None:
    """The functions of ``layer.c`` for a width of heads; None where they cannot be compiled."""
    return compiled.library("llama_layer/layer.c", W=head)


class _Rows(ctypes.Structure):
    """``Rows`` of ``layer.c``."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("rows", "samples", "threads", "heads", "kv_heads", "prompt", "prompt_room", "own_most", "own_room")
    ] + [(name, ctypes.c_void_p) for name in ("prompts", "bias", "cos", "sin")]


class _Layer(ctypes.Structure):
    """``Layer`` of ``layer.c``."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("qkv", "out", "gate_up", "down", "prompt_k", "prompt_v", "own_k", "own_v")
    ]


class Weights(NamedTuple):
    """A layer's matrices ``[in, out]``, packed; the norms' weights are in those that read what is normed."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, *matrices: Tensor, head: int) -> Weights:
        """Of ``qkv [D, (H + 2 G) d]``, ``out [H d, D]``, ``gate_up [D, 2 F]`` (gate first) and ``down [F, D]``."""
        return cls(*(packed(one, head=head) for one in matrices))


class Steps:
    """Keys and values of samples that follow shared prompts, and the steps that read and make them.

    Args:
        layers: the model's.
        mask_NP: True where a prompt token counts.
        prompt_R: which prompt each row of samples follows.
        samples: n.
        heads, kv_heads: H and G.
        cos_RTd, sin_RTd: rotary tables of the tokens that samples will have, in transformers' half-split form.
        eps: of the norms.

    Raises:
        RuntimeError: :func:`covers` would have said no.
    """

    def __init__(
        self,
        layers: Sequence[Weights],
        mask_NP: Tensor,
        prompt_R: Tensor,
        *,
        samples: int,
        heads: int,
        kv_heads: int,
        cos_RTd: Tensor,
        sin_RTd: Tensor,
        eps: float,
    ) -> None:
        (prompts, prompt), (rows, tokens, d) = mask_NP.shape, cos_RTd.shape
        self._step, self.eps, count = _functions(d).step, eps, len(layers)
        prompt_room, own_room = (-(-size // _LANES) * _LANES for size in (prompt, tokens))
        bias_NP = mask_NP.new_full((prompts, prompt_room), float("-inf"), dtype=torch.float32)
        bias_NP[:, :prompt].masked_fill_(mask_NP, 0.0)
        half = d // 2
        # Held, since a pointer does not hold what it points to.
        self._held = (
            prompt_R.to(torch.int64).contiguous(),
            bias_NP,
            cos_RTd[..., :half].contiguous(),
            sin_RTd[..., :half].contiguous(),
        )
        self._weights = layers
        sizes = (rows, samples, min(rows, torch.get_num_threads()), heads, kv_heads, prompt, prompt_room)
        self._rows = _Rows(*sizes, tokens, own_room, *(one.data_ptr() for one in self._held))
        self.prompt_k_LNGdP = bias_NP.new_zeros(count, prompts, kv_heads, d, prompt_room)
        self.prompt_v_LNGPd = bias_NP.new_empty(count, prompts, kv_heads, prompt, d)
        self.own_k_LMGdT = bias_NP.new_empty(count, rows * samples, kv_heads, d, own_room)
        self.own_v_LMGTd = bias_NP.new_empty(count, rows * samples, kv_heads, tokens, d)
        kept = (self.prompt_k_LNGdP, self.prompt_v_LNGPd, self.own_k_LMGdT, self.own_v_LMGTd)
        pointers = ((*weights, *(one[i] for one in kept)) for i, weights in enumerate(layers))
        self._layers = (_Layer * count)(*(_Layer(*(one.data_ptr() for one in layer)) for layer in pointers))
        width, wide = layers[0].out.shape[0] * layers[0].out.shape[2], layers[0].down.shape[1]
        self.width, self.wide = width, wide
        self._room = bias_NP.new_empty(rows * samples, width + 2 * (heads + kv_heads) * d + 3 * wide)

    def keep(self, layer: int, k_NPGd: Tensor, v_NPGd: Tensor) -> None:
        """Keep the rotated keys and the values of the prompts in a layer."""
        self.prompt_k_LNGdP[layer, ..., : k_NPGd.shape[1]] = k_NPGd.permute(0, 2, 3, 1)
        self.prompt_v_LNGPd[layer] = v_NPGd.transpose(1, 2)

    def step(self, x_MD: Tensor, t: int) -> Tensor:
        """All layers over the ``t``-th token of every sample, whose keys and values are kept: ``[M, D]``, before the
        last norm."""
        x = x_MD.clone(memory_format=torch.contiguous_format)
        self._step(
            ctypes.byref(self._rows),
            self._layers,
            *map(ctypes.c_int64, (len(self._layers), self.width, self.wide)),
            ctypes.c_float(self.eps),
            ctypes.c_int64(t),
            _at(x),
            _at(self._room),
        )
        return x

    def follow(self, from_Rn: Tensor, tokens: int) -> None:
        """Give each sample the first ``tokens`` keys and values of another of its row ``[R, n]``."""
        rows, n = from_Rn.shape
        from_M = (from_Rn + n * torch.arange(rows)[:, None]).flatten()
        for own in (self.own_k_LMGdT[..., :tokens], self.own_v_LMGTd[..., :tokens, :]):
            own.copy_(own[:, from_M])


def norm(x_XD: Tensor, eps: float, *, head: int, out: Tensor | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)``, row by row; rows lie one after another. ``head`` as for :func:`library`."""
    out = torch.empty_like(x_XD) if out is None else out
    _functions(head).norm(_at(x_XD), _at(out), *_sizes(x_XD), ctypes.c_float(eps))
    return out


def swiglu(joined_XW: Tensor, *, head: int, out: Tensor | None = None) -> Tensor:
    """``silu(gate) up``, where a row is gate, then up; half as wide. ``head`` as for :func:`library`."""
    width = joined_XW.shape[-1] // 2
    out = joined_XW.new_empty(*joined_XW.shape[:-1], width) if out is None else out
    _functions(head).swiglu(_at(joined_XW), _at(out), *_sizes(out))
    return out


def packed(weight: Tensor, *, head: int) -> Tensor:
    """A matrix ``[in, out]`` as panels ``[panels, in, columns]``, as wide as a tile of a product on this processor."""
    return weight.unflatten(1, (-1, _functions(head).panel())).transpose(0, 1).contiguous()


def product(x_MI: Tensor, weight: Tensor, out_MO: Tensor, *, head: int) -> Tensor:
    """``x`` times a :func:`packed` weight, on one thread."""
    sizes = map(ctypes.c_int64, (*x_MI.shape, out_MO.shape[1]))
    _functions(head).multiply(_at(x_MI), _at(weight), _at(out_MO), *sizes)
    return out_MO


def _sizes(rows_XD: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    """How many rows, and how wide."""
    width = rows_XD.shape[-1]
    return ctypes.c_int64(rows_XD.numel() // width), ctypes.c_int64(width)


def _functions(head: int) -> ctypes.CDLL:
    found = library(head)
    if found is None:
        raise RuntimeError(f"no compiled layer of heads {head} wide here; ask covers() first.")
    return found


def _at(value: Tensor) -> Any:
    return ctypes.c_void_p(value.data_ptr())
