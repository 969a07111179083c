"""SDIM: the interest of a user in a candidate, read from a table of hash buckets instead of the whole history.

Random planes give every vector a few short signatures. Behaviours with the candidate's signature are the ones that
point its way, so the sum over them is attention without a comparison of every pair. The sums do not depend on the
candidate: they are kept as one small table a user, and scoring a candidate takes the same time for ten behaviours as
for ten thousand. From SDIM (arXiv 2205.10249); derivation, cost and decisions: ``README.md`` here.

Legend: N behaviours of all users, U users, R rows (candidates), d width of what is hashed, e width of what is summed,
G groups (hash rounds), b bits of a signature.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.checks import (
    KernelError,
    KernelTypeError,
    check_axes,
    check_floats,
    check_index,
    check_offsets,
)

__all__ = ["append", "bucket_table", "hash_sampling", "lookup", "random_planes", "signatures"]

# 48 planes in signatures of 3 bits is what the paper runs online.
GROUPS, BITS = 16, 3
# A table has 2^bits buckets a group: 16 bits are 65,536 sums a group and user, more than anyone has behaviours.
MOST_BITS = 16
# What one program of the triton kernel holds at once: a row of x or of the values, and the buckets of all groups.
TRITON_WIDTH, TRITON_BUCKETS = 128, 256


def random_planes(width: int, *, groups: int = GROUPS, bits: int = BITS, seed: int = 0) -> Tensor:
    """The normals of ``groups * bits`` random planes through the origin, ``[d, G, b]`` float32, the same for a seed.

    Keep them with the model: a table made with other planes means nothing.

    Raises:
        KernelError: a size below 1, or more than 16 bits.

    Example:
        >>> random_planes(64, groups=16, bits=3).shape
        torch.Size([64, 16, 3])
    """
    if min(width, groups, bits) < 1 or bits > MOST_BITS:
        raise KernelError(
            f"width, groups, bits are {width}, {groups}, {bits}; wanted 1 or more, and bits <= {MOST_BITS}"
        )
    return torch.randn(width, groups, bits, generator=torch.Generator().manual_seed(seed))


def signatures(x: Tensor, planes: Tensor) -> Tensor:
    """On which side of each plane a row of ``[N, d]`` lies: int64 ``[N, G]``, bit i of an entry is ``x . plane_i > 0``.

    Two vectors at angle ``theta`` share a signature with probability ``(1 - theta / pi) ** b``. The length of a vector
    plays no part. A vector of zeros has signature 0.

    Raises:
        KernelError, KernelTypeError: a shape or a dtype does not fit.

    Example:
        >>> planes = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # one group: the two axes of the plane
        >>> signatures(torch.tensor([[2.0, 3.0], [-1.0, 5.0]]), planes).tolist()
        [[3], [2]]
    """
    _check_planes(planes, x, "x")
    run = dispatch.implementation("hash_sampling", x, uncovered=_uncovered(planes, x))
    with _full_width(x):
        return run.signatures(x, planes)


def bucket_table(behaviours: Tensor, offsets: Tensor, planes: Tensor, *, values: Tensor | None = None) -> Tensor:
    """For each user, group and signature, the sum of the values of the behaviours that have it.

    ``table[u, g, s] = sum over j of user u with sig_g(behaviour_j) = s of value_j``. Sums, not means and not yet
    normalised: that is what :func:`append` can add to. Gradients flow to the values, not through the bits.

    Args:
        behaviours: ``[N, d]``, what is hashed: of all users, one after another.
        offsets: int64 ``[U + 1]``; user u has the rows ``offsets[u]`` to ``offsets[u + 1]``, possibly none.
        planes: ``[d, G, b]``, from :func:`random_planes`.
        values: ``[N, e]``, what is summed; the behaviours themselves if not given, as in the paper.

    Returns:
        ``[U, G, 2 ** b, e]``, float32 (float64 for float64 values). Its size does not depend on N.

    Raises:
        KernelError, KernelTypeError: a shape or a dtype does not fit.

    Example:
        >>> planes = torch.tensor([[[1.0]]])
        >>> bucket_table(torch.tensor([[1.0], [2.0], [-5.0]]), torch.tensor([0, 3]), planes).flatten().tolist()
        [-5.0, 3.0]
    """
    values = behaviours if values is None else values
    _check_behaviours(behaviours, values, offsets, planes)
    uncovered = _uncovered(planes, behaviours, values)
    run = dispatch.implementation("hash_sampling", behaviours, uncovered=uncovered)
    with _full_width(behaviours):
        return run.bucket_table(behaviours, values, offsets, planes)


def append(
    table: Tensor,
    behaviours: Tensor,
    offsets: Tensor,
    planes: Tensor,
    *,
    values: Tensor | None = None,
) -> Tensor:
    """The table after these further behaviours, without reading the earlier ones. The old table stays as it is.

    Equal to building the table anew from all behaviours, up to the order in which floats are added.

    Raises:
        KernelError, KernelTypeError: a shape or a dtype does not fit, or the table has other users or planes.

    Example:
        >>> planes, one_user = torch.tensor([[[1.0]]]), torch.tensor([0, 1])
        >>> table = bucket_table(torch.tensor([[2.0]]), one_user, planes)
        >>> append(table, torch.tensor([[-7.0]]), one_user, planes).flatten().tolist()
        [-7.0, 2.0]
    """
    more = bucket_table(behaviours, offsets, planes, values=values)
    if more.shape != table.shape:
        raise KernelError(f"table has shape {tuple(table.shape)}; these behaviours and planes make {tuple(more.shape)}")
    return table + more


def lookup(
    table: Tensor,
    candidates: Tensor,
    planes: Tensor,
    *,
    row_user: Tensor | None = None,
    normalise: bool = True,
) -> Tensor:
    """What each candidate finds in its user's table: the mean over groups of the L2-normalised sum in its bucket.

    ``out_r = (1 / G) sum_g y / |y|`` with ``y = table[row_user_r, g, sig_g(candidate_r)]``; an empty bucket, or a sum
    of zero, gives zeros and no gradient. O(R G (b d + e)) whatever the length of the history.

    Args:
        table: from :func:`bucket_table`.
        candidates: ``[R, d]``, or ``[U, C, d]`` with as many for everyone; hashed with the same planes.
        row_user: int64 ``[R]``, whose table each of ``[R, d]`` reads; None: row r reads that of user r.
        normalise: as in the paper. False: the mean of the sums as they are, an unbiased estimate of
            ``sum_j (1 - theta_j / pi) ** b value_j``, which grows with the history.

    Returns:
        ``[R, e]`` (``[U, C, e]``) in the table's dtype. Gradients flow to the table, not to the candidates.

    Raises:
        KernelError, KernelTypeError: a shape or a dtype does not fit.

    Example:
        >>> planes = torch.tensor([[[1.0]]])
        >>> table = bucket_table(torch.tensor([[1.0], [2.0], [-5.0]]), torch.tensor([0, 3]), planes)
        >>> lookup(table, torch.tensor([[9.0], [-9.0]]), planes, row_user=torch.tensor([0, 0])).flatten().tolist()
        [1.0, -1.0]
    """
    groups, bits = planes.shape[1:]
    check_axes({"G": groups, "2^b": 2**bits}, table=(table, "U G 2^b e"))
    check_floats(table=table)
    if table.dtype not in (torch.float32, torch.float64):
        raise KernelTypeError(f"table has dtype {table.dtype}; wanted torch.float32, as bucket_table() returns it")
    if table.device != candidates.device:
        raise KernelError(f"table is on {table.device}, but candidates is on {candidates.device}; move one of them")
    candidates_Rd, row_user = _rows(candidates, row_user, table.shape[0], planes.shape[0])
    _check_planes(planes, candidates_Rd, "candidates")
    uncovered = _uncovered(planes, candidates_Rd, table)
    run = dispatch.implementation("hash_sampling", candidates_Rd, uncovered=uncovered)
    with _full_width(candidates_Rd):
        out_Re: Tensor = run.lookup(table, candidates_Rd, planes, row_user, normalise)
    return out_Re.view(*candidates.shape[:-1], table.shape[3])


def hash_sampling(
    candidates: Tensor,
    behaviours: Tensor,
    offsets: Tensor,
    planes: Tensor,
    *,
    values: Tensor | None = None,
    row_user: Tensor | None = None,
    normalise: bool = True,
) -> Tensor:
    """:func:`lookup` of :func:`bucket_table` without a table: the interest of a user in each candidate, for training.

    Where a user has few candidates, as in training, the buckets that nobody asks for are never summed.

    Args:
        As in :func:`bucket_table` and :func:`lookup`.

    Returns:
        ``[R, e]`` (``[U, C, e]``). Gradients flow to the values (else the behaviours), not to the candidates.

    Raises:
        KernelError, KernelTypeError: a shape or a dtype does not fit.

    Example:
        >>> planes, offsets = torch.tensor([[[1.0]]]), torch.tensor([0, 3])
        >>> hash_sampling(torch.tensor([[9.0]]), torch.tensor([[1.0], [2.0], [-5.0]]), offsets, planes).tolist()
        [[1.0]]
    """
    values = behaviours if values is None else values
    users = _check_behaviours(behaviours, values, offsets, planes)
    check_floats(candidates=candidates, behaviours=behaviours)
    candidates_Rd, row_user = _rows(candidates, row_user, users, planes.shape[0])
    uncovered = _uncovered(planes, behaviours, values)
    run = dispatch.implementation("hash_sampling", behaviours, uncovered=uncovered)
    with _full_width(behaviours):
        out_Re: Tensor = run.hash_sampling(candidates_Rd, behaviours, values, offsets, planes, row_user, normalise)
    return out_Re.view(*candidates.shape[:-1], values.shape[1])


def _check_planes(planes: Tensor, x: Tensor, name: str) -> None:
    check_axes(planes=(planes, "d G b"), **{name: (x, "N d")})
    check_floats(planes=planes)
    check_floats(**{name: x})
    if planes.device != x.device:
        raise KernelError(f"planes is on {planes.device}, but {name} is on {x.device}; move one of them")
    if not 1 <= planes.shape[2] <= MOST_BITS:
        raise KernelError(f"planes [d, G, b] has b = {planes.shape[2]} bits; wanted 1 to {MOST_BITS}")


def _check_behaviours(behaviours: Tensor, values: Tensor, offsets: Tensor, planes: Tensor) -> int:
    _check_planes(planes, behaviours, "behaviours")
    check_axes(behaviours=(behaviours, "N d"), values=(values, "N e"))
    check_floats(behaviours=behaviours, values=values)
    return check_offsets(offsets, behaviours.shape[0], of="behaviours")


def _rows(candidates: Tensor, row_user: Tensor | None, users: int, width: int) -> tuple[Tensor, Tensor]:
    """Candidates as rows ``[R, d]``, and the user of each."""
    if candidates.dim() == 3:
        if row_user is not None:
            raise KernelError("row_user goes with candidates [R, d]; [U, C, d] says by its place whose each is")
        each = check_axes({"U": users, "d": width}, candidates=(candidates, "U C d"))["C"]
        return candidates.flatten(0, 1), torch.arange(users, device=candidates.device).repeat_interleave(each)
    rows = check_axes({"d": width}, candidates=(candidates, "R d"))["R"]
    if row_user is None:
        if rows != users:
            raise KernelError(f"there are {rows} candidates and {users} users; say whose each is with row_user [R]")
        return candidates, torch.arange(rows, device=candidates.device)
    check_axes({"R": rows}, row_user=(row_user, "R"))
    check_index(row_user, users, name="row_user", of="the users")
    return candidates, row_user


def _full_width(x: Tensor) -> AbstractContextManager[object]:
    """No automatic casting inside: a signature must be the same in training and in serving."""
    return torch.autocast(x.device.type, enabled=False)


def _uncovered(planes: Tensor, *rows: Tensor) -> str | None:
    """Why the triton kernel does not cover this call."""
    groups, bits = planes.shape[1:]
    if any(x.dtype == torch.float64 for x in (planes, *rows)):
        return "float64"
    if any(x.shape[-1] > TRITON_WIDTH for x in rows):
        return f"rows wider than {TRITON_WIDTH}"
    if (1 << (groups - 1).bit_length()) << bits > TRITON_BUCKETS:
        return f"{groups} groups of {1 << bits} buckets (more than {TRITON_BUCKETS} in all, groups rounded up)"
    return None
