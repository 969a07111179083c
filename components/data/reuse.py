"""How often people come back to an item, of all who tried it: the community's silent verdict.

Social Reward (arXiv 2402.09872) calls a picture good when others re-use it. Where nobody re-mixes pictures, we count a
person as re-using an item who took it again at another time, or who said so (liked, saved, shared it); that reading is
ours. Of who first tried an item late in the log, less is known; that is so for every item alike.
"""

from __future__ import annotations

import hashlib

import polars as pl

REUSE = "reuse.parquet"
PRAISE = ("like", "save", "share", "remix")
"""Kinds of behaviour that count as re-use at once."""
LOOKS = ("view",)
"""Kinds that are no more than a try, however often."""


FOLDS = 2
"""Parts that people fall into by their id, so that one part's re-use can be foretold from the others'."""


def reuse_of(events: pl.DataFrame) -> pl.DataFrame:
    """Count people by item.

    Args:
        events: in contract form; people and times that may be learned from.

    Returns:
        ``item_id``; ``fold``, which part of the people (0 or 1); ``tried``, those with any event on it; ``kept``, those
        of them who took it in two groups (at two times, where events have no ``group_id``) or praised it. int64, sorted
        by item_id and fold; an item that nobody of a fold tried has no row of it.

    Example:
        >>> events = pl.DataFrame({"user_id": ["a", "a", "b", "c"], "item_id": ["x"] * 4, "group_id": list("1234"),
        ...                        "kind": ["purchase", "purchase", "purchase", "like"]})
        >>> reuse_of(events).select("tried", "kept").sum().row(0)
        (3, 2)
    """
    times = pl.col("group_id") if "group_id" in events.columns else pl.col("timestamp").cast(pl.String)
    taking = ~pl.col("kind").is_in([*PRAISE, *LOOKS])
    users = events["user_id"].unique().sort()
    folds = pl.DataFrame(
        {"user_id": users, "fold": [_fold(user) for user in users]}, schema_overrides={"fold": pl.Int64}
    )
    people = events.group_by("item_id", "user_id").agg(
        again=times.filter(taking).n_unique() >= 2, praised=pl.col("kind").is_in(list(PRAISE)).any()
    )
    return (
        people.join(folds, on="user_id")
        .group_by("item_id", "fold")
        .agg(tried=pl.len().cast(pl.Int64), kept=(pl.col("again") | pl.col("praised")).sum().cast(pl.Int64))
        .sort("item_id", "fold")
    )


def _fold(user: str) -> int:
    return hashlib.sha256(f"reuse/{user}".encode()).digest()[0] % FOLDS
