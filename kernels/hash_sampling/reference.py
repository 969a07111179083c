"""SDIM as its definition says, behaviour by behaviour in Python loops. For tests.

Legend: N behaviours, U users, R rows (candidates), d width hashed, e width summed, G groups, b bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signatures(x_Nd: Tensor, planes_dGb: Tensor) -> Tensor:
    """``sum_i 2^i [x . plane_(g, i) > 0]``, int64 ``[N, G]``."""
    out = torch.zeros(x_Nd.shape[0], planes_dGb.shape[1], dtype=torch.int64, device=x_Nd.device)
    for i in range(planes_dGb.shape[2]):
        out += ((x_Nd.to(planes_dGb.dtype) @ planes_dGb[:, :, i]) > 0).long() << i
    return out


def bucket_table(behaviours_Nd: Tensor, values_Ne: Tensor, offsets: Tensor, planes_dGb: Tensor) -> Tensor:
    """``table[u, g, s] = sum of value_j over j of user u with sig_g(j) = s``, added in the order of time."""
    signature = signatures(behaviours_Nd, planes_dGb).tolist()
    groups, bits = planes_dGb.shape[1:]
    dtype = torch.float64 if values_Ne.dtype == torch.float64 else torch.float32
    zero = values_Ne.new_zeros(values_Ne.shape[1], dtype=dtype)
    users = []
    for low, high in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        sums = [[zero for _ in range(2**bits)] for _ in range(groups)]
        for j in range(low, high):
            for g in range(groups):
                sums[g][signature[j][g]] = sums[g][signature[j][g]] + values_Ne[j].to(dtype)
        users.append(torch.stack([torch.stack(row) for row in sums]))
    return torch.stack(users) if users else zero.new_zeros(0, groups, 2**bits, zero.shape[0])


def lookup(table: Tensor, candidates_Rd: Tensor, planes_dGb: Tensor, row_user: Tensor, normalise: bool) -> Tensor:
    """The mean over groups of the (normalised) sum in the candidate's bucket; zeros where the sum is zero."""
    signature = signatures(candidates_Rd, planes_dGb).tolist()
    groups = planes_dGb.shape[1]
    outs = []
    for row, user in zip(signature, row_user.tolist(), strict=True):
        total = table.new_zeros(table.shape[3])
        for g in range(groups):
            sum_e = table[user, g, row[g]]
            total = total + (_normalised(sum_e) if normalise else sum_e)
        outs.append(total / groups)
    return torch.stack(outs) if outs else table.new_zeros(0, table.shape[3])


def hash_sampling(
    candidates_Rd: Tensor,
    behaviours_Nd: Tensor,
    values_Ne: Tensor,
    offsets: Tensor,
    planes_dGb: Tensor,
    row_user: Tensor,
    normalise: bool,
) -> Tensor:
    """The direct form: for each candidate and group, sum the behaviours that collide with it. No table anywhere."""
    of_candidate, of_behaviour = (signatures(x, planes_dGb).tolist() for x in (candidates_Rd, behaviours_Nd))
    groups = planes_dGb.shape[1]
    dtype = torch.float64 if values_Ne.dtype == torch.float64 else torch.float32
    outs = []
    for row, user in zip(of_candidate, row_user.tolist(), strict=True):
        total = values_Ne.new_zeros(values_Ne.shape[1], dtype=dtype)
        for g in range(groups):
            mine = [j for j in range(int(offsets[user]), int(offsets[user + 1])) if of_behaviour[j][g] == row[g]]
            sum_e = torch.zeros_like(total)
            for j in mine:
                sum_e = sum_e + values_Ne[j].to(dtype)
            total = total + (_normalised(sum_e) if normalise else sum_e)
        outs.append(total / groups)
    return torch.stack(outs) if outs else values_Ne.new_zeros(0, values_Ne.shape[1], dtype=dtype)


def _normalised(x_e: Tensor) -> Tensor:
    return x_e / x_e.norm() if bool(x_e.norm() > 0) else torch.zeros_like(x_e)
