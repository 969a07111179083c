"""What an encoder that no reward has seen says of a policy, on validation users.

The reward looks with the judge's eyes and at pixels; a policy that fools those gains nothing here. The same windows
and the same sampling seeds every time, so that two looks differ by the policy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from couturier.components.alignment.rewards import membership
from couturier.components.data.formats import Catalogue, Windows
from couturier.components.evaluation.encoder import ItemFinder, load_encoder
from couturier.components.generator.codec import Codec
from couturier.components.lineage.stages import StageContext
from couturier.components.runtime import derived_seed

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """How often and how closely to look."""

    every: int = 20
    """Steps of a method between two looks."""
    windows: int = 128
    """The first so many validation windows."""
    pictures: int = 8
    """Drawn a window."""


class Draws(Protocol):
    """What the watcher needs of a generator; see :meth:`JanusGenerator.sample`."""

    def sample(self, favourites_UK: np.ndarray, n: int, *, seeds: list[int]) -> torch.Tensor: ...


class Watch:
    """Looks at a policy's pictures for a fixed set of validation windows.

    Args:
        ctx: the stage's context; ``sequences`` is read from its inputs.
        codec: what turns codes into pictures.
    """

    def __init__(self, ctx: StageContext, catalogue: Catalogue, codec: Codec, config: WatchConfig) -> None:
        self.codec, self.pictures = codec, config.pictures
        valid = Windows.load(ctx.inputs["sequences"], "valid")
        self.rows = np.arange(min(config.windows, len(valid)))
        self.favourites_WK = valid.favourites_WK[self.rows]
        self.seeds = [derived_seed(0, "watch", str(row)) for row in self.rows]
        self.finder = ItemFinder(load_encoder(), catalogue, size=codec.picture_size)
        self.basket_WI = membership([valid.basket_of(row) for row in self.rows.tolist()], len(catalogue))
        self.history_WI = membership(list(self.favourites_WK), len(catalogue))

    @torch.no_grad()
    def look(self, generator: Draws) -> dict[str, float]:
        """Means over windows: ``watch_basket_precision`` (share of pictures that are items of the true next basket),
        ``watch_sim_next`` (mean similarity of a picture to the nearest item of that basket), ``watch_copied`` (share
        out of the history) and ``watch_distinct`` (share of different items among a window's pictures)."""
        windows, n = len(self.rows), self.pictures
        if not windows:
            return dict.fromkeys(("watch_basket_precision", "watch_sim_next", "watch_copied", "watch_distinct"), 0.0)
        parts = [
            generator.sample(self.favourites_WK[i : i + _BATCH], n, seeds=self.seeds[i : i + _BATCH])
            for i in range(0, windows, _BATCH)
        ]
        rows = self.finder.look(torch.cat(parts).flatten(0, 1), self.codec)
        nearest_Wn = self.finder.nearest_R[rows].view(windows, n)
        similar_WnI = (self.finder.features_RD[rows] @ self.finder.tiles_ID.T).view(windows, n, -1)
        to_next_Wn = similar_WnI.masked_fill(~self.basket_WI[:, None], -1.0).amax(-1)
        return {
            "watch_basket_precision": float(self.basket_WI.gather(1, nearest_Wn).float().mean()),
            "watch_sim_next": float(to_next_Wn.mean()),
            "watch_copied": float(self.history_WI.gather(1, nearest_Wn).float().mean()),
            "watch_distinct": float(np.mean([len(set(row)) / n for row in nearest_Wn.tolist()])),
        }
