"""DIN's attention unit on a GPU: two sigmoid layers, score, softmax and pooling of a row in one kernel.

The parts of the first layer that belong to a row and to a behaviour alone come in ready (two plain matrix products);
the kernel adds the part of the pair, Wp (q * k), and everything after it, and writes nothing a pair but its score. The
backward computes the hidden layers again: one kernel by tiles of behaviours (gradients of keys and values), one by rows
(gradients of queries and weights, each program summing its rows, then one sum over programs: no atomic adds).

Legend: U lists, N behaviours, R rows, P pairs, H width of queries and keys, E of values, F and G of the hidden layers;
L behaviours of a tile; a name B* is a width rounded up to a power of two; W programs.
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
from couturier.kernels.target_attention.triton_dot import row_delta, rows_by_user, score_gradient, tiles

# What is tuned; the first runs where nothing can be timed.
CONFIGS = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in ((8, 2), (4, 2), (8, 1))]

# Programs that walk over the rows: enough to fill the multiprocessors of any GPU of today, few enough to sum over.
PROGRAMS = 264


def tile_l(dtype: torch.dtype) -> int:
    """Behaviours of a tile, so that registers suffice (``resources_sm90.json``)."""
    return 32 if dtype.itemsize == 2 else 16


def reload(dtype: torch.dtype) -> bool:
    """Whether a tile reads the weights anew: as float32 they do not all fit the shared memory beside each other."""
    return dtype.itemsize == 4


@triton.jit
def _hidden(b_x, b_first, b_fq, b_fk, b_w2, b_b2, PRECISION: tl.constexpr):
    # a1 = sigmoid(Wp x + from_query + from_key); a2 = sigmoid(W2 a1 + b2).   [L, BF], [L, BG]
    b_a1 = tl.sigmoid(tl.dot(b_x, b_first, input_precision=PRECISION) + b_fq[None, :] + b_fk)
    b_a2 = tl.sigmoid(tl.dot(b_a1.to(b_w2.dtype), b_w2, input_precision=PRECISION) + b_b2[None, :])
    return b_a1, b_a2


@triton.jit
def _back(b_da, b_a1, b_a2, b_w3, b_w2t, PRECISION: tl.constexpr):
    # From the gradient of the score to that of the two layers before their sigmoid.   [L, BG], [L, BF]
    b_z2 = b_da[:, None] * b_w3[None, :] * b_a2 * (1 - b_a2)
    b_z1 = tl.dot(b_z2.to(b_w2t.dtype), b_w2t, input_precision=PRECISION) * b_a1 * (1 - b_a1)
    return b_z2, b_z1


@triton.jit
def _matrix(pointer, o_0, o_1, n_0, n_1, stride_0, stride_1, UPCAST: tl.constexpr, AGAIN: tl.constexpr = False):
    # AGAIN: the compiler may not take this load out of a loop.
    mask = (o_0 < n_0)[:, None] & (o_1 < n_1)[None, :]
    p_block = pointer + o_0[:, None] * stride_0 + o_1[None, :] * stride_1
    block = tl.load(p_block, mask=mask, other=0.0, volatile=AGAIN)
    return block.to(tl.float32) if UPCAST else block


@triton.jit
def mlp_fwd_kernel(
    q,
    k,
    v,
    from_query,
    from_key,
    wp,
    w2,
    b2,
    w3,
    b3,
    out,
    score,
    lse,
    row_user,
    offsets,
    starts,
    R,
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    G: tl.constexpr,
    BH: tl.constexpr,
    BE: tl.constexpr,
    BF: tl.constexpr,
    BG: tl.constexpr,
    L: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RELOAD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # s_rj = scale (w3 . a2(a1(q_r * k_j)) + b3); out_r = sum_j w_rj v_j, w = softmax(s_r) or s_r.
    o_h, o_e, o_f, o_g = tl.arange(0, BH), tl.arange(0, BE), tl.arange(0, BF), tl.arange(0, BG)
    if not RELOAD:
        b_first = _matrix(wp, o_h, o_f, H, F, 1, H, UPCAST)
        b_w2 = _matrix(w2, o_f, o_g, F, G, 1, F, UPCAST)
    b_b2 = tl.load(b2 + o_g, mask=o_g < G, other=0.0).to(tl.float32)
    b_w3 = tl.load(w3 + o_g, mask=o_g < G, other=0.0).to(tl.float32)
    b_b3 = tl.load(b3).to(tl.float32)
    for i_r in range(tl.program_id(0), R, tl.num_programs(0)):
        row = tl.cast(i_r, tl.int64)
        i_u = tl.load(row_user + row)
        low = tl.load(offsets + i_u)
        high = tl.load(offsets + i_u + 1)
        start = tl.load(starts + row)
        b_q = tl.load(q + row * H + o_h, mask=o_h < H, other=0.0)
        b_fq = tl.load(from_query + row * F + o_f, mask=o_f < F, other=0.0).to(tl.float32)
        b_m = tl.full([1], float("-inf"), tl.float32)
        b_l = tl.zeros([1], tl.float32)
        b_o = tl.zeros([BE], tl.float32)
        for done in range(0, high - low, L):
            n = low + done + tl.arange(0, L)
            m_n = n < high
            b_k = _matrix(k, n, o_h, high, H, H, 1, UPCAST)
            b_v = _matrix(v, n, o_e, high, E, E, 1, UPCAST).to(tl.float32)
            b_fk = _matrix(from_key, n, o_f, high, F, F, 1, UPCAST).to(tl.float32)
            if RELOAD:
                b_first = _matrix(wp, o_h, o_f, H, F, 1, H, UPCAST, True)
                b_w2 = _matrix(w2, o_f, o_g, F, G, 1, F, UPCAST, True)
            b_a1, b_a2 = _hidden((b_k * b_q[None, :]).to(b_k.dtype), b_first, b_fq, b_fk, b_w2, b_b2, PRECISION)
            b_s = (tl.sum(b_a2 * b_w3[None, :], axis=1) + b_b3) * scale
            tl.store(score + start + n - low, b_s, mask=m_n)
            if SOFTMAX:
                b_s = tl.where(m_n, b_s, float("-inf"))
                b_new = tl.maximum(b_m, tl.max(b_s, axis=0))
                b_p = tl.exp(b_s - b_new)
                b_keep = tl.exp(b_m - b_new)
                b_l = b_l * b_keep + tl.sum(b_p, axis=0)
                b_o = b_o * b_keep + tl.sum(b_p[:, None] * b_v, axis=0)
                b_m = b_new
            else:
                b_o += tl.sum(tl.where(m_n, b_s, 0.0)[:, None] * b_v, axis=0)
        if SOFTMAX:
            b_l = tl.where(b_l > 0, b_l, 1.0)
            b_o = b_o / b_l
            tl.store(lse + row + tl.arange(0, 1), b_m + tl.log(b_l))
        tl.store(out + row * E + o_e, b_o.to(out.dtype.element_ty), mask=o_e < E)


@triton.jit
def mlp_dkv_kernel(
    q,
    k,
    from_query,
    from_key,
    wp,
    w2,
    b2,
    w3,
    g,
    weight,
    d_score,
    dk,
    dv,
    d_from_key,
    tile_user,
    tile_first,
    row_of,
    row_first,
    offsets,
    starts,
    H: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    G: tl.constexpr,
    BH: tl.constexpr,
    BE: tl.constexpr,
    BF: tl.constexpr,
    BG: tl.constexpr,
    L: tl.constexpr,
    RELOAD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Over the rows of the list: dv_j += w_rj g_r; d_from_key_j += z1_rj; dk_j += (Wp^T z1_rj) * q_r.
    i_u = tl.load(tile_user + tl.program_id(0).to(tl.int64))
    if i_u >= 0:
        o_h, o_e, o_f, o_g = tl.arange(0, BH), tl.arange(0, BE), tl.arange(0, BF), tl.arange(0, BG)
        n = tl.load(tile_first + tl.program_id(0).to(tl.int64)) + tl.arange(0, L)
        low = tl.load(offsets + i_u)
        high = tl.load(offsets + i_u + 1)
        m_n = n < high
        if not RELOAD:
            b_first = _matrix(wp, o_h, o_f, H, F, 1, H, UPCAST)
            b_back = _matrix(wp, o_f, o_h, F, H, H, 1, UPCAST)
            b_w2 = _matrix(w2, o_f, o_g, F, G, 1, F, UPCAST)
            b_w2t = _matrix(w2, o_g, o_f, G, F, F, 1, UPCAST)
        b_b2 = tl.load(b2 + o_g, mask=o_g < G, other=0.0).to(tl.float32)
        b_w3 = tl.load(w3 + o_g, mask=o_g < G, other=0.0).to(tl.float32)
        b_k = _matrix(k, n, o_h, high, H, H, 1, UPCAST)
        b_fk = _matrix(from_key, n, o_f, high, F, F, 1, UPCAST).to(tl.float32)
        b_dk = tl.zeros([L, BH], tl.float32)
        b_dv = tl.zeros([L, BE], tl.float32)
        b_dfk = tl.zeros([L, BF], tl.float32)
        for slot in range(tl.load(row_first + i_u), tl.load(row_first + i_u + 1)):
            row = tl.load(row_of + slot)
            pair = tl.load(starts + row) + n - low
            b_q = tl.load(q + row * H + o_h, mask=o_h < H, other=0.0)
            b_fq = tl.load(from_query + row * F + o_f, mask=o_f < F, other=0.0).to(tl.float32)
            b_g = tl.load(g + row * E + o_e, mask=o_e < E, other=0.0).to(tl.float32)
            if RELOAD:
                b_first = _matrix(wp, o_h, o_f, H, F, 1, H, UPCAST, True)
                b_w2 = _matrix(w2, o_f, o_g, F, G, 1, F, UPCAST, True)
            b_a1, b_a2 = _hidden((b_k * b_q[None, :]).to(b_k.dtype), b_first, b_fq, b_fk, b_w2, b_b2, PRECISION)
            b_ds = tl.load(d_score + pair, mask=m_n, other=0.0)
            if RELOAD:
                b_back = _matrix(wp, o_f, o_h, F, H, H, 1, UPCAST, True)
                b_w2t = _matrix(w2, o_g, o_f, G, F, F, 1, UPCAST, True)
            _, b_z1 = _back(b_ds, b_a1, b_a2, b_w3, b_w2t, PRECISION)
            b_dk += tl.dot(b_z1.to(b_back.dtype), b_back, input_precision=PRECISION) * b_q.to(tl.float32)[None, :]
            b_dv += tl.load(weight + pair, mask=m_n, other=0.0)[:, None] * b_g[None, :]
            b_dfk += b_z1
        m_nh = m_n[:, None] & (o_h < H)[None, :]
        tl.store(dk + n[:, None] * H + o_h[None, :], b_dk.to(dk.dtype.element_ty), mask=m_nh)
        m_ne = m_n[:, None] & (o_e < E)[None, :]
        tl.store(dv + n[:, None] * E + o_e[None, :], b_dv.to(dv.dtype.element_ty), mask=m_ne)
        m_nf = m_n[:, None] & (o_f < F)[None, :]
        tl.store(d_from_key + n[:, None] * F + o_f[None, :], b_dfk.to(d_from_key.dtype.element_ty), mask=m_nf)


@triton.jit
def mlp_dq_kernel(
    q,
    k,
    from_query,
    from_key,
    wp,
    w2,
    b2,
    w3,
    d_score,
    dq,
    d_from_query,
    d_wp,
    d_w2,
    d_b2,
    d_w3,
    row_user,
    offsets,
    starts,
    R,
    H: tl.constexpr,
    F: tl.constexpr,
    G: tl.constexpr,
    BH: tl.constexpr,
    BF: tl.constexpr,
    BG: tl.constexpr,
    L: tl.constexpr,
    RELOAD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dq_r = sum_j (Wp^T z1) * k_j; d_from_query_r = sum_j z1; dWp, dW2, dw3: sums of z1 (q * k)^T, z2 a1^T, ds a2.
    o_h, o_f, o_g = tl.arange(0, BH), tl.arange(0, BF), tl.arange(0, BG)
    if not RELOAD:
        b_first = _matrix(wp, o_h, o_f, H, F, 1, H, UPCAST)
        b_back = _matrix(wp, o_f, o_h, F, H, H, 1, UPCAST)
        b_w2 = _matrix(w2, o_f, o_g, F, G, 1, F, UPCAST)
        b_w2t = _matrix(w2, o_g, o_f, G, F, F, 1, UPCAST)
    b_b2 = tl.load(b2 + o_g, mask=o_g < G, other=0.0).to(tl.float32)
    b_w3 = tl.load(w3 + o_g, mask=o_g < G, other=0.0).to(tl.float32)
    b_dwp = tl.zeros([BF, BH], tl.float32)
    b_dw2 = tl.zeros([BG, BF], tl.float32)
    b_db2 = tl.zeros([BG], tl.float32)
    b_dw3 = tl.zeros([BG], tl.float32)
    for i_r in range(tl.program_id(0), R, tl.num_programs(0)):
        row = tl.cast(i_r, tl.int64)
        i_u = tl.load(row_user + row)
        low = tl.load(offsets + i_u)
        high = tl.load(offsets + i_u + 1)
        start = tl.load(starts + row)
        b_q = tl.load(q + row * H + o_h, mask=o_h < H, other=0.0)
        b_fq = tl.load(from_query + row * F + o_f, mask=o_f < F, other=0.0).to(tl.float32)
        b_dq = tl.zeros([BH], tl.float32)
        b_dfq = tl.zeros([BF], tl.float32)
        for done in range(0, high - low, L):
            n = low + done + tl.arange(0, L)
            b_k = _matrix(k, n, o_h, high, H, H, 1, UPCAST)
            b_fk = _matrix(from_key, n, o_f, high, F, F, 1, UPCAST).to(tl.float32)
            b_x = (b_k * b_q[None, :]).to(b_k.dtype)
            if RELOAD:
                b_first = _matrix(wp, o_h, o_f, H, F, 1, H, UPCAST, True)
                b_w2 = _matrix(w2, o_f, o_g, F, G, 1, F, UPCAST, True)
            b_a1, b_a2 = _hidden(b_x, b_first, b_fq, b_fk, b_w2, b_b2, PRECISION)
            b_ds = tl.load(d_score + start + n - low, mask=n < high, other=0.0)
            if RELOAD:
                b_back = _matrix(wp, o_f, o_h, F, H, H, 1, UPCAST, True)
                b_w2t = _matrix(w2, o_g, o_f, G, F, F, 1, UPCAST, True)
            b_z2, b_z1 = _back(b_ds, b_a1, b_a2, b_w3, b_w2t, PRECISION)
            b_dx = tl.dot(b_z1.to(b_back.dtype), b_back, input_precision=PRECISION)
            b_dq += tl.sum(b_dx * b_k.to(tl.float32), axis=0)
            b_dfq += tl.sum(b_z1, axis=0)
            b_dwp += tl.dot(tl.trans(b_z1).to(b_x.dtype), b_x, input_precision=PRECISION)
            b_dw2 += tl.dot(tl.trans(b_z2).to(b_w2.dtype), b_a1.to(b_w2.dtype), input_precision=PRECISION)
            b_db2 += tl.sum(b_z2, axis=0)
            b_dw3 += tl.sum(b_ds[:, None] * b_a2, axis=0)
        tl.store(dq + row * H + o_h, b_dq.to(dq.dtype.element_ty), mask=o_h < H)
        tl.store(d_from_query + row * F + o_f, b_dfq.to(d_from_query.dtype.element_ty), mask=o_f < F)
    i_w = tl.program_id(0).to(tl.int64)
    m_fh = (o_f < F)[:, None] & (o_h < H)[None, :]
    tl.store(d_wp + (i_w * F + o_f[:, None]) * H + o_h[None, :], b_dwp, mask=m_fh)
    m_gf = (o_g < G)[:, None] & (o_f < F)[None, :]
    tl.store(d_w2 + (i_w * G + o_g[:, None]) * F + o_f[None, :], b_dw2, mask=m_gf)
    tl.store(d_b2 + i_w * G + o_g, b_db2, mask=o_g < G)
    tl.store(d_w3 + i_w * G + o_g, b_dw3, mask=o_g < G)


_configs = CONFIGS[:1] if dispatch.interpreting() else CONFIGS
_keys = ["H", "F", "G", "L"]
_fwd = triton.autotune(_configs, key=_keys)(mlp_fwd_kernel)
_dkv = triton.autotune(_configs, key=_keys)(mlp_dkv_kernel)
_dq = triton.autotune(_configs, key=_keys)(mlp_dq_kernel)


class MlpAttention(torch.autograd.Function):
    """Pooled values and, if wanted, the weights of the pairs. Inputs are contiguous and of one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        from_query: Tensor,
        from_key: Tensor,
        wp: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
        offsets: Tensor,
        row_user: Tensor,
        softmax: bool,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        starts = pair_offsets(offsets, row_user)
        # In float32, as the backward subtracts g . out from numbers near it.
        out, lse = (torch.zeros(*size, device=q.device) for size in ((q.shape[0], v.shape[1]), (q.shape[0],)))
        score = q.new_zeros(int(starts[-1]), dtype=torch.float32)
        ctx.scale, ctx.softmax = q.shape[1] ** -0.5 if softmax else 1.0, softmax
        parts = (from_query, from_key, wp, w2, b2, w3)
        if score.numel():
            jagged = (row_user, offsets, starts, q.shape[0], ctx.scale)
            sizes = _sizes(q, v, wp, w2)
            _fwd[(_programs(q),)](q, k, v, *parts, b3, out, score, lse, *jagged, **sizes, SOFTMAX=softmax)
        ctx.save_for_backward(q, k, v, *parts, b3, out, score, lse, offsets, row_user, starts)
        ctx.set_materialize_grads(False)
        return out.to(q), _weights(score, lse, starts, softmax).to(q) if want_weights else None

    @staticmethod
    @once_differentiable
    @dispatch.outside_autocast
    def backward(ctx: Any, g: Tensor | None, g_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, *parts, b3, out, score, lse, offsets, row_user, starts = ctx.saved_tensors
        fq, fk, wp, w2, b2, w3 = parts
        g = torch.zeros_like(out, dtype=q.dtype) if g is None else g.contiguous()
        weight = _weights(score, lse, starts, ctx.softmax)
        row_of, row_first = rows_by_user(row_user, offsets.numel() - 1)
        jagged = (row_of, row_first, offsets, starts)
        delta = row_delta(g, out, g_weight, score, lse, starts) if ctx.softmax else lse
        d_score = score_gradient(v, g, g_weight, score, lse, delta, jagged, ctx.softmax).mul_(ctx.scale)
        dq, dk, dv, dfq, dfk = (torch.zeros_like(one) for one in (q, k, v, fq, fk))
        sizes, count = _sizes(q, v, wp, w2), _programs(q)
        sums = [one.new_zeros(count, *one.shape, dtype=torch.float32) for one in (wp, w2, b2, w3)]
        if score.numel():
            user, place, many = tiles(offsets, k.shape[0], sizes["L"])
            _dkv[(many,)](q, k, *parts, g, weight, d_score, dk, dv, dfk, user, place, *jagged, **sizes)
            rows = (row_user, offsets, starts, q.shape[0])
            del sizes["E"], sizes["BE"]
            _dq[(count,)](q, k, *parts, d_score, dq, dfq, *sums, *rows, **sizes)
        d_wp, d_w2, d_b2, d_w3 = (one.sum(0).to(like) for one, like in zip(sums, (wp, w2, b2, w3), strict=True))
        d_b3 = d_score.sum().to(b3).view_as(b3)
        return dq, dk, dv, dfq, dfk, d_wp, d_w2, d_b2, d_w3, d_b3, None, None, None, None


def _programs(q: Tensor) -> int:
    return max(1, min(q.shape[0], 2 if dispatch.interpreting() else PROGRAMS))


def _weights(score: Tensor, lse: Tensor, starts: Tensor, softmax: bool) -> Tensor:
    lse_P = torch.repeat_interleave(lse, starts.diff(), output_size=score.numel())
    return torch.exp(score - lse_P) if softmax else score


def _sizes(q: Tensor, v: Tensor, wp: Tensor, w2: Tensor) -> dict[str, Any]:
    interpreted = dispatch.interpreting()
    widths = {"H": q.shape[1], "E": v.shape[1], "F": wp.shape[0], "G": w2.shape[0]}
    rounded = {f"B{name}": max(16, triton.next_power_of_2(size)) for name, size in widths.items()}
    how = {"L": tile_l(q.dtype), "RELOAD": reload(q.dtype), "UPCAST": interpreted}
    return {**widths, **rounded, **how, "PRECISION": "ieee" if interpreted else "tf32x3"}
