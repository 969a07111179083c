"""Linear attention on a GPU: one kernel reads the chunks of a sequence in order and keeps the state in registers.

The backward is the same kernel three times more, forwards and backwards in time (README.md, "Backward"). Products run
on tensor cores with float32 sums; float32 inputs take three TF32 products each, to keep float32's accuracy.

Legend: N tokens of all sequences, U sequences, H heads, D width of keys, E width of values, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from couturier.kernels import dispatch

# The first is what runs where nothing can be timed: under the interpreter, and when compiling without a GPU.
CONFIGS = [
    triton.Config({"BE": wide}, num_warps=warps, num_stages=stages)
    for wide, warps, stages in ((64, 4, 2), (32, 4, 2), (64, 8, 2), (64, 4, 3), (32, 4, 3), (128, 8, 2))
]


@triton.jit
def linear_attention_kernel(
    q,
    k,
    v,
    slopes,
    offsets,
    initial,
    out,
    final,
    initial_d,
    initial_e,
    H: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    REVERSE: tl.constexpr,
    FINAL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BE: tl.constexpr,
):
    # S_t = lam S_(t-1) + k_t v_t^T, o_t = S_t^T q_t. With REVERSE the same from the last token to the first, where the
    # initial state counts for the first token read without decay, and the final state has one decay more.
    i_u = tl.program_id(0).to(tl.int64) // H
    i_h = tl.program_id(0).to(tl.int64) % H
    low = tl.load(offsets + i_u)
    length = tl.load(offsets + i_u + 1) - low
    slope = tl.load(slopes + i_h).to(tl.float32)
    o_a = tl.arange(0, C)
    o_d = tl.arange(0, BD)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    m_d = o_d < D
    m_e = o_e < E
    m_de = m_d[:, None] & m_e[None, :]
    # [BD, BE]
    p_initial = initial + (i_u * H + i_h) * D * E + o_d[:, None] * initial_d + o_e[None, :] * initial_e
    b_state = tl.load(p_initial, mask=m_de, other=0.0)
    apart = (o_a[:, None] - o_a[None, :]).to(tl.float32)
    # [C, C]; the exponents are never positive.
    b_inside = tl.where(apart >= 0, tl.exp(-slope * tl.maximum(apart, 0.0)), 0.0)
    shift: tl.constexpr = 1 if REVERSE else 0
    b_read = tl.exp(-slope * (o_a + 1 - shift).to(tl.float32))
    for done in range(0, length, C):
        step = done + o_a
        m_a = step < length
        token = low + tl.where(REVERSE, length - 1 - step, step)
        row = token.to(tl.int64) * H + i_h
        m_ad = m_a[:, None] & m_d[None, :]
        m_ae = m_a[:, None] & m_e[None, :]
        # [C, BD], [C, BD], [C, BE]
        b_q = tl.load(q + row[:, None] * D + o_d[None, :], mask=m_ad, other=0.0)
        b_k = tl.load(k + row[:, None] * D + o_d[None, :], mask=m_ad, other=0.0)
        b_v = tl.load(v + row[:, None] * E + o_e[None, :], mask=m_ae, other=0.0)
        if UPCAST:
            b_q = b_q.to(tl.float32)
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_inside
        b_out = tl.dot(b_q, b_state.to(b_q.dtype), input_precision=PRECISION) * b_read[:, None]
        b_out += tl.dot(b_scores.to(b_v.dtype), b_v, input_precision=PRECISION)
        tl.store(out + row[:, None] * E + o_e[None, :], b_out.to(out.dtype.element_ty), mask=m_ae)
        size = tl.minimum(length - done, C)
        b_left = tl.exp(-slope * tl.maximum(size - 1 - o_a + shift, 0).to(tl.float32))
        b_written = (b_k * b_left[:, None]).to(b_k.dtype)
        b_state *= tl.exp(-slope * size.to(tl.float32))
        b_state += tl.dot(tl.trans(b_written), b_v, input_precision=PRECISION)
    if FINAL:
        p_final = final + (i_u * H + i_h) * D * E + o_d[:, None] * E + o_e[None, :]
        tl.store(p_final, b_state, mask=m_de)


def chunk_of(dtype: torch.dtype, width: int) -> int:
    """Tokens of a chunk, so that everything stays in registers (``resources_sm90.json`` in the folder above)."""
    if dtype.itemsize == 2:
        return 64
    return 32 if width <= 64 else 16


def _wide_enough(configs: list[triton.Config], named: dict[str, Any], **_: Any) -> list[triton.Config]:
    """Without the tiles that are wider than the values, but for one if all are."""
    most = max(32, triton.next_power_of_2(named["E"]))
    return [config for config in configs if config.kwargs["BE"] <= most] or configs[:1]


_tuned = triton.autotune(
    CONFIGS[:1] if dispatch.interpreting() else CONFIGS,
    key=["D", "E", "REVERSE"],
    prune_configs_by={"early_config_prune": _wide_enough},
)(linear_attention_kernel)


def linear_attention(
    q_NHD: Tensor,
    k_NHD: Tensor,
    v_NHE: Tensor,
    slopes_H: Tensor,
    state_UHDE: Tensor,
    offsets: Tensor,
    length: int | None = None,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """As :func:`couturier.kernels.linear_attention.reference.linear_attention`. ``length`` and ``chunk`` are not used:
    one kernel serves every length, in chunks that suit it."""
    out: tuple[Tensor, Tensor] = _Kernel.apply(q_NHD, k_NHD, v_NHE, slopes_H, state_UHDE, offsets)
    return out


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes_H: Tensor,
    initial: Tensor,
    offsets: Tensor,
    *,
    reverse: bool = False,
    final: bool = False,
) -> tuple[Tensor, Tensor]:
    """One run over all sequences. ``initial`` may be a transposed view; ``final`` asks for the last state."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (_, heads, d), e = q.shape, v.shape[2]
    out = torch.empty_like(v)
    end = initial.new_empty(initial.shape if final else 0)
    users = offsets.numel() - 1
    if users and d and e:
        upcast = dispatch.interpreting()
        _tuned[lambda meta: (users * heads, triton.cdiv(e, meta["BE"]))](
            q,
            k,
            v,
            slopes_H,
            offsets,
            initial,
            out,
            end,
            initial.stride(2),
            initial.stride(3),
            H=heads,
            D=d,
            E=e,
            C=chunk_of(q.dtype, max(d, e)),
            BD=max(16, triton.next_power_of_2(d)),
            REVERSE=reverse,
            FINAL=final,
            UPCAST=upcast,
            PRECISION="ieee" if upcast else "tf32x3",
        )
    return out, end


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes_H: Tensor, initial: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, slopes_H, initial, offsets)
        return _run(q, k, v, slopes_H, initial.contiguous(), offsets, final=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes_H, initial, offsets = ctx.saved_tensors
        initial_t, g_final = initial.contiguous().transpose(2, 3), g_final.contiguous()
        dq, _ = _run(g, v, k, slopes_H, initial_t, offsets)
        dk, _ = _run(v, g, q, slopes_H, g_final.transpose(2, 3), offsets, reverse=True)
        dv, d_initial = _run(k, q, g, slopes_H, g_final, offsets, reverse=True, final=True)
        return dq, dk, dv, None, d_initial, None
