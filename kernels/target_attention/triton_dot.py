"""Dot-product target attention on a GPU: a tile of one list's rows reads that list once, with a running softmax.

Three kernels, no atomic adds: forward (tiles of rows), gradient of queries (tiles of rows), gradient of keys, values
and biases (tiles of behaviours). The scores of the pairs are kept in float32, 4 bytes a pair, so that no backward
kernel needs q . k again.

Legend: U lists, N behaviours, R rows, P pairs, H width of queries and keys, E of values; C rows and L behaviours of a
tile; a name B* is a width rounded up to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from couturier.kernels import dispatch
from couturier.kernels.jagged import pair_offsets

# The tile sizes are fixed, as the tables of tiles depend on them; what is tuned is how a tile is worked on. The first
# runs where nothing can be timed: under the interpreter, and when compiling without a GPU.
CONFIGS = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in ((4, 2), (8, 2), (4, 3), (2, 2))]

TILE_C = 16


def tile_l(dtype: torch.dtype, width: int) -> int:
    """Behaviours of a tile, so that registers suffice (``resources_sm90.json``)."""
    return (64 if width <= 128 else 32) if dtype.itemsize == 2 else (32 if width <= 64 else 16)


@triton.jit
def dot_fwd_kernel(
    q,
    k,
    v,
    behaviour_bias,
    pair_bias,
    out,
    score,
    lse,
    tile_user,
    tile_first,
    row_of,
    row_first,
    offsets,
    starts,
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    BH: tl.constexpr,
    BE: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    HAS_BB: tl.constexpr,
    HAS_PB: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # s_rj = scale q_r . k_j + biases; out_r = sum_j exp(s_rj - m_r) v_j / l_r; lse_r = m_r + ln l_r.
    i_u = tl.load(tile_user + tl.program_id(0).to(tl.int64))
    if i_u >= 0:
        slot = tl.load(tile_first + tl.program_id(0).to(tl.int64)) + tl.arange(0, C)
        m_c = slot < tl.load(row_first + i_u + 1)
        row = tl.load(row_of + slot, mask=m_c, other=0)
        low = tl.load(offsets + i_u)
        high = tl.load(offsets + i_u + 1)
        start = tl.load(starts + row, mask=m_c, other=0)
        o_h = tl.arange(0, BH)
        o_e = tl.arange(0, BE)
        # [C, BH]
        b_q = tl.load(q + row[:, None] * H + o_h[None, :], mask=m_c[:, None] & (o_h < H)[None, :], other=0.0)
        if UPCAST:
            b_q = b_q.to(tl.float32)
        b_m = tl.full([C], float("-inf"), tl.float32)
        b_l = tl.zeros([C], tl.float32)
        b_o = tl.zeros([C, BE], tl.float32)
        for done in range(0, high - low, L):
            n = low + done + tl.arange(0, L)
            m_n = n < high
            # [BH, L], [L, BE]
            b_k = tl.load(k + n[None, :] * H + o_h[:, None], mask=m_n[None, :] & (o_h < H)[:, None], other=0.0)
            b_v = tl.load(v + n[:, None] * E + o_e[None, :], mask=m_n[:, None] & (o_e < E)[None, :], other=0.0)
            if UPCAST:
                b_k = b_k.to(tl.float32)
                b_v = b_v.to(tl.float32)
            b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
            m_cn = m_c[:, None] & m_n[None, :]
            pair = start[:, None] + (n - low)[None, :]
            if HAS_BB:
                b_s += tl.load(behaviour_bias + n, mask=m_n, other=0.0).to(tl.float32)[None, :]
            if HAS_PB:
                b_s += tl.load(pair_bias + pair, mask=m_cn, other=0.0).to(tl.float32)
            tl.store(score + pair, b_s, mask=m_cn)
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
            b_new = tl.maximum(b_m, tl.max(b_s, axis=1))
            # A list of scores that are all -inf so far must not subtract -inf from -inf.
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_p = tl.exp(b_s - b_safe[:, None])
            b_keep = tl.exp(b_m - b_safe)
            b_l = b_l * b_keep + tl.sum(b_p, axis=1)
            b_o = b_o * b_keep[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
            b_m = b_new
        b_l = tl.where(b_l > 0, b_l, 1.0)
        b_o = b_o / b_l[:, None]
        p_o = out + row[:, None] * E + o_e[None, :]
        tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_c[:, None] & (o_e < E)[None, :])
        tl.store(lse + row, b_m + tl.log(b_l), mask=m_c)


@triton.jit
def dot_dq_kernel(
    k,
    v,
    g,
    g_weight,
    score,
    lse,
    delta,
    dq,
    d_score,
    tile_user,
    tile_first,
    row_of,
    row_first,
    offsets,
    starts,
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    BH: tl.constexpr,
    BE: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    HAS_GW: tl.constexpr,
    SOFTMAX: tl.constexpr,
    WANT_DQ: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # a = exp(s - lse); ds_rj = a_rj (g_r . v_j + gw_rj - delta_r); dq_r = scale sum_j ds_rj k_j.
    # Without SOFTMAX (the scores are the weights) ds_rj = g_r . v_j + gw_rj.
    i_u = tl.load(tile_user + tl.program_id(0).to(tl.int64))
    if i_u >= 0:
        slot = tl.load(tile_first + tl.program_id(0).to(tl.int64)) + tl.arange(0, C)
        m_c = slot < tl.load(row_first + i_u + 1)
        row = tl.load(row_of + slot, mask=m_c, other=0)
        low = tl.load(offsets + i_u)
        high = tl.load(offsets + i_u + 1)
        start = tl.load(starts + row, mask=m_c, other=0)
        o_h = tl.arange(0, BH)
        o_e = tl.arange(0, BE)
        # [C, BE]
        b_g = tl.load(g + row[:, None] * E + o_e[None, :], mask=m_c[:, None] & (o_e < E)[None, :], other=0.0)
        b_lse = tl.load(lse + row, mask=m_c, other=0.0)
        b_delta = tl.load(delta + row, mask=m_c, other=0.0)
        if UPCAST:
            b_g = b_g.to(tl.float32)
        b_dq = tl.zeros([C, BH], tl.float32)
        for done in range(0, high - low, L):
            n = low + done + tl.arange(0, L)
            m_n = n < high
            m_cn = m_c[:, None] & m_n[None, :]
            pair = start[:, None] + (n - low)[None, :]
            # [BE, L]
            b_v = tl.load(v + n[None, :] * E + o_e[:, None], mask=m_n[None, :] & (o_e < E)[:, None], other=0.0)
            if UPCAST:
                b_v = b_v.to(tl.float32)
            b_da = tl.dot(b_g, b_v, input_precision=PRECISION)
            if HAS_GW:
                b_da += tl.load(g_weight + pair, mask=m_cn, other=0.0).to(tl.float32)
            b_ds = b_da
            if SOFTMAX:
                b_s = tl.load(score + pair, mask=m_cn, other=float("-inf"))
                b_ds = tl.exp(b_s - b_lse[:, None]) * (b_da - b_delta[:, None])
            tl.store(d_score + pair, b_ds, mask=m_cn)
            if WANT_DQ:
                # [L, BH]
                b_k = tl.load(k + n[:, None] * H + o_h[None, :], mask=m_n[:, None] & (o_h < H)[None, :], other=0.0)
                if UPCAST:
                    b_k = b_k.to(tl.float32)
                b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
        if WANT_DQ:
            p_dq = dq + row[:, None] * H + o_h[None, :]
            tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_c[:, None] & (o_h < H)[None, :])


@triton.jit
def dot_dkv_kernel(
    q,
    g,
    score,
    lse,
    d_score,
    dk,
    dv,
    d_bias,
    tile_user,
    tile_first,
    row_of,
    row_first,
    offsets,
    starts,
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    BH: tl.constexpr,
    BE: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dk_j = scale sum_r ds_rj q_r; dv_j = sum_r a_rj g_r; dbias_j = sum_r ds_rj.
    i_u = tl.load(tile_user + tl.program_id(0).to(tl.int64))
    if i_u >= 0:
        n = tl.load(tile_first + tl.program_id(0).to(tl.int64)) + tl.arange(0, L)
        low = tl.load(offsets + i_u)
        m_n = n < tl.load(offsets + i_u + 1)
        first = tl.load(row_first + i_u)
        last = tl.load(row_first + i_u + 1)
        o_h = tl.arange(0, BH)
        o_e = tl.arange(0, BE)
        b_dk = tl.zeros([L, BH], tl.float32)
        b_dv = tl.zeros([L, BE], tl.float32)
        b_db = tl.zeros([L], tl.float32)
        for done in range(0, last - first, C):
            slot = first + done + tl.arange(0, C)
            m_c = slot < last
            row = tl.load(row_of + slot, mask=m_c, other=0)
            m_nc = m_n[:, None] & m_c[None, :]
            pair = tl.load(starts + row, mask=m_c, other=0)[None, :] + (n - low)[:, None]
            # [C, BH], [C, BE], [L, C]
            b_q = tl.load(q + row[:, None] * H + o_h[None, :], mask=m_c[:, None] & (o_h < H)[None, :], other=0.0)
            b_g = tl.load(g + row[:, None] * E + o_e[None, :], mask=m_c[:, None] & (o_e < E)[None, :], other=0.0)
            b_lse = tl.load(lse + row, mask=m_c, other=0.0)
            if UPCAST:
                b_q = b_q.to(tl.float32)
                b_g = b_g.to(tl.float32)
            b_ds = tl.load(d_score + pair, mask=m_nc, other=0.0)
            b_a = tl.exp(tl.load(score + pair, mask=m_nc, other=float("-inf")) - b_lse[None, :])
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
            b_dv += tl.dot(b_a.to(b_g.dtype), b_g, input_precision=PRECISION)
            b_db += tl.sum(b_ds, axis=1)
        p_dk = dk + n[:, None] * H + o_h[None, :]
        p_dv = dv + n[:, None] * E + o_e[None, :]
        tl.store(p_dk, (b_dk * scale).to(dk.dtype.element_ty), mask=m_n[:, None] & (o_h < H)[None, :])
        tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=m_n[:, None] & (o_e < E)[None, :])
        tl.store(d_bias + n, b_db, mask=m_n)


_configs = CONFIGS[:1] if dispatch.interpreting() else CONFIGS
_fwd = triton.autotune(_configs, key=["H", "E", "C", "L"])(dot_fwd_kernel)
_dq = triton.autotune(_configs, key=["H", "E", "C", "L", "WANT_DQ"])(dot_dq_kernel)
_dkv = triton.autotune(_configs, key=["H", "E", "C", "L"])(dot_dkv_kernel)


def tiles(first_U: Tensor, total: int, size: int) -> tuple[Tensor, Tensor, int]:
    """Cut runs ``[first[u], first[u + 1])`` into tiles, with no word from the device to the host.

    Returns:
        The list of each tile (-1: no tile), the first place of it, and the number of tiles, an upper bound.
    """
    count_U = (first_U.diff() + size - 1) // size
    after_U = count_U.cumsum(0)
    most = triton.cdiv(total, size) + count_U.numel()
    tile = torch.arange(most, device=first_U.device)
    user = torch.searchsorted(after_U, tile, right=True)
    inside = user.clamp_max(max(count_U.numel() - 1, 0))
    place = first_U[inside] + (tile - (after_U - count_U)[inside]) * size
    return torch.where(user < count_U.numel(), user, -1), place, most


def rows_by_user(row_user: Tensor, users: int) -> tuple[Tensor, Tensor]:
    """The rows in the order of their lists ``[R]``, and where each list begins in it ``[U + 1]``."""
    count_U = torch.bincount(row_user, minlength=users)
    return torch.argsort(row_user, stable=True), torch.cat([count_U.new_zeros(1), count_U.cumsum(0)])


class DotAttention(torch.autograd.Function):
    """Pooled values and, if wanted, the weights of the pairs. Inputs are contiguous and of one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        behaviour_bias: Tensor | None,
        pair_bias: Tensor | None,
        offsets: Tensor,
        row_user: Tensor,
        scale: float,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        starts = pair_offsets(offsets, row_user)
        row_of, row_first = rows_by_user(row_user, offsets.numel() - 1)
        # In float32, as the backward subtracts g . out from numbers near it.
        out, lse = (torch.zeros(*size, device=q.device) for size in ((q.shape[0], v.shape[1]), (q.shape[0],)))
        score = q.new_empty(int(starts[-1]), dtype=torch.float32)
        ctx.sizes = sizes = _sizes(q, v)
        user, place, count = tiles(row_first, q.shape[0], sizes["C"])
        if count and v.shape[0]:
            unused = lse
            bb, pb = (unused if one is None else one for one in (behaviour_bias, pair_bias))
            flags = {"HAS_BB": behaviour_bias is not None, "HAS_PB": pair_bias is not None}
            jagged = (user, place, row_of, row_first, offsets, starts)
            _fwd[(count,)](q, k, v, bb, pb, out, score, lse, *jagged, scale, **sizes, **flags)
        weight = None
        if want_weights:
            weight = torch.exp(score - torch.repeat_interleave(lse, starts.diff(), output_size=score.numel())).to(q)
        ctx.save_for_backward(q, k, v, out, score, lse, offsets, row_of, row_first, starts)
        ctx.scale, ctx.dtypes = scale, [None if b is None else b.dtype for b in (behaviour_bias, pair_bias)]
        ctx.set_materialize_grads(False)
        return out.to(q), weight

    @staticmethod
    @once_differentiable
    @dispatch.outside_autocast
    def backward(ctx: Any, g: Tensor | None, g_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, score, lse, offsets, row_of, row_first, starts = ctx.saved_tensors
        g = torch.zeros_like(out, dtype=q.dtype) if g is None else g.contiguous()
        delta = row_delta(g, out, g_weight, score, lse, starts)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_bias, d_score = lse.new_zeros(k.shape[0]), torch.zeros_like(score)
        sizes = ctx.sizes
        if q.shape[0] and k.shape[0]:
            user, place, count = tiles(row_first, q.shape[0], sizes["C"])
            jagged = (row_of, row_first, offsets, starts, ctx.scale)
            gw = score if g_weight is None else g_weight.contiguous()
            flag = {"HAS_GW": g_weight is not None, "SOFTMAX": True, "WANT_DQ": True}
            _dq[(count,)](k, v, g, gw, score, lse, delta, dq, d_score, user, place, *jagged, **sizes, **flag)
            user, place, count = tiles(offsets, k.shape[0], sizes["L"])
            _dkv[(count,)](q, g, score, lse, d_score, dk, dv, d_bias, user, place, *jagged, **sizes)
        biases = [None if t is None else one.to(t) for one, t in zip((d_bias, d_score), ctx.dtypes, strict=True)]
        return dq, dk, dv, *biases, None, None, None, None


def row_delta(g: Tensor, out: Tensor, g_weight: Tensor | None, score: Tensor, lse: Tensor, starts: Tensor) -> Tensor:
    """What the softmax subtracts in its backward: g_r . out_r, and the sum of weight times its own gradient."""
    delta = (g.float() * out.float()).sum(1)
    if g_weight is None:
        return delta
    row_P = torch.repeat_interleave(starts.diff(), output_size=score.numel())
    return delta.index_add(0, row_P, torch.exp(score - lse[row_P]) * g_weight.float())


def score_gradient(
    v: Tensor,
    g: Tensor,
    g_weight: Tensor | None,
    score: Tensor,
    lse: Tensor,
    delta: Tensor,
    jagged: tuple[Tensor, Tensor, Tensor, Tensor],
    softmax: bool,
) -> Tensor:
    """The gradient ``[P]`` of given scores under pooling; ``jagged`` is (row_of, row_first, offsets, starts)."""
    d_score = torch.zeros_like(score)
    sizes = {**_sizes(g, v), "HAS_GW": g_weight is not None, "SOFTMAX": softmax, "WANT_DQ": False}
    user, place, count = tiles(jagged[1], g.shape[0], sizes["C"])
    gw = score if g_weight is None else g_weight.contiguous()
    if count and v.shape[0]:
        _dq[(count,)](v, v, g, gw, score, lse, delta, score, d_score, user, place, *jagged, 1.0, **sizes)
    return d_score


def _sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    interpreted = dispatch.interpreting()
    return {
        "H": q.shape[1],
        "E": v.shape[1],
        "BH": max(16, triton.next_power_of_2(q.shape[1])),
        "BE": max(16, triton.next_power_of_2(v.shape[1])),
        "C": TILE_C,
        "L": tile_l(q.dtype, max(q.shape[1], v.shape[1])),
        "UPCAST": interpreted,
        "PRECISION": "ieee" if interpreted else "tf32x3",
    }
