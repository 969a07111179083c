"""Linear attention in chunks: matrix products inside a chunk, one running state between chunks. The CPU's fast path.

All chunks of all sequences and heads are worked on by the same batched matrix products; only the states pass from chunk
to chunk in a Python loop. The backward is written out, since autograd would keep and copy twice as much.

Legend: N tokens of all sequences, U sequences, H heads, D width of keys, E width of values, C tokens of a chunk,
n chunks of all sequences, m chunks of a block, P = m H products in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Matrices in a batched product: enough to hide the call, few enough (0.5 MB at C = D = 32) to stay in the cache.
PRODUCTS = 128


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Where the tokens of each sequence lie among the chunks, and in which steps states pass from chunk to chunk."""

    chunks: int
    """n, over all sequences."""
    size: int
    """C."""
    steps: list[slice]
    """Step i holds the i-th chunks of the sequences that have so many: chunk numbers, longest sequence first."""
    order: Tensor | None
    """Sequences from the longest to the shortest, ``[U]``; None: as they come."""
    place_N: Tensor | None
    """Place of each token among the ``n C`` places of the chunks; None: as they come, without a gap."""
    lengths_n: Tensor
    """Tokens in each chunk, ``[n]``; one entry for all if all are full."""


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
    wide = state_UHDE.dtype
    packed = [_pack(x.to(wide), plan) for x in (q_NHD, k_NHD, v_NHE)]
    state = state_UHDE if plan.order is None else state_UHDE[plan.order]
    out, final = _Chunked.apply(*packed, slopes_H.to(wide), state, plan)
    if plan.order is not None:
        final = final[plan.order.argsort()]
    out = out.flatten(0, 1)
    return (out if plan.place_N is None else out[plan.place_N]).to(v_NHE.dtype), final


def _plan(offsets: Tensor, length: int | None, chunk: int) -> _Plan:
    device = offsets.device
    lengths = offsets.diff() if length is None else torch.full_like(offsets[1:], length)
    size = min(chunk, int(lengths.max()))
    if length is not None and length % size == 0:
        each = length // size
        steps = [slice(i, None, each) for i in range(each)]
        full = torch.tensor([size], device=device)
        return _Plan(chunks=lengths.numel() * each, size=size, steps=steps, order=None, place_N=None, lengths_n=full)
    order = lengths.argsort(descending=True, stable=True)
    chunks_U = (lengths[order] + size - 1) // size
    most = int(chunks_U[0])
    # The i-th chunks of all sequences lie side by side, so that a step of the states is one slice.
    active = (chunks_U > torch.arange(most, device=device)[:, None]).sum(1)
    first = torch.cat([active.new_zeros(1), active.cumsum(0)])
    rank_U = order.argsort()
    row = torch.arange(lengths.numel(), device=device).repeat_interleave(lengths)
    t = torch.arange(row.numel(), device=device) - offsets[:-1].repeat_interleave(lengths)
    chunk_N = first[t // size] + rank_U[row]
    bounds = first.tolist()
    lengths_n = torch.bincount(chunk_N, minlength=bounds[-1])
    return _Plan(
        chunks=bounds[-1],
        size=size,
        steps=[slice(low, high) for low, high in zip(bounds, bounds[1:], strict=False)],
        order=order,
        place_N=chunk_N * size + t % size,
        lengths_n=lengths_n,
    )


def _pack(x_NHF: Tensor, plan: _Plan) -> Tensor:
    """``[n, C, H, F]``; places without a token hold zeros, which add nothing to any sum."""
    shape = (plan.chunks, plan.size, *x_NHF.shape[1:])
    if plan.place_N is None:
        return x_NHF.view(shape)
    return x_NHF.new_zeros(plan.chunks * plan.size, *x_NHF.shape[1:]).index_copy(0, plan.place_N, x_NHF).view(shape)


def _blocks(plan: _Plan, heads: int) -> list[slice]:
    each = max(1, PRODUCTS // heads)
    return [slice(low, low + each) for low in range(0, plan.chunks, each)]


def _batch(x_mCHF: Tensor) -> Tensor:
    """``[P, C, F]``, a copy: one matrix a chunk and head of a block of m chunks."""
    m, size, heads, width = x_mCHF.shape
    return x_mCHF.new_empty(m, heads, size, width).copy_(x_mCHF.transpose(1, 2)).view(-1, size, width)


def _heads(x_PCF: Tensor, heads: int) -> Tensor:
    """The view ``[m, H, C, F]`` of a batch."""
    return x_PCF.view(-1, heads, *x_PCF.shape[1:])


@dataclass(frozen=True, kw_only=True)
class _Decay:
    """Every power of the decay that the chunks need. All exponents are at most 0, so nothing overflows."""

    inside_HCC: Tensor
    """From place b to place a of a chunk, 0 where b comes after a."""
    read_HC1: Tensor
    """What is left of the state before the chunk when place a reads it."""
    write_nHC1: Tensor
    """What is left of place a at the end of its chunk."""
    over_nH11: Tensor
    """What is left of the state over a whole chunk."""


def _decay(slopes_H: Tensor, plan: _Plan) -> _Decay:
    a = torch.arange(plan.size, device=slopes_H.device)
    apart = a[:, None] - a
    left_nC = (plan.lengths_n[:, None] - 1 - a).clamp_min(0)
    write_nHC1 = torch.exp(-slopes_H[:, None] * left_nC[:, None])[..., None]
    over_nH11 = torch.exp(-slopes_H * plan.lengths_n[:, None])[:, :, None, None]
    return _Decay(
        inside_HCC=torch.exp(-slopes_H[:, None, None] * apart.clamp_min(0)) * (apart >= 0),
        read_HC1=torch.exp(-slopes_H[:, None] * (a + 1))[:, :, None],
        write_nHC1=write_nHC1.expand(plan.chunks, -1, -1, -1),
        over_nH11=over_nH11.expand(plan.chunks, -1, -1, -1),
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
    """The chunked form on packed tensors; formulas in README.md, "Chunks" and "Backward".

    Chunks are worked on in blocks that stay in the processor's cache, and only the states between chunks are kept for
    the backward, which computes the small squares again.
    """

    @staticmethod
    def forward(
        ctx: Any, q_nCHD: Tensor, k_nCHD: Tensor, v_nCHE: Tensor, slopes_H: Tensor, state_UHDE: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        heads = slopes_H.numel()
        decay = _decay(slopes_H, plan)
        before = q_nCHD.new_empty(plan.chunks, *state_UHDE.shape[1:])
        for block in _blocks(plan, heads):
            k, v = _batch(k_nCHD[block]), _batch(v_nCHE[block])
            _heads(k, heads).mul_(decay.write_nHC1[block])
            torch.bmm(k.transpose(1, 2), v, out=before[block].flatten(0, 1))
        final = _scan(before, state_UHDE, decay.over_nH11, plan.steps)
        out_nCHE = torch.empty_like(v_nCHE)
        for block in _blocks(plan, heads):
            q, k, v = _batch(q_nCHD[block]), _batch(k_nCHD[block]), _batch(v_nCHE[block])
            scores = torch.bmm(q, k.transpose(1, 2))
            _heads(scores, heads).mul_(decay.inside_HCC)
            out = torch.bmm(q, before[block].flatten(0, 1))
            _heads(out, heads).mul_(decay.read_HC1)
            out_nCHE[block] = _heads(out.baddbmm_(scores, v), heads).transpose(1, 2)
        ctx.save_for_backward(q_nCHD, k_nCHD, v_nCHE, slopes_H, before)
        ctx.plan = plan
        return out_nCHE, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_nCHE: Tensor, final_UHDE: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(g_nCHE.device.type, enabled=False):
            return _Chunked._backward(ctx, g_nCHE, final_UHDE)

    @staticmethod
    def _backward(ctx: Any, g_nCHE: Tensor, final_UHDE: Tensor) -> tuple[Tensor | None, ...]:
        q_nCHD, k_nCHD, v_nCHE, slopes_H, before = ctx.saved_tensors
        plan: _Plan = ctx.plan
        heads = slopes_H.numel()
        decay = _decay(slopes_H, plan)
        after = torch.empty_like(before)
        for block in _blocks(plan, heads):
            q, g = _batch(q_nCHD[block]), _batch(g_nCHE[block])
            _heads(g, heads).mul_(decay.read_HC1)
            torch.bmm(q.transpose(1, 2), g, out=after[block].flatten(0, 1))
        initial = _scan(after, final_UHDE, decay.over_nH11, plan.steps[::-1])
        grads = [torch.empty_like(x) for x in (q_nCHD, k_nCHD, v_nCHE)]
        for block in _blocks(plan, heads):
            q, k, v, g = (_batch(x[block]) for x in (q_nCHD, k_nCHD, v_nCHE, g_nCHE))
            before_PDE, after_PDE = before[block].flatten(0, 1), after[block].flatten(0, 1)
            scores, d_scores = torch.bmm(q, k.transpose(1, 2)), torch.bmm(g, v.transpose(1, 2))
            for square in (scores, d_scores):
                _heads(square, heads).mul_(decay.inside_HCC)
            dq, dk, dv = g @ before_PDE.transpose(1, 2), v @ after_PDE.transpose(1, 2), k @ after_PDE
            for one, left in ((dq, decay.read_HC1), (dk, decay.write_nHC1[block]), (dv, decay.write_nHC1[block])):
                _heads(one, heads).mul_(left)
            dq.baddbmm_(d_scores, k)
            dk.baddbmm_(d_scores.transpose(1, 2), q)
            dv.baddbmm_(scores.transpose(1, 2), g)
            for whole, one in zip(grads, (dq, dk, dv), strict=True):
                whole[block] = _heads(one, heads).transpose(1, 2)
        return *grads, None, initial, None
