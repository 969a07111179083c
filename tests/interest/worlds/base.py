"""What a planted world is: a seeded simulator whose best possible score is known, and a comparison run in it.

Each module here plants one world. ``compare(seed)`` fits the judge its paper is about and the judge it should beat (or
equal) on the same log, and gives a figure a user for each; ``tests/benchmarks/worlds.py`` runs them all over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from couturier.components.interest.log import Log, write_log


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``ours_U`` and ``other_U``: the same figure of the same users; ``best_U`` that of the Bayes-optimal score."""

    claim: str
    ours: str
    other: str
    figure: str
    ours_U: np.ndarray
    other_U: np.ndarray
    best_U: np.ndarray | None = None

    def difference(self, *, seed: int = 0, draws: int = 1000) -> tuple[float, float, float]:
        """Mean of ours minus other over users, with its 95 % bootstrap interval."""
        gap_U = self.ours_U - self.other_U
        random = np.random.default_rng(seed)
        means = gap_U[random.integers(len(gap_U), size=(draws, len(gap_U)))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        return float(gap_U.mean()), float(low), float(high)


def planted_log(
    folder: Path,
    histories: Sequence[Sequence[int]],
    items: int,
    *,
    times_h: Sequence[Sequence[float]] | None = None,
    kinds: Sequence[Sequence[str]] | None = None,
    values: Sequence[Sequence[float]] | None = None,
) -> Log:
    """A log of one list of catalogue rows a user, oldest first, an hour apart unless ``times_h`` says when."""
    began, rows = datetime(2024, 1, 1, tzinfo=UTC), []
    for user, taken in enumerate(histories):
        for place, item in enumerate(taken):
            hours = times_h[user][place] if times_h else float(place)
            kind = kinds[user][place] if kinds else "view"
            value = values[user][place] if values else 0.0
            moment = began + timedelta(hours=hours)
            rows.append((f"u{user:06d}", f"i{item:06d}", moment, kind, value))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "kind", "value"], orient="row")
    folder.mkdir(parents=True, exist_ok=True)
    frame.with_columns(pl.col("timestamp").cast(pl.Datetime("us", "UTC"))).write_parquet(folder / "events.parquet")
    return write_log(folder / "events.parquet", [f"i{item:06d}" for item in range(items)], folder / "log")
