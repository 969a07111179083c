"""SDIM on a GPU: one program a user reads the behaviours once, hashes them, and sums all buckets in registers.

Buckets are summed as a one-hot matrix times the values, on tensor cores; the one-hot entries are exact in every type.
Hashing takes three TF32 products for float32's accuracy, so that a bit hardly ever differs from the CPU's (it can where
a vector lies on a plane to seven digits).

Legend: N behaviours of all users, U users, R rows (candidates), d width hashed, e width summed, G groups, b bits, S =
2^b signatures; inside a kernel L behaviours or rows of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from couturier.kernels import dispatch

# Tiles to time on a GPU. The first is what runs where nothing can be timed: under the interpreter.
CONFIGS = [
    triton.Config({"L": rows}, num_warps=warps, num_stages=2) for rows, warps in ((32, 8), (64, 4), (64, 8), (128, 8))
]


def _small_enough(configs: list[triton.Config], named: dict[str, Any], **_: Any) -> list[triton.Config]:
    """Float32 in three parts takes three times the shared memory: tiles of 32 behaviours where rows are wide."""
    most = 128 if named["x"].dtype.itemsize == 2 else 64 if max(named["BD"], named["BE"]) <= 64 else 32
    return [config for config in configs if config.kwargs["L"] <= most]


@triton.jit
def _codes(b_x, b_planes, L: tl.constexpr, G2: tl.constexpr, B2: tl.constexpr, PRECISION: tl.constexpr):
    # [L, G2]: sum over bits i of 2^i [x . plane_(g, i) > 0]; padding planes are zeros and give bit 0.
    b_above = tl.dot(b_x.to(tl.float32), b_planes, input_precision=PRECISION) > 0
    b_bits = tl.reshape(b_above.to(tl.int32), [L, G2, B2])
    return tl.sum(b_bits << tl.arange(0, B2)[None, None, :], axis=2)


@triton.jit
def _one_hot(b_codes, m_l, L: tl.constexpr, G2: tl.constexpr, S: tl.constexpr):
    # [L, G2 * S]: 1 where a behaviour falls into a bucket; rows outside the list fall nowhere.
    b_hit = (b_codes[:, :, None] == tl.arange(0, S)[None, None, :]) & m_l[:, None, None]
    return tl.reshape(b_hit.to(tl.int32), [L, G2 * S])


@triton.jit
def signature_kernel(
    x,
    planes,
    codes,
    N,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    G2: tl.constexpr,
    B2: tl.constexpr,
    PRECISION: tl.constexpr,
    L: tl.constexpr,
):
    # sig_g(x) = sum_i 2^i [x . plane_(g, i) > 0]
    o_l = tl.program_id(0).to(tl.int64) * L + tl.arange(0, L)
    o_d = tl.arange(0, BD)
    o_g = tl.arange(0, G2)
    m_l = o_l < N
    m_d = o_d < D
    b_planes = tl.load(planes + o_d[:, None] * (G2 * B2) + tl.arange(0, G2 * B2)[None, :], mask=m_d[:, None], other=0.0)
    b_x = tl.load(x + o_l[:, None] * D + o_d[None, :], mask=m_l[:, None] & m_d[None, :], other=0.0)
    b_codes = _codes(b_x, b_planes, L, G2, B2, PRECISION)
    tl.store(codes + o_l[:, None] * G + o_g[None, :], b_codes, mask=m_l[:, None] & (o_g < G)[None, :])


@triton.jit
def table_kernel(
    x,
    planes,
    values,
    offsets,
    table,
    G: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    G2: tl.constexpr,
    B2: tl.constexpr,
    S: tl.constexpr,
    BACKWARD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    L: tl.constexpr,
):
    # table[u, g, s] = sum over j of u with sig_g(x_j) = s of value_j.
    # BACKWARD: value_j = sum over g of table[u, g, sig_g(x_j)].
    i_u = tl.program_id(0).to(tl.int64)
    low = tl.load(offsets + i_u)
    high = tl.load(offsets + i_u + 1)
    o_d = tl.arange(0, BD)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    o_s = tl.arange(0, G2 * S)
    m_d = o_d < D
    m_e = o_e < E
    # [BD, G2 * B2], read once for the whole list
    b_planes = tl.load(planes + o_d[:, None] * (G2 * B2) + tl.arange(0, G2 * B2)[None, :], mask=m_d[:, None], other=0.0)
    # [G2 * S, BE]
    p_table = table + (i_u * (G * S) + o_s[:, None]) * E + o_e[None, :]
    m_table = (o_s < G * S)[:, None] & m_e[None, :]
    if BACKWARD:
        b_table = tl.load(p_table, mask=m_table, other=0.0).to(values.dtype.element_ty)
        if UPCAST:
            b_table = b_table.to(tl.float32)
    else:
        b_table = tl.zeros([G2 * S, BE], dtype=tl.float32)
    for start in range(low, high, L):
        o_l = start + tl.arange(0, L).to(tl.int64)
        m_l = o_l < high
        b_x = tl.load(x + o_l[:, None] * D + o_d[None, :], mask=m_l[:, None] & m_d[None, :], other=0.0)
        b_codes = _codes(b_x, b_planes, L, G2, B2, PRECISION)
        # [L, G2 * S]
        b_hot = _one_hot(b_codes, m_l, L, G2, S)
        p_values = values + o_l[:, None] * E + o_e[None, :]
        m_values = m_l[:, None] & m_e[None, :]
        if BACKWARD:
            b_values = tl.dot(b_hot.to(b_table.dtype), b_table, input_precision=PRECISION)
            tl.store(p_values, b_values.to(values.dtype.element_ty), mask=m_values)
        else:
            b_values = tl.load(p_values, mask=m_values, other=0.0)
            if UPCAST:
                b_values = b_values.to(tl.float32)
            b_table += tl.dot(tl.trans(b_hot.to(b_values.dtype)), b_values, input_precision=PRECISION)
    if not BACKWARD:
        tl.store(p_table, b_table, mask=m_table)


@triton.jit
def lookup_kernel(
    table,
    codes,
    row_user,
    out,
    R,
    G: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    S: tl.constexpr,
    NORMALISE: tl.constexpr,
    L: tl.constexpr,
):
    # out_r = (1 / G) sum_g y / |y|, y = table[row_user_r, g, code_(r, g)]; zeros where y is zero.
    # Without NORMALISE: (1 / G) sum_g y.
    o_l = tl.program_id(0).to(tl.int64) * L + tl.arange(0, L)
    o_e = tl.arange(0, BE)
    m_l = o_l < R
    m_le = m_l[:, None] & (o_e < E)[None, :]
    user = tl.load(row_user + o_l, mask=m_l, other=0)
    b_out = tl.zeros([L, BE], dtype=tl.float32)
    for g in range(G):
        code = tl.load(codes + o_l * G + g, mask=m_l, other=0)
        bucket = (user * G + g) * S + code
        b_y = tl.load(table + bucket[:, None] * E + o_e[None, :], mask=m_le, other=0.0)
        if NORMALISE:
            square = tl.sum(b_y * b_y, axis=1)
            b_y *= tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)[:, None]
        b_out += b_y
    tl.store(out + o_l[:, None] * E + o_e[None, :], b_out / G, mask=m_le)


_timed = CONFIGS[:1] if dispatch.interpreting() else CONFIGS
_signature = triton.autotune(_timed, key=["D", "G2", "B2"])(signature_kernel)
_table = triton.autotune(
    _timed, key=["D", "E", "G2", "S", "BACKWARD"], prune_configs_by={"early_config_prune": _small_enough}
)(table_kernel)
_lookup = triton.autotune(_timed, key=["E", "G"])(lookup_kernel)


def signatures(x_Nd: Tensor, planes_dGb: Tensor) -> Tensor:
    """As :func:`couturier.kernels.hash_sampling.signatures`."""
    return _signatures(x_Nd, planes_dGb).long()


def bucket_table(behaviours_Nd: Tensor, values_Ne: Tensor, offsets: Tensor, planes_dGb: Tensor) -> Tensor:
    """As :func:`couturier.kernels.hash_sampling.bucket_table`: hashing and summing in one pass over the behaviours."""
    table: Tensor = _Table.apply(values_Ne, behaviours_Nd, offsets, planes_dGb)
    return table


def lookup(table: Tensor, candidates_Rd: Tensor, planes_dGb: Tensor, row_user: Tensor, normalise: bool) -> Tensor:
    """As :func:`couturier.kernels.hash_sampling.lookup`, without writing what is gathered."""
    out: Tensor = _Lookup.apply(table, _signatures(candidates_Rd, planes_dGb), row_user, normalise)
    return out


def hash_sampling(
    candidates_Rd: Tensor,
    behaviours_Nd: Tensor,
    values_Ne: Tensor,
    offsets: Tensor,
    planes_dGb: Tensor,
    row_user: Tensor,
    normalise: bool,
) -> Tensor:
    """As :func:`couturier.kernels.hash_sampling.hash_sampling`, by the table: one read of the list."""
    table = bucket_table(behaviours_Nd, values_Ne, offsets, planes_dGb)
    return lookup(table, candidates_Rd, planes_dGb, row_user, normalise)


def tile_e(dtype: torch.dtype, e: int) -> int:
    """Width of the values that one program sums, so that the table fits (``resources_sm90.json``). Where the values
    are wider, the list is hashed once a tile."""
    return min(max(16, triton.next_power_of_2(e)), 128 if dtype.itemsize == 2 else 64)


def padded_planes(planes_dGb: Tensor) -> Tensor:
    """``[d, G2 * B2]`` float32: groups and bits padded to powers of two with planes of zeros, at least 16 in all."""
    d, groups, bits = planes_dGb.shape
    bits_2 = triton.next_power_of_2(bits)
    groups_2 = max(triton.next_power_of_2(groups), 16 // bits_2)
    out = torch.zeros(d, groups_2, bits_2, device=planes_dGb.device)
    out[:, :groups, :bits] = planes_dGb
    return out.view(d, groups_2 * bits_2)


def _signatures(x_Nd: Tensor, planes_dGb: Tensor) -> Tensor:
    """int32 ``[N, G]``."""
    (rows, d), (groups, bits) = x_Nd.shape, planes_dGb.shape[1:]
    codes = torch.empty(rows, groups, dtype=torch.int32, device=x_Nd.device)
    padded = padded_planes(planes_dGb)
    bits_2 = triton.next_power_of_2(bits)
    if rows:
        _signature[lambda meta: (triton.cdiv(rows, meta["L"]),)](
            x_Nd.contiguous(),
            padded,
            codes,
            rows,
            G=groups,
            D=d,
            BD=max(16, triton.next_power_of_2(d)),
            G2=padded.shape[1] // bits_2,
            B2=bits_2,
            PRECISION=_precision(),
        )
    return codes


def _precision() -> str:
    return "ieee" if dispatch.interpreting() else "tf32x3"


def _run_table(
    x: Tensor, values: Tensor, offsets: Tensor, planes_dGb: Tensor, table: Tensor, *, backward: bool
) -> None:
    """Write the table from the values, or with ``backward`` the values from the table."""
    (d, groups, bits), e = planes_dGb.shape, values.shape[1]
    padded = padded_planes(planes_dGb)
    bits_2 = triton.next_power_of_2(bits)
    groups_2 = padded.shape[1] // bits_2
    signatures_2 = 1 << bits
    if not table.numel():
        return
    tile = tile_e(values.dtype, e)
    _table[(table.shape[0], triton.cdiv(e, tile))](
        x.contiguous(),
        padded,
        values,
        offsets,
        table,
        G=groups,
        D=d,
        E=e,
        BD=max(16, triton.next_power_of_2(d)),
        BE=tile,
        G2=groups_2,
        B2=bits_2,
        S=signatures_2,
        BACKWARD=backward,
        UPCAST=dispatch.interpreting(),
        PRECISION=_precision(),
    )


class _Table(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, offsets: Tensor, planes_dGb: Tensor) -> Tensor:
        ctx.save_for_backward(x, offsets, planes_dGb)
        ctx.like = values.new_empty(0)
        groups, bits = planes_dGb.shape[1:]
        shape = (offsets.numel() - 1, groups, 1 << bits, values.shape[1])
        table = torch.empty(shape, dtype=torch.float32, device=values.device)
        _run_table(x, values.contiguous(), offsets, planes_dGb, table, backward=False)
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, offsets, planes_dGb = ctx.saved_tensors
        d_values = ctx.like.new_empty(x.shape[0], g.shape[3])
        _run_table(x, d_values, offsets, planes_dGb, g.contiguous(), backward=True)
        return d_values, None, None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, codes: Tensor, row_user: Tensor, normalise: bool) -> Tensor:
        table = table.contiguous()
        (rows, groups), e = codes.shape, table.shape[3]
        out = torch.empty(rows, e, dtype=table.dtype, device=table.device)
        if rows and e:
            _lookup[lambda meta: (triton.cdiv(rows, meta["L"]),)](
                table,
                codes,
                row_user.contiguous(),
                out,
                rows,
                G=groups,
                E=e,
                BE=max(16, triton.next_power_of_2(e)),
                S=table.shape[2],
                NORMALISE=normalise,
            )
        ctx.save_for_backward(table, codes, row_user)
        ctx.normalise = normalise
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        # d(y / |y|) = (g - n (n . g)) / |y| with n = y / |y|, added up in the buckets.
        table, codes, row_user = ctx.saved_tensors
        users, groups, size, e = table.shape
        group = torch.arange(groups, device=table.device)
        bucket_M = ((row_user[:, None] * groups + group) * size + codes).view(-1)
        d_RGe = (g / groups)[:, None].expand(-1, groups, -1)
        if ctx.normalise:
            y_RGe = table.view(-1, e)[bucket_M].view(-1, groups, e)
            length = y_RGe.square().sum(-1, keepdim=True).sqrt()
            some = length > 0
            inverse = some / torch.where(some, length, 1.0)
            n_RGe = y_RGe * inverse
            d_RGe = (d_RGe - n_RGe * (n_RGe * d_RGe).sum(-1, keepdim=True)) * inverse
        d_table = torch.zeros_like(table).view(-1, e).index_add_(0, bucket_M, d_RGe.reshape(-1, e))
        return d_table.view(table.shape), None, None, None
