"""Search on a GPU: one program a row reads the list once and keeps the best K pairs sorted in registers.

A pair is one int64, the score's bits in an order of integers above and the place in the list below, so that no two are
equal and sorting settles ties. A tile of K new pairs, sorted the other way, meets the best K so far: the larger of each
two are the best K of both. Most tiles hold nothing better, and are passed over unsorted.

Legend: U people (lists), N behaviours, R rows (candidates), H width of the vectors, k behaviours wanted, K that rounded
up to a power of two, BH the width rounded up to one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from couturier.kernels import dispatch

# What is tuned; the first runs where nothing can be timed.
CONFIGS = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in ((8, 2), (4, 2), (4, 3))]

# The pair of score -inf and place 0: what a tile holds where there is no behaviour.
_NONE: tl.constexpr = tl.constexpr((0x807FFFFF - (1 << 32)) << 32)


@triton.jit
def _ordered(bits):
    # Integers in the order of the floats whose bits they are: all bits but the sign turn if it is set. Its own inverse.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def topk_search_kernel(
    q,
    keys,
    bias,
    out_index,
    out_score,
    row_user,
    offsets,
    wanted,
    H: tl.constexpr,
    BH: tl.constexpr,
    K: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    # best = the k largest of (q . key_j [/ |q| |key_j|] + bias_j, j).
    row = tl.program_id(0).to(tl.int64)
    i_u = tl.load(row_user + row)
    low = tl.load(offsets + i_u)
    high = tl.load(offsets + i_u + 1)
    o_h = tl.arange(0, BH)
    o_k = tl.arange(0, K)
    b_q = tl.load(q + row * H + o_h, mask=o_h < H, other=0.0).to(tl.float32)
    if COSINE:
        square = tl.sum(b_q * b_q, axis=0)
        b_q = b_q * tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    b_best = tl.full([K], _NONE, tl.int64)
    for done in range(0, high - low, K):
        n = low + done + o_k
        m_n = n < high
        # [K, BH]
        p_key = keys + n[:, None] * H + o_h[None, :]
        b_key = tl.load(p_key, mask=m_n[:, None] & (o_h < H)[None, :], other=0.0).to(tl.float32)
        b_s = tl.sum(b_key * b_q[None, :], axis=1)
        if COSINE:
            b_square = tl.sum(b_key * b_key, axis=1)
            b_s = tl.where(b_square > 0, b_s / tl.sqrt(tl.where(b_square > 0, b_square, 1.0)), 0.0)
        if HAS_BIAS:
            b_s += tl.load(bias + n, mask=m_n, other=0.0).to(tl.float32)
        # -0 equals 0, and must not lie below it.
        b_s = tl.where(b_s == 0, 0.0, b_s)
        b_pair = (_ordered(b_s.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | (n - low)
        b_pair = tl.where(m_n, b_pair, _NONE)
        if tl.max(b_pair, axis=0) > tl.min(b_best, axis=0):
            b_best = tl.sort(tl.maximum(b_best, tl.sort(b_pair)), descending=True)
    b_score = _ordered((b_best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    b_index = tl.where(b_score == float("-inf"), -1, low + (b_best & 0xFFFFFFFF))
    tl.store(out_index + row * wanted + o_k, b_index, mask=o_k < wanted)
    tl.store(out_score + row * wanted + o_k, b_score, mask=o_k < wanted)


_search = triton.autotune(CONFIGS[:1] if dispatch.interpreting() else CONFIGS, key=["H", "K"])(topk_search_kernel)


def search(
    queries_RH: Tensor,
    keys_NH: Tensor,
    offsets: Tensor,
    row_user: Tensor,
    k: int,
    cosine: bool,
    bias_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    rows, width = queries_RH.shape
    index_Rk = torch.empty(rows, k, dtype=torch.int64, device=keys_NH.device)
    score_Rk = torch.empty(rows, k, dtype=torch.float32, device=keys_NH.device)
    queries_RH, keys_NH = queries_RH.contiguous(), keys_NH.contiguous()
    if rows:
        _search[(rows,)](
            queries_RH,
            keys_NH,
            keys_NH if bias_N is None else bias_N.contiguous(),
            index_Rk,
            score_Rk,
            row_user,
            offsets,
            k,
            H=width,
            BH=triton.next_power_of_2(width),
            K=max(16, triton.next_power_of_2(k)),
            COSINE=cosine,
            HAS_BIAS=bias_N is not None,
        )
    return index_Rk, score_Rk.to(queries_RH.dtype)
