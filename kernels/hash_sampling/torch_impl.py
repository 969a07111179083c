"""SDIM without loops: buckets are runs of one stable sort, and every sum over them is one fused bag.

Summing a list of rows of a matrix, for many lists at once, is what ``embedding_bag`` does in one pass without writing
the gathered rows. Buckets of behaviours are such lists, and so is the backward, with rows and lists exchanged. Measured
against a one-hot matrix product and a scatter in ``README.md``.

Legend: N behaviours, U users, R rows (candidates), d width hashed, e width summed, G groups, b bits, S = 2^b
signatures, P pairs of a candidate and a behaviour of its user, M entries (a behaviour in a list).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from couturier.kernels.jagged import pair_offsets, pairs


def signatures(x_Nd: Tensor, planes_dGb: Tensor) -> Tensor:
    """As :func:`couturier.kernels.hash_sampling.signatures`, in one matrix product."""
    return _signatures(x_Nd, planes_dGb).long()


@torch.no_grad()
def _signatures(x_Nd: Tensor, planes_dGb: Tensor) -> Tensor:
    """In as few bytes as hold them: what follows is limited by memory."""
    d, groups, bits = planes_dGb.shape
    # In the dtype of the planes, as everywhere: a bit must not depend on who computes it.
    planes_dbG = planes_dGb.transpose(1, 2).reshape(d, bits * groups)
    above_NbG = (x_Nd.to(planes_dGb.dtype) @ planes_dbG > 0).view(-1, bits, groups)
    out_NG = above_NbG[:, 0].to(torch.uint8 if bits <= 8 else torch.int32)
    for i in range(1, bits):
        out_NG |= above_NbG[:, i].to(out_NG.dtype) << i
    return out_NG


def bucket_table(behaviours_Nd: Tensor, values_Ne: Tensor, offsets: Tensor, planes_dGb: Tensor) -> Tensor:
    """As :func:`couturier.kernels.hash_sampling.bucket_table`: a radix sort of N G small numbers, then one bag."""
    groups, bits = planes_dGb.shape[1:]
    users, behaviours, e = offsets.numel() - 1, *values_Ne.shape
    user_N = torch.arange(users, device=offsets.device).repeat_interleave(offsets.diff(), output_size=behaviours)
    buckets = (users * groups) << bits
    # Radix sort is twice as fast on half the bytes.
    bucket_NG = _bucket(user_N.to(torch.int32 if buckets < 2**31 else torch.int64), behaviours_Nd, planes_dGb)
    order_M = bucket_NG.view(-1).argsort(stable=True)
    lists = _Lists(
        row_M=order_M // groups,
        start=_starts(bucket_NG.view(-1), buckets),
        turned=lambda: (bucket_NG.view(-1).long(), _every(groups, bucket_NG)),
    )
    sums: Tensor = _ListSums.apply(_wide(values_Ne), lists)
    return sums.view(users, groups, 1 << bits, e)


def lookup(table: Tensor, candidates_Rd: Tensor, planes_dGb: Tensor, row_user: Tensor, normalise: bool) -> Tensor:
    """As :func:`couturier.kernels.hash_sampling.lookup`: gather, normalise, mean."""
    groups = planes_dGb.shape[1]
    bucket_RG = _bucket(row_user, candidates_Rd, planes_dGb)
    rows, (buckets, e) = candidates_Rd.shape[0], table.flatten(0, 2).shape
    if rows * groups < buckets:
        found_RGe = table.flatten(0, 2).index_select(0, bucket_RG.view(-1)).view(rows, groups, e)
        return (_normalised(found_RGe) if normalise else found_RGe).mean(1)
    # Fewer buckets than look-ups: normalise each bucket once.
    lists = _Lists(
        row_M=bucket_RG.view(-1),
        start=_every(groups, bucket_RG),
        turned=lambda: (bucket_RG.view(-1).argsort(stable=True) // groups, _starts(bucket_RG.view(-1), buckets)),
    )
    buckets_Me = table.flatten(0, 2)
    found: Tensor = _ListSums.apply(_normalised(buckets_Me) if normalise else buckets_Me, lists)
    return found / groups


def hash_sampling(
    candidates_Rd: Tensor,
    behaviours_Nd: Tensor,
    values_Ne: Tensor,
    offsets: Tensor,
    planes_dGb: Tensor,
    row_user: Tensor,
    normalise: bool,
) -> Tensor:
    """As :func:`couturier.kernels.hash_sampling.hash_sampling`: pairs directly if few, through the table otherwise."""
    groups = planes_dGb.shape[1]
    (rows, _), (behaviours, e) = candidates_Rd.shape, values_Ne.shape
    starts = pair_offsets(offsets, row_user)
    # Comparing a pair costs about what sorting a behaviour into a table does (README.md).
    if int(starts[-1]) > behaviours:
        table = bucket_table(behaviours_Nd, values_Ne, offsets, planes_dGb)
        return lookup(table, candidates_Rd, planes_dGb, row_user, normalise)
    row_P, behaviour_P = pairs(offsets, row_user)
    of_candidate, of_behaviour = _signatures(candidates_Rd, planes_dGb), _signatures(behaviours_Nd, planes_dGb)
    meets_GP = (of_candidate[row_P] == of_behaviour[behaviour_P]).t()
    group_M, pair_M = meets_GP.nonzero(as_tuple=True)
    list_M, row_M = group_M * rows + row_P[pair_M], behaviour_P[pair_M]
    lists = _Lists(
        row_M=row_M,
        start=_starts(list_M, groups * rows),
        turned=lambda: (list_M[row_M.argsort(stable=True)], _starts(row_M, behaviours)),
    )
    sums: Tensor = _ListSums.apply(_wide(values_Ne), lists)
    sums_GRe = sums.view(groups, rows, e)
    return (_normalised(sums_GRe) if normalise else sums_GRe).mean(0)


@dataclass(frozen=True, kw_only=True)
class _Lists:
    """Lists of rows of a matrix: entry m is a row in a list."""

    row_M: Tensor
    """The rows of all lists, list after list."""
    start: Tensor
    """Where each list starts among them."""
    turned: Callable[[], tuple[Tensor, Tensor]]
    """For the backward, the same seen from the rows: the lists of all, row after row, and where each row starts."""


class _ListSums(torch.autograd.Function):
    """``out[l] = sum over rows r of list l of x[r]``; backward ``dx[r] = sum over lists l with r of dout[l]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lists: _Lists) -> Tensor:
        ctx.lists = lists
        return _bag(lists.row_M, x, lists.start)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        list_M, row_start = ctx.lists.turned()
        return _bag(list_M, g.contiguous(), row_start), None


def _bag(rows: Tensor, x: Tensor, start: Tensor) -> Tensor:
    if not rows.numel() or not x.shape[1]:
        return x.new_zeros(start.numel(), x.shape[1])
    return embedding_bag(rows, x, start, mode="sum")


def _starts(list_M: Tensor, lists: int) -> Tensor:
    """Where each list starts once its entries are sorted."""
    counts = torch.bincount(list_M, minlength=lists)
    return counts.cumsum(0) - counts


def _every(groups: int, bucket_NG: Tensor) -> Tensor:
    """Where each list starts that is a row of ``[N, G]``."""
    return torch.arange(0, bucket_NG.numel(), groups, device=bucket_NG.device)


def _bucket(user_N: Tensor, x_Nd: Tensor, planes_dGb: Tensor) -> Tensor:
    """The number of each row's bucket among those of all users, groups and signatures, ``[N, G]`` typed like user."""
    groups, bits = planes_dGb.shape[1:]
    group_G = torch.arange(groups, device=user_N.device, dtype=user_N.dtype)
    return ((user_N[:, None] * groups + group_G) << bits) + _signatures(x_Nd, planes_dGb)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normalised(x: Tensor) -> Tensor:
    """``x / |x|``; zeros, without a gradient, where x is zero (``functional.normalize`` sends 1e12 times one there)."""
    square = x.square().sum(-1, keepdim=True)
    some = square > 0
    return x * (torch.where(some, square, 1.0).rsqrt() * some)
