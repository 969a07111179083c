"""Statistics of attention on a GPU: one kernel over tiles of rows, one over tiles of keys, no atomic adds.

The first reads the keys once with a running softmax and leaves each row's log-sum-exp; the second needs that, and reads
for each tile of keys the rows that stand near to far tokens after it.

Legend: B sequences, H heads, G key heads, R rows (queries), S keys, d width of a head, BD that rounded up to a power of
two; C rows and L keys of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from couturier.kernels import dispatch

# What is tuned; the first runs where nothing can be timed.
CONFIGS = [
    triton.Config({"C": rows, "L": keys}, num_warps=warps, num_stages=stages)
    for rows, keys, warps, stages in ((64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3), (32, 64, 4, 3))
]


@triton.jit
def attention_rows_kernel(
    q,
    k,
    lse,
    start,
    waad,
    span,
    out_lse,
    R,
    S,
    scale,
    window,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_START: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
):
    # lse_r = log sum_s exp(scale q_r . k_s); waad_r = sum_s A_rs min(t - s, window); span_r = sum_s A_rs (t - s).
    tiles = tl.cdiv(R, C)
    i_bh = tl.program_id(0).to(tl.int64) // tiles
    i_c = tl.program_id(0) % tiles
    i_b = i_bh // H
    i_bg = i_b * G + (i_bh % H) // (H // G)
    o_d = tl.arange(0, BD)
    o_r = i_c * C + tl.arange(0, C)
    m_r = o_r < R
    token = S - R + o_r
    low = 0
    if HAS_START:
        low = tl.load(start + i_b).to(tl.int32)
    high = tl.minimum(S, S - R + (i_c + 1) * C)
    # [C, BD]
    p_q = q + (i_bh * R + o_r)[:, None] * D + o_d[None, :]
    b_q = tl.load(p_q, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_m = tl.full([C], float("-inf"), tl.float32)
    b_l = tl.zeros([C], tl.float32)
    b_waad = tl.zeros([C], tl.float32)
    b_span = tl.zeros([C], tl.float32)
    if HAS_LSE:
        b_m = tl.load(lse + i_bh * R + o_r, mask=m_r, other=0.0)
    for done in range(low, high, L):
        o_s = done + tl.arange(0, L)
        m_s = o_s < high
        # [BD, L]
        p_k = k + (i_bg * S + o_s)[None, :] * D + o_d[:, None]
        b_k = tl.load(p_k, mask=m_s[None, :] & (o_d < D)[:, None], other=0.0)
        if UPCAST:
            b_k = b_k.to(tl.float32)
        apart = token[:, None] - o_s[None, :]
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        b_s = tl.where((apart >= 0) & m_s[None, :], b_s, float("-inf"))
        b_new = b_m
        if not HAS_LSE:
            b_new = tl.maximum(b_m, tl.max(b_s, axis=1))
        # A row that has seen nothing yet must not subtract -inf from -inf.
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp(b_s - b_safe[:, None])
        if not HAS_LSE:
            b_keep = tl.exp(b_m - b_safe)
            b_l = b_l * b_keep
            b_waad = b_waad * b_keep
            b_span = b_span * b_keep
        b_apart = apart.to(tl.float32)
        b_l += tl.sum(b_p, axis=1)
        b_waad += tl.sum(b_p * tl.minimum(b_apart, window), axis=1)
        b_span += tl.sum(b_p * b_apart, axis=1)
        b_m = b_new
    if not HAS_LSE:
        b_l = tl.where(b_l > 0, b_l, 1.0)
        b_waad = b_waad / b_l
        b_span = b_span / b_l
        b_m = b_m + tl.log(b_l)
    tl.store(out_lse + i_bh * R + o_r, b_m, mask=m_r)
    tl.store(waad + i_bh * R + o_r, b_waad, mask=m_r)
    tl.store(span + i_bh * R + o_r, b_span, mask=m_r)


@triton.jit
def attention_columns_kernel(
    q,
    k,
    lse,
    start,
    influence,
    R,
    S,
    scale,
    near,
    far,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    HAS_START: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
):
    # influence_s = mean of exp(scale q_r . k_s - lse_r) over the rows whose token t has s + near <= t <= s + far.
    tiles = tl.cdiv(S, L)
    i_bh = tl.program_id(0).to(tl.int64) // tiles
    i_l = tl.program_id(0) % tiles
    i_b = i_bh // H
    i_bg = i_b * G + (i_bh % H) // (H // G)
    o_d = tl.arange(0, BD)
    o_s = i_l * L + tl.arange(0, L)
    m_s = o_s < S
    if HAS_START:
        m_s = m_s & (o_s >= tl.load(start + i_b))
    # [BD, L]
    p_k = k + (i_bg * S + o_s)[None, :] * D + o_d[:, None]
    b_k = tl.load(p_k, mask=m_s[None, :] & (o_d < D)[:, None], other=0.0)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    b_sum = tl.zeros([L], tl.float32)
    first = tl.maximum(i_l * L + near, S - R)
    after = tl.minimum(i_l * L + L + far, S)
    for done in range(first, after, C):
        token = done + tl.arange(0, C)
        m_t = token < after
        o_r = token - (S - R)
        # [C, BD]
        p_q = q + (i_bh * R + o_r)[:, None] * D + o_d[None, :]
        b_q = tl.load(p_q, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
        if UPCAST:
            b_q = b_q.to(tl.float32)
        b_lse = tl.load(lse + i_bh * R + o_r, mask=m_t, other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        apart = token[:, None] - o_s[None, :]
        read = (apart >= near) & (apart <= far) & m_t[:, None] & m_s[None, :]
        b_p = tl.exp(tl.where(read, b_s - b_lse[:, None], float("-inf")))
        b_sum += tl.sum(b_p, axis=0)
    readers = tl.minimum(o_s + far, S - 1) - tl.maximum(o_s + near, S - R) + 1
    b_mean = b_sum / tl.maximum(readers, 1).to(tl.float32)
    tl.store(influence + i_bh * S + o_s, b_mean, mask=o_s < S)


def _tuned(kernel: Any) -> Any:
    configs = CONFIGS[:1] if dispatch.interpreting() else CONFIGS
    return triton.autotune(configs, key=["D"])(kernel)


_rows, _columns = _tuned(attention_rows_kernel), _tuned(attention_columns_kernel)


def stats(
    q_BHRd: Tensor,
    k_BGSd: Tensor,
    lse_BHR: Tensor | None,
    start_B: Tensor | None,
    scale: float,
    window: int,
    near: int,
    far: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    (b, heads, rows, d), (groups, keys) = q_BHRd.shape, k_BGSd.shape[1:3]
    q, k = q_BHRd.contiguous(), k_BGSd.contiguous()
    given = torch.empty(0, dtype=torch.float32, device=q.device) if lse_BHR is None else lse_BHR.float().contiguous()
    start = torch.empty(0, dtype=torch.int64, device=q.device) if start_B is None else start_B.contiguous()
    waad = torch.empty(b, heads, rows, dtype=torch.float32, device=q.device)
    span, lse = torch.empty_like(waad), torch.empty_like(waad)
    influence = torch.empty(b, heads, keys, dtype=torch.float32, device=q.device)
    upcast = dispatch.interpreting()
    common = {
        "H": heads,
        "G": groups,
        "D": d,
        "BD": max(16, triton.next_power_of_2(d)),
        "HAS_START": start_B is not None,
        "UPCAST": upcast,
        "PRECISION": "ieee" if upcast else "tf32x3",
    }
    if b * heads * rows:
        _rows[lambda meta: (b * heads * triton.cdiv(rows, meta["C"]),)](
            q, k, given, start, waad, span, lse, rows, keys, scale, window, HAS_LSE=lse_BHR is not None, **common
        )
    if b * heads * keys:
        _columns[lambda meta: (b * heads * triton.cdiv(keys, meta["L"]),)](
            q, k, lse, start, influence, rows, keys, scale, near, far, **common
        )
    return waad, span, influence
