"""Decoding steps of a Llama-like language model for many samples of many prompts at once.

    prompts ─▶ one pass over each distinct prompt ─▶ keys and values, once a row ─┐
                                                                                ▼
    codes just drawn ─▶ embedding ─▶ one step over all samples of all rows ─▶ logits of the next
           ▲                                                                     │
           └──────────────────────── the sampler draws ◀─────────────────────────┘

The layers are transformers' own modules with their own weights; what differs is the work around them. The projections
that read the same input, and the norm before them, are joined into one matrix for the time of a call (where they are
plain and small), keys and values lie in memory that is allocated once
(:class:`couturier.kernels.shared_prefix.PrefixCache`), prompts that occur twice are read once, and of the last layer
only what the next token needs is computed.

Steps have one shape from the first to the last where that pays: on a GPU they are recorded once as a CUDA graph and
replayed, and ``compile`` hands them to ``torch.compile``. Elsewhere a step looks only at the slots that are filled.

Legend: N distinct prompts, P prompt tokens, R rows (a prompt with some of its samples), n samples a row, M = R n,
D width, H heads, G key/value heads, d head width, S slots of a row, K codebook.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from couturier.components.errors import ConfigError
from couturier.kernels import llama_layer
from couturier.kernels.shared_prefix import PrefixCache, shared_prefix_attention

if TYPE_CHECKING:
    from transformers import LlamaModel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

# Joining copies weights; beyond this many a layer the copy costs more than it saves.
_JOIN_BELOW = 1 << 22

# Numbers that go through layers from which on a batch is worth asking a compiler, once a process.
_COMPILE_FROM = 1 << 18

Weight = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The parts of a model that draw its next token."""

    lm: LlamaModel
    """Decoder layers in Llama's form: norm, attention with rotary positions, norm, gated feed-forward."""
    head: Callable[[Tensor], Tensor]
    """Hidden state ``[..., D]`` → logits ``[..., K]``."""
    embed: Callable[[Tensor], Tensor]
    """Tokens or codes ``[...]`` → embeddings ``[..., D]``."""
    mark: Callable[[int], Tensor | None] = lambda at: None
    """What is read after the token drawn at a place and before the next, ``[D]``; None where nothing is."""


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Prompts ready to be read, left-padded: x_NPD embeddings, mask_NP True where a token counts, position_NP."""

    x_NPD: Tensor
    mask_NP: Tensor
    position_NP: Tensor


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


class _Shape(NamedTuple):
    """What a layer must know beside its weights."""

    heads: int
    kv_heads: int
    width: int
    eps: float


class _Passes(NamedTuple):
    """What rows go through between products."""

    norm: Callable[[Tensor, Tensor | None], Tensor]
    """Rows and, unless it is in the weights that read them, the norm's weight → rows."""
    gate: Callable[[Tensor], Tensor]
    """Gate and up side by side → what goes down."""


class _Turn(NamedTuple):
    """Rotary tables, to be multiplied with ``[*size, heads, d]``."""

    cos: Tensor
    sin: Tensor
    """The first half with a minus, which the swapped first half needs in transformers' half-split form."""
    pairs: Tensor
    """The same as complex numbers ``[…, d / 2]``, for layers with pairs; elsewhere it is not looked at."""

    def at(self, t: int) -> _Turn:
        return _Turn(*(table[:, t] for table in self))


class Decoding:
    """The state of one batch of samples.

    Args:
        decoder: the model.
        prefix: the distinct prompts.
        row_R: which prompt each row of samples follows.
        samples: n, samples a row.
        steps: how often :meth:`step` will be called.
        compile: let ``torch.compile`` make the step. The first call of a shape takes long, later ones are faster.
        blocks: of :func:`blocks_of`, where several batches of one model are decoded side by side.

    Raises:
        ConfigError: ``compile`` for a model whose projections are not plain matrices.
    """

    def __init__(
        self,
        decoder: Decoder,
        prefix: Prefix,
        row_R: Tensor,
        *,
        samples: int,
        steps: int,
        compile: bool = False,
        blocks: list[Block] | None = None,
    ) -> None:
        self.decoder, lm = decoder, decoder.lm
        device = prefix.x_NPD.device
        self.shape = _shape(lm)
        self.static = compile or device.type == "cuda"
        self.blocks = blocks or blocks_of(lm, tokens=0 if self.static else len(row_R) * samples * steps)
        after_R1 = prefix.position_NP[row_R, -1:] + 1
        positions_RT = after_R1 + torch.arange(steps, device=device)
        cos_RTd, sin_RTd = lm.rotary_emb(prefix.x_NPD, positions_RT)
        self.passes = _plain_passes(cast("LlamaDecoderLayer", lm.layers[0]).mlp.act_fn, self.shape.eps)
        packed = [block.packed for block in self.blocks if block.packed]
        self.steps: llama_layer.Steps | None = None
        if not self.static and len(packed) == len(self.blocks):
            self.passes = _compiled_passes(self.shape)
            self.steps = llama_layer.Steps(
                packed,
                prefix.mask_NP,
                row_R,
                samples=samples,
                heads=self.shape.heads,
                kv_heads=self.shape.kv_heads,
                cos_RTd=cos_RTd,
                sin_RTd=sin_RTd,
                eps=self.shape.eps,
            )
        else:
            self.cache = PrefixCache(
                prefix.mask_NP[row_R],
                samples=samples,
                tokens=steps,
                layers=len(self.blocks),
                heads=self.shape.kv_heads,
                like=prefix.x_NPD.new_empty(self.shape.width),
                all_at_once=self.static,
            )
            self.turns = _turn(cos_RTd[:, :, None, None], sin_RTd[:, :, None, None], pairs=not self.static)
        self.first_RK = self.decoder.head(self._read(prefix, row_R))[row_R]
        self.t = 0
        self.graph: _Graph | None = None
        if compile and any(isinstance(part, nn.Module) for block in self.blocks for part in _parts(block)):
            raise ConfigError(
                "sampler setting compile is True for a model whose projections are not plain matrices (adapters?). "
                "Merge them into the weights first, or leave compile off."
            )
        self._layers = _compiled() if compile else _static_layers

    def _read(self, prefix: Prefix, row_R: Tensor) -> Tensor:
        """One pass over the prompts: fills the cache; the last hidden state of each ``[N, D]``."""
        count, p, _ = prefix.x_NPD.shape
        cos, sin = self.decoder.lm.rotary_emb(prefix.x_NPD, prefix.position_NP)
        bias = _causal_bias(prefix.mask_NP, prefix.x_NPD.dtype)
        heads, kv_heads, d, _ = self.shape
        # Only what counts goes through the products; padding stands in attention alone.
        real_M = prefix.mask_NP.flatten().nonzero()[:, 0]
        whole = self.static or len(real_M) == count * p
        x = prefix.x_NPD.flatten(0, 1)
        if not whole:
            x, cos, sin = (rows.flatten(0, -2)[real_M] for rows in (x, cos, sin))
        turn = _turn(cos.view(-1, 1, 1, d), sin.view(-1, 1, 1, d), pairs=not self.static)

        def boxed(rows_M1Gd: Tensor) -> Tensor:
            if whole:
                return rows_M1Gd.view(count, p, -1, d)
            box = rows_M1Gd.new_zeros(count * p, *rows_M1Gd.shape[2:])
            return box.index_copy_(0, real_M, rows_M1Gd[:, 0]).view(count, p, -1, d)

        for i, block in enumerate(self.blocks):
            qk, v = (boxed(part) for part in _qkv(x, block, self.shape, self.passes, turn, (len(x), 1)))
            if self.steps:
                self.steps.keep(i, qk[:, :, heads:], v)
            k = qk[:, :, heads:].transpose(1, 2)
            q, v = qk[:, :, :heads].transpose(1, 2), v.transpose(1, 2)
            if not self.steps:
                self.cache.k_lUGSd[i, :, :, :p] = k[row_R]
                self.cache.v_lUGSd[i, :, :, :p] = v[row_R]
            last = i + 1 == len(self.blocks)
            if last:
                # Nothing reads the last layer of a prompt but the token that follows it.
                counts_N = prefix.mask_NP.new_full((count,), p, dtype=torch.int64) if whole else prefix.mask_NP.sum(1)
                q, bias, x = q[:, :, -1:], bias[:, :, -1:], x[counts_N.cumsum(0) - 1]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=heads != kv_heads)
            mixed_MX = mixed.transpose(1, 2).reshape(-1, heads * d)
            if not (whole or last):
                mixed_MX = mixed_MX[real_M]
            x = _feed_forward(_add(x, mixed_MX, block.out), block, self.passes)
        return self._last_norm(x)

    def first_logits(self) -> Tensor:
        """Logits of the first token, the same for all samples of a row: ``[R, K]``."""
        return self.first_RK

    def step(self, x_RnD: Tensor) -> Tensor:
        """Feed the embeddings of the tokens just drawn; logits ``[R, n, K]`` of the next."""
        t = self.t
        self.t += 1
        x_MD = x_RnD.flatten(0, 1)
        if self.steps:
            return self.decoder.head(self._last_norm(self.steps.step(x_MD, t))).unflatten(0, x_RnD.shape[:2])
        turn, cache = self.turns.at(t), self.cache
        if self.static:
            hidden = self._static(x_MD, turn, torch.arange(cache.end(t), cache.end(t + 1), device=x_MD.device))
        else:
            hidden = self._filled(x_MD, turn, cache.end(t), cache.end(t + 1))
        return self.decoder.head(self._last_norm(hidden)).unflatten(0, x_RnD.shape[:2])

    def _last_norm(self, x_MD: Tensor) -> Tensor:
        return self.passes.norm(x_MD, self.decoder.lm.norm.weight)

    def _filled(self, x_MD: Tensor, turn: _Turn, first: int, end: int) -> Tensor:
        """All layers over the slots that are filled."""
        cache, heads = self.cache, self.shape.heads
        bias, size = cache.bias_UnS[:, :, :end], (len(cache.bias_UnS), cache.samples)
        for i, block in enumerate(self.blocks):
            qk, v = _qkv(x_MD, block, self.shape, self.passes, turn, size)
            keys, values = cache.k_lUGSd[i], cache.v_lUGSd[i]
            keys[:, :, first:end], values[:, :, first:end] = qk[:, :, heads:].transpose(1, 2), v.transpose(1, 2)
            mixed = shared_prefix_attention(qk[:, :, :heads], keys[:, :, :end], values[:, :, :end], bias)
            x_MD = _feed_forward(_add(x_MD, mixed.reshape(len(x_MD), -1), block.out), block, self.passes)
        return x_MD

    def _static(self, x_MD: Tensor, turn: _Turn, slots_n: Tensor) -> Tensor:
        """All layers over all slots: every step has the same shape."""
        inputs = (x_MD, slots_n, *turn)
        if x_MD.device.type != "cuda" or self._layers is not _static_layers:
            return self._layers(self.blocks, self.shape, self.passes, self.cache, *inputs)
        if self.graph is None:
            self.graph = _Graph(
                lambda *now: _static_layers(self.blocks, self.shape, self.passes, self.cache, *now), inputs
            )
        return self.graph.replay(inputs)


class _Graph:
    """A function recorded as a CUDA graph at its first call."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self.inputs = [one.clone() for one in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # Running it writes the same keys to the same slots again, so warming up changes nothing.
        with torch.cuda.stream(side):
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = function(*self.inputs)

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        for kept, now in zip(self.inputs, inputs, strict=True):
            kept.copy_(now)
        self.graph.replay()
        return self.out


def _static_layers(
    blocks: list[Block],
    shape: _Shape,
    passes: _Passes,
    cache: PrefixCache,
    x_MD: Tensor,
    slots_n: Tensor,
    *turn: Tensor,
) -> Tensor:
    heads, size = shape.heads, (len(cache.bias_UnS), cache.samples)
    later_S = torch.arange(cache.bias_UnS.shape[2], device=slots_n.device) > slots_n[-1]
    bias = cache.bias_UnS.masked_fill(later_S, float("-inf"))
    for i, block in enumerate(blocks):
        qk, v = _qkv(x_MD, block, shape, passes, _Turn(*turn), size)
        keys, values = cache.k_lUGSd[i], cache.v_lUGSd[i]
        keys.index_copy_(2, slots_n, qk[:, :, heads:].transpose(1, 2))
        values.index_copy_(2, slots_n, v.transpose(1, 2))
        mixed = shared_prefix_attention(qk[:, :, :heads], keys, values, bias)
        x_MD = _feed_forward(_add(x_MD, mixed.reshape(len(x_MD), -1), block.out), block, passes)
    return x_MD


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_static_layers, dynamic=False)


def blocks_of(lm: LlamaModel, *, tokens: int) -> list[Block]:
    """A model's layers with joined weights, for as long as these do not change.

    Args:
        tokens: how many of all samples will go through the layers; 0 for steps of one shape, as on a GPU.
    """
    shape, layers = _shape(lm), cast("Sequence[LlamaDecoderLayer]", lm.layers)
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


def _packed(block: Block, shape: _Shape) -> llama_layer.Weights:
    parts = (*block.qkv, block.out, *block.gate_up, block.down)
    return llama_layer.Weights.of(*(cast(Weight, part)[0].t() for part in parts), head=shape.width)


def _is_bare(block: Block) -> bool:
    """Whether a layer's projections are products without biases, joined, with the norms in them."""
    parts = _parts(block)
    return (
        len(parts) == 4
        and block.norm is None
        and block.mlp_norm is None
        and all(isinstance(part, tuple) and part[1] is None for part in parts)
    )


def _shape(lm: LlamaModel) -> _Shape:
    heads, first = int(lm.config.num_attention_heads), cast("LlamaDecoderLayer", lm.layers[0])
    kv_heads = int(lm.config.num_key_value_heads or heads)
    return _Shape(heads, kv_heads, int(first.self_attn.head_dim), float(first.input_layernorm.variance_epsilon))


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


def _paired(part: Weight, shape: _Shape) -> Weight:
    """Rows of queries and keys in the order 0, d / 2, 1, d / 2 + 1, …: their products with each other stay the same,
    and a rotation becomes one complex product."""
    turned = (shape.heads + shape.kv_heads) * shape.width

    def reorder(rows: Tensor) -> Tensor:
        halves = rows[:turned].unflatten(0, (-1, 2, shape.width // 2))
        return torch.cat([halves.transpose(1, 2).flatten(0, 2), rows[turned:]])

    weight, bias = part
    return reorder(weight), None if bias is None else reorder(bias)


def _parts(block: Block) -> list[Weight | nn.Module]:
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


def _add(x_MD: Tensor, y_MD: Tensor, part: Weight | nn.Module) -> Tensor:
    """``x + part(y)``, in one product where it can be."""
    if isinstance(part, tuple) and part[1] is None:
        return torch.addmm(x_MD, y_MD, part[0].t())
    return x_MD + _project(y_MD, part)


def _qkv(
    x_MD: Tensor, block: Block, shape: _Shape, passes: _Passes, turn: _Turn, size: tuple[int, int]
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


def _feed_forward(x_MD: Tensor, block: Block, passes: _Passes) -> Tensor:
    joined = _project_all(passes.norm(x_MD, block.mlp_norm), block.gate_up)
    return _add(x_MD, passes.gate(joined), block.down)


def _plain_passes(act: Callable[[Tensor], Tensor], eps: float) -> _Passes:
    def gate(joined: Tensor) -> Tensor:
        first, up = joined.chunk(2, -1)
        return act(first) * up

    return _Passes(norm=lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, eps), gate=gate)


def _compiled_passes(shape: _Shape) -> _Passes:
    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        out = llama_layer.norm(x.contiguous(), shape.eps, head=shape.width)
        return out if weight is None else out.mul_(weight)

    return _Passes(norm=norm, gate=lambda joined: llama_layer.swiglu(joined, head=shape.width))


def _turn(cos: Tensor, sin: Tensor, *, pairs: bool) -> _Turn:
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    pairs = pairs and cos.dtype == torch.float32
    return _Turn(cos, signed, torch.complex(cos[..., :half], sin[..., :half]) if pairs else cos)


def _causal_bias(mask_NP: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal attention bias ``[N, 1, P, P]``; padding sees itself only."""
    p = mask_NP.shape[1]
    eye = torch.eye(p, dtype=torch.bool, device=mask_NP.device)
    causal = torch.ones(p, p, dtype=torch.bool, device=mask_NP.device).tril()
    keep = (causal[None] & mask_NP[:, None]) | eye[None]
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, float("-inf"))[:, None]
