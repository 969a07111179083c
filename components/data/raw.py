"""What every adapter is given and what it gives back.

An adapter is one file with one function, ``load(settings: Config) -> RawTables``. It keeps every row it can read, dirty
ones too: rules, not adapters, decide what is quarantined. It raises only where no table can be made at all.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

PICTURE_SCHEMA = {
    "item_id": pl.String,
    "height": pl.Int32,
    "width": pl.Int32,
    "rgb": pl.Binary,
    "error": pl.String,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of ingestion. An adapter reads those that concern it."""

    adapter: str = "complete-journey"
    """Which adapter: one of ``ingest.ADAPTERS``."""
    picture_size: int = 32
    """Height and width of the item pictures, pixels."""
    max_users: int = 0
    """Keep this many users, drawn by the hash of their ids, the same ones everywhere; 0 keeps all."""
    folder: str = ""
    """``complete-journey``, ``movielens``: a folder with the data set's files; empty finds the installed package."""
    events: str = ""
    """``files``: the events table (.parquet, .csv, .jsonl)."""
    items: str = ""
    """``files``: the items table (.parquet, .csv, .jsonl)."""
    users: str = ""
    """``files``: a users table with ``user_id`` and any text columns; empty makes one from the events."""
    pictures: str = ""
    """``files``: the folder that picture paths are relative to; empty means the folder of the items table."""
    attribution: str = ""
    """``files``: the credit line to show wherever the pictures are shown."""
    feedback: str = ""
    """A folder with events that the service collected, to be joined to the adapter's; empty leaves them out."""
    session_gap_minutes: float = 0.0
    """``files``, ``movielens``: events of one user closer than this form one group, where no group_id is given;
    0 is the adapter's own choice: half an hour for ``files``, half a minute for ``movielens``."""


@dataclass(frozen=True, kw_only=True)
class RawTables:
    """The four tables and the facts of ``formats.py``, in the order they are written.

    ``inputs`` are the files that were read (or looked for): when none of them has changed, nothing needs reading again.
    """

    events: pl.DataFrame
    items: pl.DataFrame
    pictures: pl.DataFrame
    users: pl.DataFrame
    meta: dict[str, Any]
    inputs: tuple[Path, ...] = field(default=())


def sampled_users(user_ids: pl.Series, count: int) -> pl.Series:
    """``count`` of the users, chosen by the SHA-256 of their ids: the same on every machine; all where ``count`` is 0.

    Example:
        >>> sampled_users(pl.Series(["a", "b", "c"]), 2).to_list()
        ['b', 'c']
    """
    distinct = user_ids.drop_nulls().unique().sort()
    if count <= 0 or count >= len(distinct):
        return distinct
    by_hash = sorted(distinct.to_list(), key=lambda user: hashlib.sha256(user.encode()).digest())
    return pl.Series(distinct.name, by_hash[:count], dtype=pl.String).sort()


def picture_rows(item_ids: list[str], rgb_IHWC: np.ndarray) -> pl.DataFrame:
    """Rows of ``pictures.parquet`` for pictures uint8 ``[I, H, W, 3]``, one an item."""
    count, height, width, _ = rgb_IHWC.shape
    columns = {
        "item_id": item_ids,
        "height": [height] * count,
        "width": [width] * count,
        "rgb": [picture.tobytes() for picture in rgb_IHWC],
        "error": [None] * count,
    }
    return pl.DataFrame(columns, schema=PICTURE_SCHEMA)


def no_pictures(item_ids: list[str], errors: list[str]) -> pl.DataFrame:
    """Rows of ``pictures.parquet`` for items whose picture could not be made, each with the reason."""
    empty: list[None] = [None] * len(item_ids)
    return pl.DataFrame(
        {"item_id": item_ids, "height": empty, "width": empty, "rgb": empty, "error": errors}, schema=PICTURE_SCHEMA
    )
