"""What every judge takes and gives: jagged histories, candidates by content, a state per user.

Letters: U users, C candidates of one user, T history length, N rows in all, D feature width, I catalogue items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from couturier.components.errors import DataError


@dataclass(frozen=True, kw_only=True)
class HistoryBatch:
    """Histories of ``U`` users, one after the other; user ``u`` owns rows ``offsets[u]`` to ``offsets[u + 1]``.

    Args:
        features_ND: float content features of each history item, as ``Judge.embed_items`` or ``embed_pictures`` gives.
        age_days_N: days between the last time the item was taken and now.
        weight_N: how much of it there was, such as a recency-decayed count; one for a plain event.
        offsets: int64 ``[U + 1]``; a user without history has two equal neighbours.
        kind_N: int64 kind of behaviour, where the log has several (view, like, comment...); None is all 0, plain.
        value_N: float measure of the behaviour, such as a watched share; None is all 0.
        items_N: int64 catalogue rows, -1 for what is in no catalogue; None where they are not known.
        in_time_order: whether each user's rows already run from oldest to newest.

    Example:
        >>> empty = HistoryBatch.empty(users=2, width=4)
        >>> len(empty), empty.lengths.tolist()
        (2, [0, 0])
    """

    features_ND: Tensor
    age_days_N: Tensor
    weight_N: Tensor
    offsets: Tensor
    kind_N: Tensor | None = None
    value_N: Tensor | None = None
    items_N: Tensor | None = None
    in_time_order: bool = False

    @classmethod
    def empty(cls, *, users: int, width: int) -> HistoryBatch:
        """Users of whom nothing is known."""
        return cls(
            features_ND=torch.zeros(0, width),
            age_days_N=torch.zeros(0),
            weight_N=torch.zeros(0),
            offsets=torch.zeros(users + 1, dtype=torch.int64),
        )

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """int64 ``[U]``."""
        return self.offsets.diff()

    def check(self, width: int) -> None:
        """Refuse what would poison a score.

        Raises:
            DataError: shapes that do not agree, offsets that do not rise from 0 to N, or a value that is not finite.
        """
        n = self.features_ND.shape[0]
        if self.features_ND.ndim != 2 or self.features_ND.shape[1] != width:
            raise DataError(
                f"features_ND has shape {list(self.features_ND.shape)}, wanted [N, {width}]: "
                "take the features from this judge's embed_items or embed_pictures."
            )
        if self.age_days_N.shape != (n,) or self.weight_N.shape != (n,):
            raise DataError(
                f"age_days_N {list(self.age_days_N.shape)} and weight_N {list(self.weight_N.shape)} must be [{n}], "
                "one value a history item."
            )
        offsets = self.offsets
        if offsets.dtype != torch.int64 or offsets.ndim != 1 or offsets.numel() == 0:
            raise DataError(f"offsets is {offsets.dtype} {list(offsets.shape)}, wanted int64 [U + 1].")
        if offsets[0] != 0 or offsets[-1] != n or (offsets.diff() < 0).any():
            raise DataError(f"offsets must rise from 0 to {n}; they start at {offsets[0]} and end at {offsets[-1]}.")
        for name, row in (("kind_N", self.kind_N), ("value_N", self.value_N), ("items_N", self.items_N)):
            if row is not None and row.shape != (n,):
                raise DataError(f"{name} {list(row.shape)} must be [{n}], one value a history item.")
        for name, value in (
            ("features_ND", self.features_ND),
            ("age_days_N", self.age_days_N),
            ("weight_N", self.weight_N),
            ("value_N", self.value_N),
        ):
            if value is not None:
                check_finite(f"history {name}", value)

    @property
    def users_N(self) -> Tensor:
        """int64 ``[N]``, whose row each is."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.offsets.device), self.lengths)

    @property
    def kinds_N(self) -> Tensor:
        """int64 kinds, 0 where none are known."""
        return self.offsets.new_zeros(len(self.features_ND)) if self.kind_N is None else self.kind_N

    @property
    def values_N(self) -> Tensor:
        """Float values, 0 where none are known."""
        return self.age_days_N.new_zeros(len(self.features_ND)) if self.value_N is None else self.value_N

    def rows(self, index_M: Tensor | slice, offsets: Tensor, *, in_time_order: bool | None = None) -> HistoryBatch:
        """A history of some rows of this one, under new offsets."""
        return HistoryBatch(
            features_ND=self.features_ND[index_M],
            age_days_N=self.age_days_N[index_M],
            weight_N=self.weight_N[index_M],
            offsets=offsets,
            kind_N=None if self.kind_N is None else self.kind_N[index_M],
            value_N=None if self.value_N is None else self.value_N[index_M],
            items_N=None if self.items_N is None else self.items_N[index_M],
            in_time_order=self.in_time_order if in_time_order is None else in_time_order,
        )

    def of_users(self, start: int, stop: int) -> HistoryBatch:
        """The histories of users ``start`` to ``stop``, as views of these."""
        begin, end = int(self.offsets[start]), int(self.offsets[stop])
        return self.rows(slice(begin, end), self.offsets[start : stop + 1] - begin)

    def oldest_first(self) -> HistoryBatch:
        """The same histories, each user's rows from oldest to newest; rows of the same age keep their order."""
        if self.in_time_order:
            return self
        by_age = self.age_days_N.argsort(descending=True, stable=True)
        return self.rows(by_age[self.users_N[by_age].argsort(stable=True)], self.offsets, in_time_order=True)

    def newest(self, count: int) -> HistoryBatch:
        """Each user's newest ``count`` rows, oldest first."""
        ordered = self.oldest_first()
        kept_U = ordered.lengths.clamp(max=count)
        if bool((kept_U == ordered.lengths).all()):
            return ordered
        offsets = torch.cat([kept_U.new_zeros(1), kept_U.cumsum(0)])
        users_M = torch.repeat_interleave(torch.arange(len(self), device=offsets.device), kept_U)
        place_M = torch.arange(int(offsets[-1]), device=offsets.device) - offsets[users_M]
        return ordered.rows(place_M + (ordered.offsets[1:] - kept_U)[users_M], offsets)

    def pad(self, rows_NX: Tensor) -> Tensor:
        """Values of the history rows ``[N, ...]`` -> ``[U, T, ...]``, zeros on the right."""
        real_UT = self.real_UT()
        out = rows_NX.new_zeros(*real_UT.shape, *rows_NX.shape[1:])
        out[real_UT] = rows_NX
        return out

    def real_UT(self) -> Tensor:
        """Bool ``[U, T]``, False where ``padded`` and ``pad`` pad."""
        lengths = self.lengths
        longest = int(lengths.max()) if len(lengths) else 0
        return torch.arange(longest, device=lengths.device) < lengths[:, None]

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(features_UTD, age_days_UT, weight_UT, real_UT)``, zeros on the right, where ``real_UT`` is False."""
        real_UT = self.real_UT()
        users, longest = real_UT.shape
        features = self.features_ND.new_zeros(users, longest, self.features_ND.shape[1])
        age = self.age_days_N.new_zeros(users, longest)
        weight = self.weight_N.new_zeros(users, longest)
        features[real_UT], age[real_UT], weight[real_UT] = self.features_ND, self.age_days_N, self.weight_N
        return features, age, weight, real_UT


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """What a judge learns from in one step: histories, and candidates of which the first ``positives`` were taken.

    Args:
        history: what came before; ``items_N`` is set where the judge may need to know which items they were.
        items_UC: int64 catalogue rows of the candidates, -1 where a negative is missing.
        candidates_UCD: their features.
        positives: P, how many of the C candidates were taken; they stand first.
        pool_S: int64 catalogue rows that serve all users of the batch as negatives (sampled softmax), or None.
        pool_log_q_S: log of the expected number of times each was drawn, for the logQ correction; 0 for a whole
            catalogue.
        catalogue_ID: features of the catalogue, where the histories hold its items and nothing else, and they and the
            candidates are shown just as it has them; a judge may then project it once instead of every row.
    """

    history: HistoryBatch
    items_UC: Tensor
    candidates_UCD: Tensor
    positives: int
    pool_S: Tensor | None = None
    pool_log_q_S: Tensor | None = None
    catalogue_ID: Tensor | None = None

    @property
    def real_UC(self) -> Tensor:
        """Bool ``[U, C]``, False where a candidate is missing."""
        return self.items_UC >= 0


class Judge(Protocol):
    """A user-interest model: reads a history once, scores many candidates, says why.

    It works from content, so a picture that never existed can be scored. ``state`` is the judge's own; its first axis
    is the user, and it can be kept between calls.
    """

    @property
    def width(self) -> int:
        """D, the width of the features."""
        ...

    def embed_pictures(self, rgb_N3HW: Tensor) -> Tensor:
        """Float pictures 0..1 without words -> features ``[N, D]``."""
        ...

    def embed_items(self, *, words: bool = True) -> Tensor:
        """The catalogue -> features ``[I, D]``, with or without its words."""
        ...

    def encode(self, history: HistoryBatch) -> Any:
        """Histories -> a state a user. An empty history gives a learned default state."""
        ...

    def score(self, state: Any, candidates_UCD: Tensor) -> Tensor:
        """Logits ``[U, C]``; higher means likelier to be taken next."""
        ...

    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded."""
        ...

    def standardise(self, logits: Tensor) -> Tensor:
        """Logits in units of the SD over (train user, random catalogue item) pairs, 0 at their mean."""
        ...


def check_finite(what: str, value: Tensor) -> None:
    """Raises:
    DataError: a value is NaN or infinite.
    """
    # The sum is finite unless a value is not (or it overflows): far cheaper than a mask for what is nearly always fine.
    if not torch.isfinite(value.detach().sum()) and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise DataError(
            f"{what} holds {bad} values that are not finite numbers (NaN or infinity); leave those rows out."
        )
