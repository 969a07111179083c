"""Linear attention in chunks: matrix products inside a chunk, one running state between chunks. The CPU's fast path.

Chunks of all sequences and heads go through the same batched matrix products, in blocks that stay in the processor's
cache; only the states pass from chunk to chunk in a Python loop. The backward is written out, since autograd would keep
and copy several times as much: here it keeps the inputs and the states between chunks.

Legend: N tokens of all sequences, U sequences, H heads, D width of keys, E width of values, F either, C tokens of a
chunk, n chunks of all sequences, m chunks of a block, P = m H products in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Matrices in a batched product: enough to hide the call, few enough (0.5 MB at C = D = 32) to stay in the cache.
PRODUCTS = 128


def linear_attention(
    q_NHD: Tensor,
    k_NHD: Tensor,
    v_NHE: Tensor,
    slopes_H: Tensor,
    state_UHDE: Tensor,
    offsets: Tensor,
    length: int | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """As :func:`couturier.kernels.linear_attention.reference.linear_attention`, in O(N (C + D) (D + E)).

    Args:
        length: the length of every sequence, where all have one.
        chunk: C, at most.

    Returns:
        ``[N, H, E]`` typed like v, and ``[U, H, D, E]`` typed like the state.
    """
    if not v_NHE.numel():
        return v_NHE.clone(), state_UHDE.clone()
    plan = _plan(offsets, length, chunk)
    places = plan.places
    if places is None:
        packed = [x.view(plan.chunks, plan.size, *x.shape[1:]) for x in (q_NHD, k_NHD, v_NHE)]
        out, final = _Chunked.apply(*packed, slopes_H, state_UHDE, plan)
        return out.flatten(0, 1), final
    packed = [_Pack.apply(x, places) for x in (q_NHD, k_NHD, v_NHE)]
    out, final = _Chunked.apply(*packed, slopes_H, state_UHDE[places.order], plan)
    return _Unpack.apply(out, places), final[places.order.argsort()]


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where the tokens of jagged sequences lie among the places of the chunks."""

    order: Tensor
    """Sequences from the longest to the shortest, ``[U]``."""
    token_nC: Tensor
    """The token in each place; the last of its sequence where there is none."""
    place_N: Tensor
    """The place of each token."""
    real_nC: Tensor
    """Whether a place holds a token, not padding."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Where the tokens of each sequence lie among the chunks, and in which steps states pass from chunk to chunk."""

    chunks: int
    """n, over all sequences."""
    size: int
    """C."""
    steps: list[slice]
    """Step i holds the i-th chunks of the sequences that have so many: chunk numbers, longest sequence first."""
    lengths_n: Tensor
    """Tokens in each chunk."""
    places: _Places | None = None
    """None: tokens lie as they come, without a gap."""


def _plan(offsets: Tensor, length: int | None, chunk: int) -> _Plan:
    device = offsets.device
    lengths = offsets.diff() if length is None else torch.full_like(offsets[1:], length)
    size = min(chunk, int(lengths.max()))
    if length is not None and length % size == 0:
        each = length // size
        chunks = lengths.numel() * each
        full = torch.full((chunks,), size, device=device)
        return _Plan(chunks=chunks, size=size, steps=[slice(i, None, each) for i in range(each)], lengths_n=full)
    order = lengths.argsort(descending=True, stable=True)
    chunks_U = (lengths[order] + size - 1) // size
    # The i-th chunks of all sequences lie side by side, so that a step of the states is one slice.
    number_i = torch.arange(int(chunks_U[0]), device=device)
    active_i = (chunks_U > number_i[:, None]).sum(1)
    bounds = [0, *active_i.cumsum(0).tolist()]
    number_n = number_i.repeat_interleave(active_i)
    sequence_n = order[torch.arange(bounds[-1], device=device) - torch.tensor(bounds[:-1], device=device)[number_n]]
    place_nC = number_n[:, None] * size + torch.arange(size, device=device)
    left_n = lengths[sequence_n]
    real_nC = place_nC < left_n[:, None]
    token_nC = offsets[sequence_n][:, None] + torch.minimum(place_nC, left_n[:, None] - 1)
    place_N = torch.empty_like(token_nC.view(-1)[: int(offsets[-1])])
    place_N[token_nC[real_nC]] = real_nC.view(-1).nonzero()[:, 0]
    return _Plan(
        chunks=bounds[-1],
        size=size,
        steps=[slice(low, high) for low, high in zip(bounds, bounds[1:], strict=False)],
        lengths_n=real_nC.sum(1),
        places=_Places(order=order, token_nC=token_nC, place_N=place_N, real_nC=real_nC),
    )


class _Pack(torch.autograd.Function):
    """``[N, H, F]`` -> ``[n, C, H, F]``; padding repeats the last token of its sequence, and passes nothing back."""

    @staticmethod
    def forward(ctx: Any, x_NHF: Tensor, places: _Places) -> Tensor:
        ctx.places = places
        return x_NHF.index_select(0, places.token_nC.view(-1)).view(*places.token_nC.shape, *x_NHF.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_nCHF: Tensor) -> tuple[Tensor, None]:
        return g_nCHF.flatten(0, 1).index_select(0, ctx.places.place_N), None


class _Unpack(torch.autograd.Function):
    """``[n, C, H, F]`` -> ``[N, H, F]``; backward, padding is zero."""

    @staticmethod
    def forward(ctx: Any, x_nCHF: Tensor, places: _Places) -> Tensor:
        ctx.places = places
        return x_nCHF.flatten(0, 1).index_select(0, places.place_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NHF: Tensor) -> tuple[Tensor, None]:
        token_nC, real_nC = ctx.places.token_nC, ctx.places.real_nC
        g = g_NHF.index_select(0, token_nC.view(-1)).view(*token_nC.shape, *g_NHF.shape[1:])
        return g.mul_(real_nC[:, :, None, None]), None


def _blocks(plan: _Plan, heads: int) -> list[slice]:
    each = max(1, PRODUCTS // heads)
    return [slice(low, low + each) for low in range(0, plan.chunks, each)]


def _take(x_mCHF: Tensor, dtype: torch.dtype) -> Tensor:
    """``[P, C, F]``, a copy: one matrix a chunk and head."""
    m, size, heads, width = x_mCHF.shape
    out = torch.empty(m, heads, size, width, dtype=dtype, device=x_mCHF.device)
    return out.copy_(x_mCHF.transpose(1, 2)).view(-1, size, width)


def _scale(x_PCF: Tensor, by: Tensor) -> Tensor:
    """Multiply in place by something that is broadcast against ``[m, H, C, F]``."""
    x_PCF.view(-1, by.shape[-3], *x_PCF.shape[1:]).mul_(by)
    return x_PCF


def _put(out_mCHF: Tensor, x_PCF: Tensor) -> None:
    out_mCHF.copy_(x_PCF.view(-1, out_mCHF.shape[2], *x_PCF.shape[1:]).transpose(1, 2))


@dataclass(frozen=True, kw_only=True)
class _Decay:
    """Every power of the decay that the chunks need. All exponents are at most 0, so nothing overflows."""

    inside_HCC: Tensor
    """From place b to place a of a chunk, 0 where b comes after a."""
    read_HC1: Tensor
    """What is left of the state before the chunk when place a reads it."""
    write_nHC1: Tensor
    """What is left of place a at the end of its chunk; 0 for padding."""
    over_nH11: Tensor
    """What is left of the state over a whole chunk."""


def _decay(slopes_H: Tensor, plan: _Plan) -> _Decay:
    a = torch.arange(plan.size, device=slopes_H.device)
    apart = a[:, None] - a
    left_nC = plan.lengths_n[:, None] - 1 - a
    write_nHC = torch.exp(-slopes_H[:, None] * left_nC.clamp_min(0)[:, None]) * (left_nC >= 0)[:, None]
    return _Decay(
        inside_HCC=torch.exp(-slopes_H[:, None, None] * apart.clamp_min(0)) * (apart >= 0),
        read_HC1=torch.exp(-slopes_H[:, None] * (a + 1))[:, :, None],
        write_nHC1=write_nHC[..., None],
        over_nH11=torch.exp(-slopes_H * plan.lengths_n[:, None])[:, :, None, None],
    )


def _scan(add_nHDE: Tensor, state_UHDE: Tensor, over_nH11: Tensor, steps: list[slice]) -> Tensor:
    """``state = over state + add``, chunk after chunk, all sequences side by side; in place of what each chunk adds
    comes the state before it. Returns the states after the last."""
    state = state_UHDE.clone()
    for step in steps:
        add = add_nHDE[step]
        now = state[: add.shape[0]]
        after = torch.addcmul(add, now, over_nH11[step])
        add.copy_(now)
        now.copy_(after)
    return state


class _Chunked(torch.autograd.Function):
    """The chunked form; formulas in README.md, "Chunks" and "Backward"."""

    @staticmethod
    def forward(
        ctx: Any, q_nCHD: Tensor, k_nCHD: Tensor, v_nCHE: Tensor, slopes_H: Tensor, state_UHDE: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        decay, dtype = _decay(slopes_H, plan), state_UHDE.dtype
        before = state_UHDE.new_empty(plan.chunks, *state_UHDE.shape[1:])
        for block in _blocks(plan, slopes_H.numel()):
            k, v = _take(k_nCHD[block], dtype), _take(v_nCHE[block], dtype)
            _scale(k, decay.write_nHC1[block])
            torch.bmm(k.transpose(1, 2), v, out=before[block].flatten(0, 1))
        final = _scan(before, state_UHDE, decay.over_nH11, plan.steps)
        out = torch.empty_like(v_nCHE)
        for block in _blocks(plan, slopes_H.numel()):
            q, k, v = (_take(x[block], dtype) for x in (q_nCHD, k_nCHD, v_nCHE))
            scores = _scale(torch.bmm(q, k.transpose(1, 2)), decay.inside_HCC)
            read = _scale(torch.bmm(q, before[block].flatten(0, 1)), decay.read_HC1)
            _put(out[block], read.baddbmm_(scores, v))
        ctx.save_for_backward(q_nCHD, k_nCHD, v_nCHE, slopes_H, before)
        ctx.plan = plan
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_nCHE: Tensor, g_final_UHDE: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(g_nCHE.device.type, enabled=False):
            return _Chunked._backward(ctx, g_nCHE, g_final_UHDE)

    @staticmethod
    def _backward(ctx: Any, g_nCHE: Tensor, g_final_UHDE: Tensor) -> tuple[Tensor | None, ...]:
        q_nCHD, k_nCHD, v_nCHE, slopes_H, before = ctx.saved_tensors
        plan: _Plan = ctx.plan
        decay, dtype = _decay(slopes_H, plan), before.dtype
        after = torch.empty_like(before)
        for block in _blocks(plan, slopes_H.numel()):
            q, g = _take(q_nCHD[block], dtype), _scale(_take(g_nCHE[block], dtype), decay.read_HC1)
            torch.bmm(q.transpose(1, 2), g, out=after[block].flatten(0, 1))
        g_initial = _scan(after, g_final_UHDE, decay.over_nH11, plan.steps[::-1])
        grads = [torch.empty_like(x) for x in (q_nCHD, k_nCHD, v_nCHE)]
        for block in _blocks(plan, slopes_H.numel()):
            q, k, v, g = (_take(x[block], dtype) for x in (q_nCHD, k_nCHD, v_nCHE, g_nCHE))
            before_PDE, after_PDE = before[block].flatten(0, 1), after[block].flatten(0, 1)
            write = decay.write_nHC1[block]
            scores = _scale(torch.bmm(q, k.transpose(1, 2)), decay.inside_HCC)
            d_scores = _scale(torch.bmm(g, v.transpose(1, 2)), decay.inside_HCC)
            dq = _scale(torch.bmm(g, before_PDE.transpose(1, 2)), decay.read_HC1).baddbmm_(d_scores, k)
            dk = _scale(torch.bmm(v, after_PDE.transpose(1, 2)), write).baddbmm_(d_scores.transpose(1, 2), q)
            dv = _scale(torch.bmm(k, after_PDE), write).baddbmm_(scores.transpose(1, 2), g)
            for whole, one in zip(grads, (dq, dk, dv), strict=True):
                _put(whole[block], one)
        return *grads, None, g_initial, None
