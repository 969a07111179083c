"""Search in a history: for each candidate the k behaviours of its person that are most like it.

The general search unit of MUSE (arXiv 2512.07216, cosine) and DARE (2410.02604, dot): what it returns is then attended
over exactly. No gradient flows through it. Memory is bounded however long the histories are.

Legend: U people (lists), N behaviours of all people, R rows (candidates), C candidates a person in the dense form,
H width of the vectors, k behaviours wanted.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.checks import KernelError, check_axes, check_floats, check_offsets
from couturier.kernels.jagged import as_lists, rows_of

__all__ = ["Similarity", "as_lists", "topk_search"]

Similarity = Literal["cosine", "dot"]


@torch.no_grad()
def topk_search(
    queries: Tensor,
    keys: Tensor,
    offsets: Tensor,
    k: int,
    *,
    row_user: Tensor | None = None,
    similarity: Similarity = "cosine",
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k behaviours of each row's person with the highest score, best first.

    The score is ``q . key`` (dot) or ``q . key / (|q| |key|)`` (cosine, 0 for a zero vector), plus ``bias``. Of equal
    scores the newest (the larger index) comes first. 16-bit inputs are compared as float32.

    Args:
        queries: ``[R, H]`` one row a candidate, or ``[U, C, H]`` with as many candidates for everyone.
        keys: ``[N, H]`` behaviours of all people, one after another, from the oldest to the newest.
        offsets: int64 ``[U + 1]``: person u has the behaviours ``[offsets[u], offsets[u + 1])``.
        k: how many, 1 or more.
        row_user: int64 ``[R]``, the person of each row, in any order. None: row r is person r.
        similarity: ``cosine`` or ``dot``.
        bias: ``[N]`` added to the score of a behaviour (DARE's time part); -inf hides it, and it comes back as -1.

    Returns:
        Index into ``keys``, int64 ``[R, k]`` (``[U, C, k]``), -1 where the list is shorter; and the scores, -inf there.

    Raises:
        KernelError: shapes, offsets or settings that do not fit together.
        KernelTypeError: a wrong dtype, or dtypes that differ.
        BackendError: a backend was forced that cannot run this call.

    Example:
        >>> keys, offsets = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 3, 4])
        >>> index, score = topk_search(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), keys, offsets, 2)
        >>> index.tolist(), [[round(one, 3) for one in row] for row in score.tolist()]
        ([[2, 0], [3, -1]], [[1.0, 1.0], [0.707, -inf]])
    """
    check_floats(queries=queries, keys=keys, bias=bias)
    sizes = check_axes(keys=(keys, "N H"), **({} if bias is None else {"bias": (bias, "N")}))
    users = check_offsets(offsets, sizes["N"])
    if k < 1:
        raise KernelError(f"k is {k}; wanted 1 or more")
    if similarity not in ("cosine", "dot"):
        raise KernelError(f"similarity is {similarity!r}; wanted 'cosine' or 'dot'")
    queries_RH, row_user, lead = rows_of(queries, row_user, {"U": users, "H": sizes["H"]})
    run = dispatch.implementation("topk_search", keys, uncovered=_uncovered(keys, k))
    # Autocast would round scores, and make ties of what is none.
    with torch.autocast(keys.device.type, enabled=False):
        index_Rk, score_Rk = run.search(queries_RH, keys, offsets, row_user, k, similarity == "cosine", bias)
    return cast(Tensor, index_Rk).view(*lead, k), cast(Tensor, score_Rk).view(*lead, k)


def _uncovered(keys: Tensor, k: int) -> str | None:
    """Why the Triton kernel does not cover this call, or None."""
    if keys.dtype == torch.float64:
        return "float64"
    # Sorting 128 at a time spills registers (and takes minutes to compile).
    return "more than 64 behaviours a row" if k > 64 else "widths over 128" if keys.shape[1] > 128 else None
