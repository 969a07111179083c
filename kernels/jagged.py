"""Jagged lists, several rows (candidates) a list: who is paired with what, and blocks of it that are nearly dense.

List u holds the behaviours ``[offsets[u], offsets[u + 1])``; row r belongs to list ``row_user[r]``. A *pair* is a row
with one behaviour of its list. Pairs are numbered row by row, inside a row from the oldest behaviour to the newest.

Legend: U lists, N behaviours, R rows, P pairs; inside a block G lists, C rows a list, L behaviours a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from couturier.kernels.checks import KernelError, check_axes, check_index


def pair_offsets(offsets: Tensor, row_user: Tensor) -> Tensor:
    """Where the pairs of each row lie: row r has the pairs ``[p[r], p[r + 1])``.

    Example:
        >>> pair_offsets(torch.tensor([0, 3, 3, 5]), torch.tensor([0, 0, 1, 2]))
        tensor([0, 3, 6, 6, 8])
    """
    lengths_R = offsets.diff()[row_user]
    return torch.cat([lengths_R.new_zeros(1), lengths_R.cumsum(0)])


def pairs(offsets: Tensor, row_user: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the behaviour of every pair, both int64 ``[P]``.

    Example:
        >>> pairs(torch.tensor([0, 3, 3, 5]), torch.tensor([2, 0, 1]))
        (tensor([0, 0, 1, 1, 1]), tensor([3, 4, 0, 1, 2]))
    """
    starts = pair_offsets(offsets, row_user)
    row_P = torch.repeat_interleave(starts.diff())
    behaviour_P = torch.arange(row_P.numel(), device=offsets.device) + (offsets[row_user] - starts[:-1])[row_P]
    return row_P, behaviour_P


def rows_of(
    queries: Tensor, row_user: Tensor | None, sizes: Mapping[str, int]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Queries as rows ``[R, H]``, the person of each ``[R]``, and the leading shape of the answer.

    Args:
        queries: ``[R, H]``, or ``[U, C, H]`` with as many rows for every list.
        row_user: the list of each row of ``[R, H]``; None: row r is that of list r.
        sizes: what ``U`` and ``H`` are.

    Raises:
        KernelError: shapes that do not fit, or a list that does not exist.
        KernelTypeError: ``row_user`` is not int64.
    """
    users, device = sizes["U"], queries.device
    known = {"U": users, "H": sizes["H"]}
    if queries.dim() == 3:
        if row_user is not None:
            raise KernelError("row_user goes with queries [R, H]; queries [U, C, H] say by their place whose they are")
        rows = check_axes(known, queries=(queries, "U C H"))["C"]
        return queries.flatten(0, 1), torch.arange(users, device=device).repeat_interleave(rows), (users, rows)
    rows = check_axes(known, queries=(queries, "R H"))["R"]
    if row_user is None:
        if rows != users:
            raise KernelError(
                f"queries [R, H] has R = {rows}, but offsets speak of U = {users} lists; "
                "pass row_user [R] to say whose each row is"
            )
        return queries, torch.arange(users, device=device), (rows,)
    check_axes({"R": rows}, row_user=(row_user, "R"))
    check_index(row_user, users, name="row_user", of="lists")
    return queries, row_user, (rows,)


def as_lists(index_Rk: Tensor) -> tuple[Tensor, Tensor]:
    """Turn chosen behaviours ``[R, k]`` (-1: none) into jagged lists, one a row: ``(behaviours [M], offsets [R + 1])``.

    With it, attention over what a search returned is ordinary jagged attention over ``keys[behaviours]``.

    Example:
        >>> as_lists(torch.tensor([[4, 1], [2, -1], [-1, -1]]))
        (tensor([4, 1, 2]), tensor([0, 2, 3, 3]))
    """
    keep_Rk = index_Rk >= 0
    counts = keep_Rk.sum(1)
    return index_Rk[keep_Rk], torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@dataclass(frozen=True, kw_only=True)
class Places:
    """Which entries of a flat tensor a dense box holds. Padding repeats an entry that is in the box anyway."""

    index: Tensor
    """Entry of every place, in the shape of the box."""
    pad: Tensor | None
    """True where a place is padding (broadcast against ``index``); None when none is."""
    start: int | None
    """When the box is the run of entries from here on, its first: then it is a view, not a copy."""

    def take(self, flat: Tensor) -> Tensor:
        """The entries, in the shape of the box (then the width, if ``flat`` has one)."""
        shape = (*self.index.shape, *flat.shape[1:])
        if self.start is not None:
            return flat[self.start : self.start + self.index.numel()].view(shape)
        return flat.index_select(0, self.index.reshape(-1)).view(shape)

    def put(self, flat: Tensor, box: Tensor) -> None:
        """Write the box, without its padding, into ``flat``, which holds zeros there."""
        if self.start is not None:
            flat[self.start : self.start + self.index.numel()] = box.reshape(-1, *flat.shape[1:])
        else:
            self.add(flat, self.without_padding(box))

    def without_padding(self, box: Tensor) -> Tensor:
        """The box with zeros in place of padding."""
        if self.pad is None:
            return box
        return box.masked_fill(self.pad.view(*self.pad.shape, *[1] * (box.dim() - self.pad.dim())), 0.0)

    def add(self, flat: Tensor, box: Tensor) -> None:
        """Add the box to ``flat``; padding must hold zeros."""
        box = box.reshape(-1, *flat.shape[1:])
        if self.start is not None:
            flat[self.start : self.start + self.index.numel()] += box
        else:
            flat.index_add_(0, self.index.reshape(-1), box)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some lists of nearly one length, with nearly one number of rows, as a dense box ``[G, C, L]`` of pairs."""

    rows: Places
    """``[G, C]``."""
    behaviours: Places
    """``[G, L]``."""

    def pairs(self, starts: Tensor) -> Places:
        """``[G, C, L]``: the pairs, given :func:`pair_offsets`."""
        within_GL = self.behaviours.index - self.behaviours.index[:, :1]
        index_GCL = starts[self.rows.index][:, :, None] + within_GL[:, None, :]
        whole = self.rows.start is not None and self.behaviours.pad is None
        pads = [None if self.rows.pad is None else self.rows.pad[:, :, None]]
        pads.append(None if self.behaviours.pad is None else self.behaviours.pad[:, None, :])
        some = [pad for pad in pads if pad is not None]
        return Places(
            index=index_GCL,
            pad=None if not some else some[0] if len(some) == 1 else some[0] | some[1],
            start=int(index_GCL[0, 0, 0]) if whole else None,
        )


def blocks(offsets: Tensor, row_user: Tensor, *, width: int, most: int = 1 << 20, spare: int = 1 << 19) -> list[Block]:
    """Cut all pairs into nearly dense blocks. One list is never cut, however long.

    Lists without rows, and rows of empty lists, are in no block.

    Args:
        offsets, row_user: as above; rows may come in any order.
        width: numbers touched a pair, a row and a behaviour; what the two limits below count.
        most: a block holds about so many numbers a row and a behaviour, so that it stays in the cache.
        spare: so many numbers of padding cost what one more block costs; lists of unlike length share a block up to it.
    """
    length_U = offsets.diff()
    count_U = torch.bincount(row_user, minlength=length_U.numel())
    in_order = bool((row_user.diff() >= 0).all())
    by_user = torch.argsort(row_user, stable=True)
    first_U = count_U.cumsum(0) - count_U
    live = ((length_U > 0) & (count_U > 0)).nonzero()[:, 0]
    if live.numel() == 0:
        return []
    code = _grid(length_U[live]) * (1 << 32) + _grid(count_U[live])
    live = live[torch.argsort(code, stable=True, descending=True)]
    out: list[Block] = []
    for users, step in _groups(live, length_U, count_U, code, width, most, spare):
        # Inside a block the lists stay in order, so that neighbours can be one run.
        users = users.sort()[0]
        rows, behaviours = _places(first_U[users], count_U[users]), _places(offsets[users], length_U[users])
        even = -(-users.numel() // -(-users.numel() // step))
        for at in range(0, users.numel(), even):
            part = slice(at, at + even)
            chosen = _part(rows, part)
            if not in_order:
                chosen = Places(index=by_user[chosen.index], pad=chosen.pad, start=None)
            out.append(Block(rows=chosen, behaviours=_part(behaviours, part)))
    return out


def _groups(
    live: Tensor, length_U: Tensor, count_U: Tensor, code: Tensor, width: int, most: int, spare: int
) -> Iterator[tuple[Tensor, int]]:
    """Runs of ``live`` (longest first) that share a padded shape, each with the number of lists a block takes."""
    lengths, counts = length_U[live].tolist(), count_U[live].tolist()
    sizes = code.unique(return_counts=True)[1].flip(0).tolist()
    at = begin = real = wide = tall = 0
    for size in [*sizes, 0]:
        piece = slice(at, at + size)
        taller, wider = max(tall, *counts[piece], 0), max(wide, *lengths[piece], 0)
        inside = real + sum(one * two for one, two in zip(lengths[piece], counts[piece], strict=True))
        if at > begin and (size == 0 or ((at + size - begin) * wider * taller - inside) * width > spare):
            yield live[begin:at], max(1, most // ((wide + tall) * width + wide * tall))
            begin, inside = at, inside - real
            taller, wider = max(0, *counts[piece], 0), max(0, *lengths[piece], 0)
        at, real, wide, tall = at + size, inside, wider, taller


def _grid(size: Tensor) -> Tensor:
    """Round up to a grid with eight steps an octave, so that near sizes become equal."""
    step = torch.exp2((torch.log2(size.double()).floor() - 3).clamp_min(0)).long()
    return (size + step - 1) // step * step


def _places(start_G: Tensor, size_G: Tensor) -> Places:
    """``start, start + 1, ...`` a line, the last one repeated as padding. The lines are disjoint and rise."""
    place = torch.arange(int(size_G.max()), device=start_G.device)
    pad = place >= size_G[:, None]
    index = start_G[:, None] + torch.minimum(place, size_G[:, None] - 1)
    return Places(index=index, pad=pad if bool(pad.any()) else None, start=None)


def _part(places: Places, part: slice) -> Places:
    """Some lines of it, as a view where they are one run."""
    index = places.index[part]
    if places.pad is not None:
        return Places(index=index, pad=places.pad[part], start=None)
    first, last = int(index[0, 0]), int(index[-1, -1])
    return Places(index=index, pad=None, start=first if last - first + 1 == index.numel() else None)
