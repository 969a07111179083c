"""Jagged lists, several rows (candidates) a list: who is paired with what, and blocks of it that are nearly dense.

List u holds the behaviours ``[offsets[u], offsets[u + 1])``; row r belongs to list ``row_user[r]``. A *pair* is a row
with one behaviour of its list. Pairs are numbered row by row, inside a row from the oldest behaviour to the newest.

Legend: U lists, N behaviours, R rows, P pairs; inside a block G lists, C rows a list, L behaviours a list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def blocks(offsets: Tensor, row_user: Tensor, *, width: int, most: int = 1 << 18) -> list[Block]:
    """Cut all pairs into nearly dense blocks. One list is never cut, however long.

    Lists without rows, and rows of empty lists, are in no block.

    Args:
        offsets, row_user: as above; rows may come in any order.
        width: numbers kept a row and a behaviour, which count against ``most`` beside the pairs.
        most: numbers a block may hold, so that it stays in the cache.
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
    live = live[torch.argsort(code, stable=True)]
    out: list[Block] = []
    for group in live.split(code.unique(return_counts=True)[1].tolist()):
        wide, tall = int(length_U[group].max()), int(count_U[group].max())
        for users in group.split(max(1, most // (wide * tall + (wide + tall) * width))):
            rows = _places(first_U[users], count_U[users])
            if not in_order:
                rows = Places(index=by_user[rows.index], pad=rows.pad, start=None)
            out.append(Block(rows=rows, behaviours=_places(offsets[users], length_U[users])))
    return out


def _grid(size: Tensor) -> Tensor:
    """Round up to a grid with eight steps an octave, so that near sizes become equal."""
    step = torch.exp2((torch.log2(size.double()).floor() - 3).clamp_min(0)).long()
    return (size + step - 1) // step * step


def _places(start_G: Tensor, size_G: Tensor) -> Places:
    """``start, start + 1, ...`` a line, the last one repeated as padding. The lines are disjoint and rise."""
    place = torch.arange(int(size_G.max()), device=start_G.device)
    pad = place >= size_G[:, None]
    index = start_G[:, None] + torch.minimum(place, size_G[:, None] - 1)
    if bool(pad.any()):
        return Places(index=index, pad=pad, start=None)
    first, last = int(index[0, 0]), int(index[-1, -1])
    return Places(index=index, pad=None, start=first if last - first + 1 == index.numel() else None)
