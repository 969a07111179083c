"""Decoding steps of a Llama-like language model for many samples of many prompts at once.

    prompts ─▶ one pass over each distinct prompt ─▶ keys and values, once a row ─┐
                                                                                ▼
    codes just drawn ─▶ embedding ─▶ one step over all samples of all rows ─▶ logits of the next
           ▲                                                                     │
           └──────────────────────── the sampler draws ◀─────────────────────────┘

The layers' weights are transformers' own (:mod:`couturier.components.generator.blocks`); what differs is the work
around them: keys and values lie in memory that is allocated once, prompts that occur twice are read once and their
padding goes through no product, and of the last layer only what the next token needs is computed. A small model's step
on a CPU is one call of compiled code (:mod:`couturier.kernels.llama_layer`); elsewhere it is PyTorch's calls over a
:class:`couturier.kernels.shared_prefix.PrefixCache`.

Steps have one shape from the first to the last where that pays: on a GPU they are recorded once as a CUDA graph and
replayed, and ``compile`` hands them to ``torch.compile``. Elsewhere a step looks only at the slots that are filled.

Legend: N distinct prompts, P prompt tokens, R rows (a prompt with some of its samples), n samples a row, M = R n,
D width, H heads, G key/value heads, d head width, S slots of a row, K codebook.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from couturier.components.errors import ConfigError
from couturier.components.generator.blocks import (
    Block,
    Passes,
    Shape,
    Turn,
    add,
    blocks_of,
    compiled_passes,
    feed_forward,
    joined_qkv,
    parts_of,
    plain_passes,
    shape_of,
    turn_of,
)
from couturier.kernels import llama_layer
from couturier.kernels.shared_prefix import PrefixCache, shared_prefix_attention

if TYPE_CHECKING:
    from transformers import LlamaModel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer


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
        self.shape = shape_of(lm)
        self.static = compile or device.type == "cuda"
        self.blocks = blocks or blocks_of(lm, tokens=0 if self.static else len(row_R) * samples * steps)
        after_R1 = prefix.position_NP[row_R, -1:] + 1
        positions_RT = after_R1 + torch.arange(steps, device=device)
        cos_RTd, sin_RTd = lm.rotary_emb(prefix.x_NPD, positions_RT)
        self.passes = plain_passes(cast("LlamaDecoderLayer", lm.layers[0]).mlp.act_fn, self.shape.eps)
        packed = [block.packed for block in self.blocks if block.packed]
        self.steps: llama_layer.Steps | None = None
        if not self.static and len(packed) == len(self.blocks):
            self.passes = compiled_passes(self.shape)
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
            self.turns = turn_of(cos_RTd[:, :, None, None], sin_RTd[:, :, None, None], pairs=not self.static)
        self.first_RK = self.decoder.head(self._read(prefix, row_R))[row_R]
        self.t = 0
        self.graph: _Graph | None = None
        if compile and any(isinstance(part, nn.Module) for block in self.blocks for part in parts_of(block)):
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
        turn = turn_of(cos.view(-1, 1, 1, d), sin.view(-1, 1, 1, d), pairs=not self.static)

        def boxed(rows_M1Gd: Tensor) -> Tensor:
            if whole:
                return rows_M1Gd.view(count, p, -1, d)
            box = rows_M1Gd.new_zeros(count * p, *rows_M1Gd.shape[2:])
            return box.index_copy_(0, real_M, rows_M1Gd[:, 0]).view(count, p, -1, d)

        for i, block in enumerate(self.blocks):
            qk, v = (boxed(part) for part in joined_qkv(x, block, self.shape, self.passes, turn, (len(x), 1)))
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
            x = feed_forward(add(x, mixed_MX, block.out), block, self.passes)
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

    def follow(self, from_Rn: Tensor) -> None:
        """Let each sample of a row go on from another of that row ``[R, n]``, as if it had drawn all its tokens."""
        (self.steps or self.cache).follow(from_Rn, self.t)

    def _last_norm(self, x_MD: Tensor) -> Tensor:
        return self.passes.norm(x_MD, self.decoder.lm.norm.weight)

    def _filled(self, x_MD: Tensor, turn: Turn, first: int, end: int) -> Tensor:
        """All layers over the slots that are filled."""
        cache, heads = self.cache, self.shape.heads
        bias, size = cache.bias_UnS[:, :, :end], (len(cache.bias_UnS), cache.samples)
        for i, block in enumerate(self.blocks):
            qk, v = joined_qkv(x_MD, block, self.shape, self.passes, turn, size)
            keys, values = cache.k_lUGSd[i], cache.v_lUGSd[i]
            keys[:, :, first:end], values[:, :, first:end] = qk[:, :, heads:].transpose(1, 2), v.transpose(1, 2)
            mixed = shared_prefix_attention(qk[:, :, :heads], keys[:, :, :end], values[:, :, :end], bias)
            x_MD = feed_forward(add(x_MD, mixed.reshape(len(x_MD), -1), block.out), block, self.passes)
        return x_MD

    def _static(self, x_MD: Tensor, turn: Turn, slots_n: Tensor) -> Tensor:
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
    shape: Shape,
    passes: Passes,
    cache: PrefixCache,
    x_MD: Tensor,
    slots_n: Tensor,
    *turn: Tensor,
) -> Tensor:
    heads, size = shape.heads, (len(cache.bias_UnS), cache.samples)
    later_S = torch.arange(cache.bias_UnS.shape[2], device=slots_n.device) > slots_n[-1]
    bias = cache.bias_UnS.masked_fill(later_S, float("-inf"))
    for i, block in enumerate(blocks):
        qk, v = joined_qkv(x_MD, block, shape, passes, Turn(*turn), size)
        keys, values = cache.k_lUGSd[i], cache.v_lUGSd[i]
        keys.index_copy_(2, slots_n, qk[:, :, heads:].transpose(1, 2))
        values.index_copy_(2, slots_n, v.transpose(1, 2))
        mixed = shared_prefix_attention(qk[:, :, :heads], keys, values, bias)
        x_MD = feed_forward(add(x_MD, mixed.reshape(len(x_MD), -1), block.out), block, passes)
    return x_MD


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_static_layers, dynamic=False)


def _causal_bias(mask_NP: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal attention bias ``[N, 1, P, P]``; padding sees itself only."""
    p = mask_NP.shape[1]
    eye = torch.eye(p, dtype=torch.bool, device=mask_NP.device)
    causal = torch.ones(p, p, dtype=torch.bool, device=mask_NP.device).tril()
    keep = (causal[None] & mask_NP[:, None]) | eye[None]
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, float("-inf"))[:, None]
