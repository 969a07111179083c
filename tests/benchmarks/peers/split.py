"""One split, one negative set, one folder of Parquet files that every peer and every judge of ours reads.

    split/
      meta.json                         hash, counts, tasks, variants
      items.parquet                     item (from 1), item_id, category (from 1), title, text
      events.parquet                    user (from 0), item, group, position, timestamp_us, in each user's order
      topk-<task>.parquet               user, item, position, timestamp_us, role: train, valid or test
      ctr-<variant>-<stage>.parquet     user, item, seq_len, label; the history is the first seq_len events of the user

Top-K tasks. ``new``: each person's first meeting with each item, in order; the last is the test, the one before valid;
the whole catalogue is ranked with what was met before left out. ``basket`` (only where people take things again): the
last basket is the test, the one before valid; the whole catalogue is ranked and nothing is left out.

Click form. The last behaviour is the test, the last of the group before it valid, and earlier ones are drawn for
training. ``uniform``: negatives uniform over the catalogue, never in anything the person took. ``popular``: drawn by
how often an item was taken in training, never in anything the person took; where people take things again that would
make "was it in the history" the label, so there it means never in *that* basket. A history ends before the basket that
the positive is in.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from couturier.components.errors import DataError
from couturier.components.files import read_json, sha256_of_json, write_json
from couturier.components.runtime import seeded_numpy

from .sources import Source

FORMAT = 1
STAGES = ("train", "valid", "test")
VARIANTS = ("uniform", "popular")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a split depends on besides the data."""

    seed: int = 0
    train_positives: int = 16_000
    """Click form: how many behaviours are drawn for training; more costs every model alike."""
    train_negatives: int = 1
    """Click form: negatives for each positive in training."""
    eval_negatives: int = 9
    """Click form: negatives for each positive in valid and test."""
    min_history: int = 3
    """Click form: a positive with fewer events before it is left out of training."""


@dataclass(frozen=True)
class Split:
    """An opened split folder."""

    folder: Path
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return self.meta["name"]

    @property
    def hash(self) -> str:
        return self.meta["hash"]

    @property
    def items(self) -> int:
        """How many items the catalogue has; item numbers run from 1 to this."""
        return self.meta["items"]

    @property
    def tasks(self) -> list[str]:
        return self.meta["tasks"]

    def table(self, name: str) -> pl.DataFrame:
        """``items``, ``events``, ``topk-<task>`` or ``ctr-<variant>-<stage>``."""
        return pl.read_parquet(self.folder / f"{name}.parquet")

    def truth(self, task: str, stage: str) -> pl.DataFrame:
        """``user, item`` of what is to be ranked first at a stage, ``valid`` or ``test``."""
        return self.table(f"topk-{task}").filter(pl.col("role") == stage).select("user", "item")

    def seen(self, task: str, stage: str) -> pl.DataFrame | None:
        """``user, item`` that may not be ranked at a stage; None where nothing is left out."""
        if not self.meta["mask_seen"][task]:
            return None
        earlier = STAGES[: STAGES.index(stage)]
        return self.table(f"topk-{task}").filter(pl.col("role").is_in(earlier)).select("user", "item")


def open_split(folder: Path) -> Split:
    """A split that lies in a folder.

    Raises:
        DataError: the folder holds no split of this format.
    """
    if not (folder / "meta.json").is_file():
        raise DataError(f"{folder.name} holds no split: meta.json is missing. Delete the folder and run again.")
    meta = read_json(folder / "meta.json")
    if meta["format"] != FORMAT:
        raise DataError(f"{folder.name} is of format {meta['format']}, wanted {FORMAT}. Delete it and run again.")
    return Split(folder, meta)


def write_split(source: Source, config: Config, root: Path) -> Split:
    """Cut a data set and write it into ``root/<name>-<hash>``, or open it where it lies there."""
    digest = _digest(source, config)
    folder = root / f"{source.name}-{digest}"
    if (folder / "meta.json").is_file():
        return open_split(folder)
    folder.mkdir(parents=True, exist_ok=True)
    events = source.events.with_columns(pl.int_range(pl.len()).over("user").cast(pl.Int64).alias("position"))
    events.write_parquet(folder / "events.parquet")
    source.items.write_parquet(folder / "items.parquet")
    source.users.write_parquet(folder / "users.parquet")
    tasks = {"basket": _basket_roles(events)} if source.repeats else {}
    tasks["new"] = _new_roles(events)
    for task, frame in tasks.items():
        frame.write_parquet(folder / f"topk-{task}.parquet")
    rows = {}
    for variant in VARIANTS:
        within_basket = source.repeats and variant == "popular"
        for stage, frame in _ctr(events, source.items.height, variant, config, within_basket).items():
            frame.write_parquet(folder / f"ctr-{variant}-{stage}.parquet")
            rows[f"{variant}-{stage}"] = frame.height
    meta = {
        "format": FORMAT,
        "name": source.name,
        "hash": digest,
        "config": asdict(config),
        "users": source.users.height,
        "items": source.items.height,
        "categories": int(source.items["category"].to_numpy().max()),
        "events": events.height,
        "tasks": list(tasks),
        "mask_seen": {task: task == "new" for task in tasks},
        "test_users": {task: frame.filter(role="test")["user"].n_unique() for task, frame in tasks.items()},
        "ctr_rows": rows,
    }
    write_json(folder / "meta.json", meta)
    return Split(folder, meta)


def _digest(source: Source, config: Config) -> str:
    digest = hashlib.sha256(sha256_of_json({"format": FORMAT, **asdict(config)}).encode())
    for frame in (source.events, source.items):
        for column in frame:
            values = column.to_numpy() if column.dtype.is_integer() else "\n".join(column.to_list()).encode()
            digest.update(values.tobytes() if isinstance(values, np.ndarray) else values)
    return digest.hexdigest()[:12]


def _roles(events: pl.DataFrame, unit: str) -> pl.DataFrame:
    """The last ``unit`` of each person is the test, the one before valid, the rest train."""
    back = pl.col(unit).rank("dense", descending=True).over("user")
    role = pl.when(back == 1).then(pl.lit("test")).when(back == 2).then(pl.lit("valid")).otherwise(pl.lit("train"))
    return events.select("user", "item", "position", "timestamp_us", role.alias("role"))


def _new_roles(events: pl.DataFrame) -> pl.DataFrame:
    first = events.unique(["user", "item"], keep="first", maintain_order=True)
    return _roles(first.filter(pl.len().over("user") >= 3), "position")


def _basket_roles(events: pl.DataFrame) -> pl.DataFrame:
    return _roles(events, "group")


def _ctr(
    events: pl.DataFrame, items: int, variant: str, config: Config, within_basket: bool
) -> dict[str, pl.DataFrame]:
    """The rows of the three stages: each positive, followed by its negatives."""
    random = seeded_numpy(config.seed, "benchmark", "ctr", variant)
    began = pl.col("position").min().over("user", "group").alias("seq_len")
    back = pl.col("group").rank("dense", descending=True).over("user")
    last_of_group = pl.col("position") == pl.col("position").max().over("user", "group")
    rows = events.with_columns(began, back.alias("back"), last_of_group.alias("last"))
    earlier = rows.filter((pl.col("back") > 2) & (pl.col("seq_len") >= config.min_history))
    drawn = seeded_numpy(config.seed, "benchmark", "ctr", "positives").permutation(earlier.height)
    chosen = {
        "train": earlier[np.sort(drawn[: config.train_positives])],
        "valid": rows.filter((pl.col("back") == 2) & pl.col("last")),
        "test": rows.filter((pl.col("back") == 1) & pl.col("last")),
    }
    counts = np.bincount(rows.filter(pl.col("back") > 2)["item"].to_numpy(), minlength=items + 1).astype(float)
    weights = counts if variant == "popular" else np.ones(items + 1)
    weights[0] = 0.0
    cumulative = weights.cumsum() / weights.sum()
    keys = ["user", "group"] if within_basket else ["user"]
    out = {}
    for stage, positives in chosen.items():
        count = config.train_negatives if stage == "train" else config.eval_negatives
        out[stage] = _with_negatives(positives, _Taken(rows, keys, items), cumulative, count, random)
    return out


class _Taken:
    """Answers whether a person (or a basket) holds an item, for many pairs at once."""

    def __init__(self, rows: pl.DataFrame, keys: list[str], items: int) -> None:
        self._keys, self._items = keys, items
        self._held = np.unique(self._owner(rows) * (items + 1) + rows["item"].to_numpy())

    def _owner(self, rows: pl.DataFrame) -> np.ndarray:
        owner = np.zeros(rows.height, dtype=np.int64)
        for key in self._keys:
            owner = owner * 1_000_000 + rows[key].to_numpy()
        return owner

    def hold(self, rows: pl.DataFrame, items_RN: np.ndarray) -> np.ndarray:
        wanted = self._owner(rows)[:, None] * (self._items + 1) + items_RN
        place = np.searchsorted(self._held, wanted).clip(max=len(self._held) - 1)
        return self._held[place] == wanted


def _with_negatives(
    positives: pl.DataFrame, taken: _Taken, cumulative: np.ndarray, count: int, random: np.random.Generator
) -> pl.DataFrame:
    """Rows of each positive and its negatives, in that order. Drawn by rejection; a negative may come twice."""
    shape = (positives.height, count)
    drawn = np.searchsorted(cumulative, random.random(shape), side="right")
    for _ in range(200):
        bad = taken.hold(positives, drawn)
        if not bad.any():
            break
        drawn[bad] = np.searchsorted(cumulative, random.random(int(bad.sum())), side="right")
    else:
        raise DataError("some person took nearly every item, so no negatives are left; drop such people.")
    items = np.concatenate([positives["item"].to_numpy()[:, None], drawn], axis=1)
    label = np.zeros_like(items)
    label[:, 0] = 1
    each = count + 1
    return pl.DataFrame(
        {
            "user": np.repeat(positives["user"].to_numpy(), each),
            "item": items.ravel(),
            "seq_len": np.repeat(positives["seq_len"].to_numpy(), each),
            "label": label.ravel(),
        }
    )
