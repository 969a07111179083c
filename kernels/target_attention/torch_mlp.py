"""DIN's network in PyTorch without padding: scores, softmax and pooled values in one pass over nearly dense blocks.

For one row the first layer is linear in the behaviour: ``W1 [q, k, q - k, q * k] = (Wq + Wd) q + M k`` with
``M = Wp diag(q) + (Wk - Wd)``. All rows of a list meet the same behaviours, so one product a list makes all its pairs
and two give all their gradients: nothing is gathered or scattered a pair, and ``q * k`` never exists.

Legend: U lists, N behaviours, R rows, P pairs, H width of queries and keys, E of values, F of the first hidden layer;
inside a block G lists, C rows a list, L behaviours a list, Z = G L C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from couturier.kernels import dispatch
from couturier.kernels.jagged import Block, Places, blocks, pair_offsets

# Numbers of the first hidden layer made at a time: more miss the cache, fewer pay more for calls than for work.
_CHUNK = 1 << 18
# So many numbers of padding cost what one more block costs.
_SPARE = 1 << 18
# Up to so many bytes the hidden activations are kept for the backward; beyond it they are computed again.
_KEEP_BYTES = 1 << 26

Rest = Sequence[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class First:
    """The first layer in its split form."""

    queries_RH: Tensor
    from_query_RF: Tensor
    """``(Wq + Wd) q + b``."""
    from_key_FH: Tensor
    """``Wk - Wd``."""
    product_FH: Tensor
    """``Wp``."""

    @property
    def hidden(self) -> int:
        """F."""
        return self.product_FH.shape[0]

    def matrix(self, rows: Places) -> Tensor:
        """``M`` of every row, those of a list one below the other: ``[G, C F, H]``."""
        q_GC1H = rows.take(self.queries_RH)[:, :, None]
        return torch.addcmul(self.from_key_FH, self.product_FH, q_GC1H).flatten(1, 2)

    def out(self, rows: Places, keys_GLH: Tensor, out: Tensor | None = None) -> Tensor:
        """What comes out before the activation, ``[G, L, C F]``."""
        bias_G1X = rows.take(self.from_query_RF).flatten(1)[:, None]
        # Faster than baddbmm, which copies the bias to every place and reads it back.
        return torch.bmm(keys_GLH, self.matrix(rows).transpose(1, 2), out=out).add_(bias_G1X)


class FirstGrads:
    """Sums up the gradients of the first layer, chunk by chunk."""

    def __init__(self, first: First) -> None:
        self.first = first
        self.queries_RH, self.from_query_RF, self.from_key_FH, self.product_FH = (
            torch.zeros_like(one)
            for one in (first.queries_RH, first.from_query_RF, first.from_key_FH, first.product_FH)
        )

    def add(self, rows: Places, keys_GLH: Tensor, d_keys_GLH: Tensor, d_out: Tensor) -> None:
        """What ``d_out [G, L, C F]`` means for all of it, and for the block's keys."""
        lists, height = rows.index.shape
        d_keys_GLH.baddbmm_(d_out, self.first.matrix(rows))
        d_matrix_RFH = torch.bmm(d_out.transpose(1, 2), keys_GLH).view(lists * height, self.first.hidden, -1)
        q_RH = rows.take(self.first.queries_RH).flatten(0, 1)
        self.from_key_FH += d_matrix_RFH.sum(0)
        self.product_FH += (d_matrix_RFH * q_RH[:, None]).sum(0)
        rows.add(self.queries_RH, d_matrix_RFH.mul_(self.first.product_FH).sum(1).view(lists, height, -1))
        rows.add(self.from_query_RF, d_out.sum(1).view(lists, height, -1))


def chunks(offsets: Tensor, row_user: Tensor, hidden: int) -> Iterator[list[Block]]:
    """The blocks of all pairs, each cut into some rows of every list at a time; a list is never cut along itself."""
    for block in blocks(offsets, row_user, width=hidden, most=_CHUNK, spare=_SPARE):
        lists, rows = block.rows.index.shape
        step = max(1, _CHUNK // (lists * block.behaviours.index.shape[1] * hidden))
        if step >= rows:
            yield [block]
            continue
        index, pad = block.rows.index, block.rows.pad
        parts = (slice(at, at + step) for at in range(0, rows, step))
        yield [
            Block(
                rows=Places(index=index[:, part], pad=None if pad is None else pad[:, part], start=None),
                behaviours=block.behaviours,
            )
            for part in parts
        ]


def attend(
    first: First,
    keys_NH: Tensor,
    values_NE: Tensor,
    offsets: Tensor,
    row_user: Tensor,
    rest: Sequence[tuple[Tensor, Tensor | None]],
    scale: float,
    softmax: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Pooled values ``[R, E]`` and weights ``[P]`` of the network with sigmoids."""
    flat = [one for two in rest for one in two]
    out: tuple[Tensor, Tensor | None] = _Unit.apply(
        *vars(first).values(), keys_NH, values_NE, offsets, row_user, scale, softmax, want_weights, *flat
    )
    return out


def first_layer(first: First, keys_NH: Tensor, offsets: Tensor, row_user: Tensor) -> Tensor:
    """The first layer of every pair before its activation, ``[P, F]``, for activations that must see all at once."""
    out: Tensor = _All.apply(*vars(first).values(), keys_NH, offsets, row_user)
    return out


class _All(torch.autograd.Function):
    """The first layer alone: every block into one buffer, and from there into the order of pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_RH: Tensor,
        from_query_RF: Tensor,
        from_key_FH: Tensor,
        product_FH: Tensor,
        keys_NH: Tensor,
        offsets: Tensor,
        row_user: Tensor,
    ) -> Tensor:
        first = First(
            queries_RH=queries_RH, from_query_RF=from_query_RF, from_key_FH=from_key_FH, product_FH=product_FH
        )
        starts = pair_offsets(offsets, row_user)
        ctx.plan = [block for parts in chunks(offsets, row_user, first.hidden) for block in parts]
        sizes = [block.rows.index.numel() * block.behaviours.index.shape[1] for block in ctx.plan]
        box_ZF, ctx.place_P = keys_NH.new_empty(sum(sizes), first.hidden), starts.new_empty(int(starts[-1]))
        at, ctx.parts = 0, []
        for block, size in zip(ctx.plan, sizes, strict=True):
            keys = block.behaviours.take(keys_NH)
            part = slice(at, at + size)
            first.out(block.rows, keys, box_ZF[part].view(len(keys), keys.shape[1], -1))
            places = block.pairs(starts)
            # A box lies in the order [G, L, C], pairs in that of rows and then of behaviours.
            place_GCL = torch.arange(at, at + size, device=starts.device).view(len(keys), keys.shape[1], -1).mT
            if places.pad is None:
                ctx.place_P[places.index] = place_GCL
            else:
                real_GCL = ~places.pad.expand_as(place_GCL)
                ctx.place_P[places.index[real_GCL]] = place_GCL[real_GCL]
            ctx.parts.append(part)
            at += size
        ctx.save_for_backward(*vars(first).values(), keys_NH)
        return box_ZF.index_select(0, ctx.place_P)

    @staticmethod
    @once_differentiable
    @dispatch.outside_autocast
    def backward(ctx: Any, grad_PF: Tensor) -> tuple[Tensor | None, ...]:
        *own, keys_NH = ctx.saved_tensors
        first = First(queries_RH=own[0], from_query_RF=own[1], from_key_FH=own[2], product_FH=own[3])
        grads, d_k = FirstGrads(first), torch.zeros_like(keys_NH)
        total = ctx.parts[-1].stop if ctx.parts else 0
        d_box_ZF = grad_PF.new_zeros(total, first.hidden).index_copy_(0, ctx.place_P, grad_PF)
        for block, part in zip(ctx.plan, ctx.parts, strict=True):
            keys = block.behaviours.take(keys_NH)
            d_keys = torch.zeros_like(keys)
            grads.add(block.rows, keys, d_keys, d_box_ZF[part].view(len(keys), keys.shape[1], -1))
            block.behaviours.add(d_k, d_keys)
        return grads.queries_RH, grads.from_query_RF, grads.from_key_FH, grads.product_FH, d_k, None, None


class _Unit(torch.autograd.Function):
    """The whole attention unit."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_RH: Tensor,
        from_query_RF: Tensor,
        from_key_FH: Tensor,
        product_FH: Tensor,
        keys_NH: Tensor,
        values_NE: Tensor,
        offsets: Tensor,
        row_user: Tensor,
        scale: float,
        softmax: bool,
        want_weights: bool,
        *rest: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        first = First(
            queries_RH=queries_RH, from_query_RF=from_query_RF, from_key_FH=from_key_FH, product_FH=product_FH
        )
        starts = pair_offsets(offsets, row_user)
        pairs = int(starts[-1])
        pooled_RE = values_NE.new_zeros(row_user.numel(), values_NE.shape[1])
        weight_P = values_NE.new_zeros(pairs) if want_weights else None
        a_pair = sum(one.shape[1] for one in rest[::2] if one is not None) * keys_NH.element_size()
        keep = any(ctx.needs_input_grad) and pairs * a_pair <= _KEEP_BYTES
        ctx.plan, ctx.kept, weights = [], [], []
        for parts in chunks(offsets, row_user, first.hidden):
            ctx.plan.append(parts)
            keys = parts[0].behaviours.take(keys_NH)
            values = keys if keys_NH is values_NE else parts[0].behaviours.take(values_NE)
            for block in parts:
                hiddens = _hiddens(first, block, keys, rest)
                weight = _weights(block, hiddens[-1], rest, scale, softmax)
                block.rows.put(pooled_RE, torch.bmm(weight, values))
                if weight_P is not None:
                    block.pairs(starts).put(weight_P, weight)
                weights.append(weight)
                ctx.kept.append(hiddens if keep else None)
        ctx.save_for_backward(*vars(first).values(), keys_NH, values_NE, *rest, *weights)
        ctx.starts, ctx.scale, ctx.softmax, ctx.layers = starts, scale, softmax, len(rest)
        ctx.set_materialize_grads(False)
        return pooled_RE, weight_P

    @staticmethod
    @once_differentiable
    @dispatch.outside_autocast
    def backward(ctx: Any, grad_RE: Tensor | None, grad_P: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        first = First(queries_RH=saved[0], from_query_RF=saved[1], from_key_FH=saved[2], product_FH=saved[3])
        keys_NH, values_NE = saved[4:6]
        rest, weights = saved[6 : 6 + ctx.layers], iter(saved[6 + ctx.layers :])
        grads, d_rest = FirstGrads(first), [None if layer is None else torch.zeros_like(layer) for layer in rest]
        d_k, d_v = torch.zeros_like(keys_NH), torch.zeros_like(values_NE)
        kept = iter(ctx.kept)
        for parts in ctx.plan:
            behaviours = parts[0].behaviours
            keys, values = behaviours.take(keys_NH), behaviours.take(values_NE)
            d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
            for block in parts:
                weight = next(weights)
                hiddens = next(kept) or _hiddens(first, block, keys, rest)
                d_weight = torch.zeros_like(weight)
                if grad_RE is not None:
                    g = block.rows.without_padding(block.rows.take(grad_RE))
                    d_values.baddbmm_(weight.transpose(1, 2), g)
                    d_weight = torch.bmm(g, values.transpose(1, 2))
                if grad_P is not None:
                    places = block.pairs(ctx.starts)
                    d_weight = d_weight + places.without_padding(places.take(grad_P))
                d_score = weight * (d_weight - (weight * d_weight).sum(-1, keepdim=True)) if ctx.softmax else d_weight
                if not ctx.softmax and behaviours.pad is not None:
                    d_score.masked_fill_(behaviours.pad[:, None], 0.0)
                d_out = _through(d_score.transpose(1, 2).reshape(-1, 1).mul_(ctx.scale), hiddens, rest, d_rest)
                grads.add(block.rows, keys, d_keys, d_out.view(len(keys), keys.shape[1], -1))
            behaviours.add(d_k, d_keys)
            behaviours.add(d_v, d_values)
        own = (grads.queries_RH, grads.from_query_RF, grads.from_key_FH, grads.product_FH)
        return (*own, d_k, d_v, None, None, None, None, None, *d_rest)


def _hiddens(first: First, block: Block, keys_GLH: Tensor, rest: Rest) -> list[Tensor]:
    """The activations of every hidden layer of a chunk, ``[Z, F]`` and on."""
    out = [first.out(block.rows, keys_GLH).sigmoid_().view(-1, first.hidden)]
    for place in range(0, len(rest) - 2, 2):
        out.append(_linear(out[-1], rest[place], rest[place + 1]).sigmoid_())
    return out


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)


def _weights(block: Block, hidden: Tensor, rest: Rest, scale: float, softmax: bool) -> Tensor:
    """``[G, C, L]``, zeros where there is padding."""
    lists, length = block.behaviours.index.shape
    score = _linear(hidden, rest[-2], rest[-1]).view(lists, length, -1).transpose(1, 2).mul(scale)
    if block.behaviours.pad is not None:
        score.masked_fill_(block.behaviours.pad[:, None], float("-inf") if softmax else 0.0)
    return score.softmax(-1) if softmax else score.contiguous()


def _through(d_out: Tensor, hiddens: list[Tensor], rest: Rest, d_rest: list[Tensor | None]) -> Tensor:
    """From the scores' gradient ``[Z, 1]`` to that of the first layer's output ``[Z, F]``; adds to the layers' own."""
    for place in range(len(rest) - 2, -2, -2):
        hidden, weight, d_weight, d_bias = hiddens[place // 2], rest[place], d_rest[place], d_rest[place + 1]
        assert d_weight is not None and weight is not None
        d_weight.addmm_(d_out.T, hidden)
        if d_bias is not None:
            d_bias += d_out.sum(0)
        d_hidden = d_out * weight if len(weight) == 1 else d_out @ weight
        d_out = torch.ops.aten.sigmoid_backward(d_hidden, hidden)
    return d_out
