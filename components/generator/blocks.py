"""The layers of a Llama-like language model as plain tensors, and what rows go through on their way through one.

The projections that read the same input, and the norm before them, are joined into one matrix for as long as the
weights do not change (where they are plain and small); larger ones, and adapters, are called as they are.

Legend: M rows, D width, H heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from couturier.kernels import llama_layer

if TYPE_CHECKING:
    from transformers import LlamaModel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

# Joining copies weights; beyond this many a layer the copy costs more than it saves.
_JOIN_BELOW = 1 << 22

# Numbers that go through layers from which on a batch is worth asking a compiler, once a process.
_COMPILE_FROM = 1 << 18

Weight = tuple[Tensor, Tensor | None]


class Block(NamedTuple):
    """One layer as plain tensors, or as modules where a layer's projection is more than a matrix (adapters)."""

    norm: Tensor | None
    """None where it is in the weights that read what is normed."""
    qkv: tuple[Weight | nn.Module, ...]
    paired: bool
    """Whether the two numbers of queries and keys that are rotated together lie side by side."""
    out: Weight | nn.Module
    mlp_norm: Tensor | None
    gate_up: tuple[Weight | nn.Module, ...]
    down: Weight | nn.Module
    packed: llama_layer.Weights | None = None
    """The same for the compiled step, where that does it; then nothing is paired."""


class Shape(NamedTuple):
    """What a layer must know beside its weights."""

    heads: int
    kv_heads: int
    width: int
    eps: float


class Passes(NamedTuple):
    """What rows go through between products."""

    norm: Callable[[Tensor, Tensor | None], Tensor]
    """Rows and, unless it is in the weights that read them, the norm's weight → rows."""
    gate: Callable[[Tensor], Tensor]
    """Gate and up side by side → what goes down."""


class Turn(NamedTuple):
    """Rotary tables, to be multiplied with ``[*size, heads, d]``."""

    cos: Tensor
    sin: Tensor
    """The first half with a minus, which the swapped first half needs in transformers' half-split form."""
    pairs: Tensor
    """The same as complex numbers ``[…, d / 2]``, for layers with pairs; elsewhere it is not looked at."""

    def at(self, t: int) -> Turn:
        return Turn(*(table[:, t] for table in self))


def blocks_of(lm: LlamaModel, *, tokens: int) -> list[Block]:
    """A model's layers with joined weights, for as long as these do not change.

    Args:
        tokens: how many of all samples will go through the layers; 0 for steps of one shape, as on a GPU.
    """
    shape, layers = shape_of(lm), cast("Sequence[LlamaDecoderLayer]", lm.layers)
    plain = [_block(layer) for layer in layers]
    if not tokens or any(block.norm is not None for block in plain):
        return plain
    gated_by_silu = lm.config.hidden_act in ("silu", "swish")
    if gated_by_silu and tokens * lm.config.hidden_size * len(layers) >= _COMPILE_FROM and all(map(_is_bare, plain)):
        rows = [cast(Weight, part)[0] for part in (*plain[0].qkv, plain[0].out, *plain[0].gate_up, plain[0].down)]
        if llama_layer.covers(*map(len, rows), head=shape.width, like=rows[0]):
            return [block._replace(packed=_packed(block, shape)) for block in plain]
    return [
        block._replace(paired=True, qkv=tuple(_paired(cast(Weight, part), shape) for part in block.qkv))
        for block in plain
    ]


def _packed(block: Block, shape: Shape) -> llama_layer.Weights:
    parts = (*block.qkv, block.out, *block.gate_up, block.down)
    return llama_layer.Weights.of(*(cast(Weight, part)[0].t() for part in parts), head=shape.width)


def _is_bare(block: Block) -> bool:
    """Whether a layer's projections are products without biases, joined, with the norms in them."""
    parts = parts_of(block)
    return (
        len(parts) == 4
        and block.norm is None
        and block.mlp_norm is None
        and all(isinstance(part, tuple) and part[1] is None for part in parts)
    )


def shape_of(lm: LlamaModel) -> Shape:
    heads, first = int(lm.config.num_attention_heads), cast("LlamaDecoderLayer", lm.layers[0])
    kv_heads = int(lm.config.num_key_value_heads or heads)
    return Shape(heads, kv_heads, int(first.self_attn.head_dim), float(first.input_layernorm.variance_epsilon))


def _block(layer: LlamaDecoderLayer) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = _join(attention.q_proj, attention.k_proj, attention.v_proj)
    norm, qkv = _with_norm(layer.input_layernorm.weight, qkv)
    mlp_norm, gate_up = _with_norm(layer.post_attention_layernorm.weight, _join(mlp.gate_proj, mlp.up_proj))
    return Block(
        norm=norm,
        qkv=qkv,
        paired=False,
        out=_plain(attention.o_proj),
        mlp_norm=mlp_norm,
        gate_up=gate_up,
        down=_plain(mlp.down_proj),
    )


def _with_norm(
    norm_D: Tensor, parts: tuple[Weight | nn.Module, ...]
) -> tuple[Tensor | None, tuple[Weight | nn.Module, ...]]:
    """The weight of a norm put into the matrix that reads it, which is a copy already; not in few bits, which would
    round it twice."""
    first = parts[0]
    if len(parts) > 1 or not isinstance(first, tuple) or first[0].dtype != torch.float32:
        return norm_D, parts
    return None, ((first[0] * norm_D, first[1]),)


def _paired(part: Weight, shape: Shape) -> Weight:
    """Rows of queries and keys in the order 0, d / 2, 1, d / 2 + 1, …: their products with each other stay the same,
    and a rotation becomes one complex product."""
    turned = (shape.heads + shape.kv_heads) * shape.width

    def reorder(rows: Tensor) -> Tensor:
        halves = rows[:turned].unflatten(0, (-1, 2, shape.width // 2))
        return torch.cat([halves.transpose(1, 2).flatten(0, 2), rows[turned:]])

    weight, bias = part
    return reorder(weight), None if bias is None else reorder(bias)


def parts_of(block: Block) -> list[Weight | nn.Module]:
    return [*block.qkv, block.out, *block.gate_up, block.down]


def _plain(module: nn.Module) -> Weight | nn.Module:
    # An adapter wraps or subclasses Linear and computes more than a product: then the module itself is called.
    return (module.weight, module.bias) if type(module) is nn.Linear else module


def _join(*modules: nn.Module) -> tuple[Weight | nn.Module, ...]:
    parts = tuple(_plain(module) for module in modules)
    weights = [part for part in parts if isinstance(part, tuple)]
    if len(weights) < len(parts) or sum(weight.numel() for weight, _ in weights) > _JOIN_BELOW:
        return parts
    biases = [bias for _, bias in weights if bias is not None]
    bias = torch.cat(biases) if len(biases) == len(weights) else None
    if biases and bias is None:
        return parts
    return ((torch.cat([weight for weight, _ in weights]), bias),)


def _project(x_MD: Tensor, part: Weight | nn.Module) -> Tensor:
    return F.linear(x_MD, *part) if isinstance(part, tuple) else part(x_MD)


def _project_all(x_MD: Tensor, parts: tuple[Weight | nn.Module, ...]) -> Tensor:
    return _project(x_MD, parts[0]) if len(parts) == 1 else torch.cat([_project(x_MD, part) for part in parts], -1)


def add(x_MD: Tensor, y_MD: Tensor, part: Weight | nn.Module) -> Tensor:
    """``x + part(y)``, in one product where it can be."""
    if isinstance(part, tuple) and part[1] is None:
        return torch.addmm(x_MD, y_MD, part[0].t())
    return x_MD + _project(y_MD, part)


def joined_qkv(
    x_MD: Tensor, block: Block, shape: Shape, passes: Passes, turn: Turn, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys ``[*size, H + G, d]`` and values ``[*size, G, d]``."""
    heads, kv_heads, d, _ = shape
    joined = _project_all(passes.norm(x_MD, block.norm), block.qkv)
    joined = joined.view(*size, heads + 2 * kv_heads, d)
    qk, v = joined[:, :, : heads + kv_heads], joined[:, :, heads + kv_heads :]
    if block.paired:
        torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(turn.pairs)
        return qk, v
    return torch.addcmul(qk * turn.cos, qk.roll(d // 2, -1), turn.sin), v


def feed_forward(x_MD: Tensor, block: Block, passes: Passes) -> Tensor:
    joined = _project_all(passes.norm(x_MD, block.mlp_norm), block.gate_up)
    return add(x_MD, passes.gate(joined), block.down)


def plain_passes(act: Callable[[Tensor], Tensor], eps: float) -> Passes:
    def gate(joined: Tensor) -> Tensor:
        first, up = joined.chunk(2, -1)
        return act(first) * up

    return Passes(norm=lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, eps), gate=gate)


def compiled_passes(shape: Shape) -> Passes:
    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        out = llama_layer.norm(x.contiguous(), shape.eps, head=shape.width)
        return out if weight is None else out.mul_(weight)

    return Passes(norm=norm, gate=lambda joined: llama_layer.swiglu(joined, head=shape.width))


def turn_of(cos: Tensor, sin: Tensor, *, pairs: bool) -> Turn:
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    pairs = pairs and cos.dtype == torch.float32
    return Turn(cos, signed, torch.complex(cos[..., :half], sin[..., :half]) if pairs else cos)
