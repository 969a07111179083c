"""Training examples out of the ``sequences`` artifact: a person's favourites, and what they took next.

Letters: W windows, U windows of a step, P positives, C candidates, I items, A views, D features.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from couturier.components.data.formats import Windows
from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.judge import history_batch
from couturier.components.interest.metrics import Baskets, Popularity, negatives
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import seeded, seeded_numpy
from couturier.components.together import rank, world


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """What a step shows a judge."""

    batch: int = 128
    """Windows a step."""
    positives: int = 4
    negatives: int = 8
    """Candidates of a window in a step: out of its next basket, and popularity-matched ones that are not in it."""
    drop_words: float = 0.6
    """Share of windows whose candidates come without words and identity, as drawn pictures do."""
    drop_items: float = 0.15
    """Share of history items left out in a step."""
    drop_history: float = 0.03
    """Share of windows whose whole history is left out, from which the judge learns what to say of strangers."""

    def __post_init__(self) -> None:
        for name in ("batch", "positives", "negatives"):
            if vars(self)[name] < 1:
                raise ConfigError(f"judge.{name} is {vars(self)[name]}; it must be at least 1.")


class WindowExamples:
    """Feeds a fit from training windows; a step's number says all about its batch."""

    def __init__(
        self, config: WindowConfig, train: Windows, popularity: Popularity, views_IAP: Tensor, *, seed: int
    ) -> None:
        self.config, self.train, self.popularity = config, train, popularity
        self.views_IAP, self.seed = views_IAP, seed
        self.baskets = Baskets(train, len(views_IAP))
        self.usable = np.flatnonzero(np.diff(train.basket_offsets) > 0)
        self._rows: list[int] = []

    def batch(self, judge: ContentJudge, step: int) -> TrainBatch:
        """The batch of a step; this process's share of it under ``torchrun``."""
        config, train = self.config, self.train
        random, noise = seeded_numpy(self.seed, "judge", str(step)), seeded(self.seed, "judge", str(step))
        rows = self.usable[random.integers(len(self.usable), size=config.batch)]
        start_U1, size_U1 = train.basket_offsets[rows, None], np.diff(train.basket_offsets)[rows, None]
        place = start_U1 + np.floor(random.random((len(rows), config.positives)) * size_U1).astype(np.int64)
        bad = negatives(self.popularity, self.baskets, rows, config.negatives, random)
        items_UC = torch.from_numpy(np.concatenate([train.basket[place], bad], axis=1).astype(np.int64))
        items_ID = judge.embed_items()
        history = self._dropped(history_batch(train, rows, items_ID), noise)
        candidates_UCD = self._candidates(judge, items_UC, items_ID, noise)
        self._rows = rows.tolist()
        whole = TrainBatch(
            history=history, items_UC=items_UC, candidates_UCD=candidates_UCD, positives=config.positives
        )
        return share_of(whole, rank(), world())

    def rows(self) -> list[int]:
        """The windows of the last batch."""
        return self._rows

    def state(self) -> dict[str, Any]:
        """Nothing: a step's number is enough."""
        return {}

    def seek(self, state: dict[str, Any]) -> None:
        """Nothing to do."""

    def _dropped(self, history: HistoryBatch, noise: torch.Generator) -> HistoryBatch:
        """Histories with some items, and now and then all of them, left out."""
        real_UT = history.real_UT()
        kept_UT = torch.rand(real_UT.shape, generator=noise) >= self.config.drop_items
        kept_U1 = torch.rand((len(history), 1), generator=noise) >= self.config.drop_history
        kept_UT = kept_UT & kept_U1 & real_UT
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept_UT.sum(1).cumsum(0)])
        return history.rows(kept_UT[real_UT].nonzero()[:, 0], offsets)

    def _candidates(self, judge: ContentJudge, items_UC: Tensor, items_ID: Tensor, noise: torch.Generator) -> Tensor:
        """Features ``[U, C, D]`` of candidates, each through a random look, some users' without words."""
        index = items_UC.clamp_min(0)
        look = torch.randint(self.views_IAP.shape[1], items_UC.shape, generator=noise)
        width = judge.items.picture_width
        worded_U11 = torch.rand((len(items_UC), 1, 1), generator=noise) >= self.config.drop_words
        return torch.cat([self.views_IAP[index, look], items_ID[index][..., width:] * worded_U11], dim=-1)


def share_of(batch: TrainBatch, part: int, parts: int) -> TrainBatch:
    """Every ``parts``-th user of a batch, from ``part`` on; the batch itself where there is one part.

    Shares are equal, so that processes' means can be averaged: what does not divide by ``parts`` is left out.
    """
    if parts == 1:
        return batch
    users = torch.arange(part, len(batch.history) // parts * parts, parts)
    lengths = batch.history.lengths[users]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    owner = torch.repeat_interleave(torch.arange(len(users)), lengths)
    rows = torch.arange(int(offsets[-1])) - offsets[owner] + batch.history.offsets[users][owner]
    return dataclasses.replace(
        batch,
        history=batch.history.rows(rows, offsets),
        items_UC=batch.items_UC[users],
        candidates_UCD=batch.candidates_UCD[users],
    )
