"""From clean events to training windows: what a person had done before, and what they took next.

The split is by user *and* by time (generation.md section 23): training windows are those of training users whose
target lies before the cut; validation and test windows belong to other users and lie after it. The catalogue (which
items a model may draw) and every popularity are counted on training events alone.

The history of a window is the person's favourites: items of earlier groups by recency-decayed count. The target is the
next group (a basket); its inner order is arbitrary in the log, so it is shuffled by seed: file order would leak ids.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from couturier.components.data.formats import EVENTS, ITEMS, META, PICTURES, USERS, Catalogue, Windows
from couturier.components.data.reuse import REUSE, reuse_of
from couturier.components.errors import DataError
from couturier.components.files import read_json
from couturier.components.lineage.stages import StageContext
from couturier.components.runtime import seeded_numpy

DAY_US = 86_400_000_000


@dataclass(frozen=True, kw_only=True)
class Config:
    """How windows are cut."""

    seed: int = 0
    """Seeds the split of users and the order inside a target."""
    history: int = 20
    """Favourites a window keeps. The study found 20 clearly better than 10."""
    half_life_days: float = 60.0
    """A purchase this old counts half."""
    train_share: float = 0.75
    valid_share: float = 0.05
    time_cut: float = 0.70
    """Training targets lie before this quantile of the event times, the others after it."""
    min_item_events: int = 20
    min_item_users: int = 10
    """An item enters the catalogue with that many training events of that many training users."""
    min_history: int = 5
    """A window needs that many distinct earlier items."""
    windows_per_user: int = 24
    """Training windows a user at most, evenly spaced, so that heavy users do not dominate."""
    test_windows_per_user: int = 2
    """Many windows of few users give useless intervals; two of every user give good ones."""
    future_groups: int = 4
    """Groups after the target that count as the person's future (used by the reward of training users only)."""
    ignored_kinds: tuple[str, ...] = ("dislike",)
    """Behaviours that are no wish for more: they are neither history nor target."""
    max_users: int = 0
    """Keep that many users (0: all); small recipes use it."""
    max_items: int = 0
    """Keep that many most bought items (0: all)."""


def run(ctx: StageContext) -> None:
    """Stage ``sequences``: ``validate`` → catalogue, pictures, and the windows of train, valid, test and latest."""
    config: Config = ctx.config
    source = ctx.inputs["validate"]
    meta = read_json(source / META)
    events = pl.read_parquet(source / EVENTS).filter(~pl.col("kind").is_in(list(config.ignored_kinds)))
    split_of, cut_us = split_users(events, config)
    training = events.filter(
        pl.col("user_id").is_in([user for user, split in split_of.items() if split == "train"])
        & (pl.col("timestamp").dt.epoch("us") < cut_us)
    )
    catalogue = build_catalogue(
        pl.read_parquet(source / ITEMS), pl.read_parquet(source / PICTURES), training, meta, config
    )
    catalogue.save(ctx.out)
    reuse_of(training).write_parquet(ctx.out / REUSE)
    if (source / USERS).exists():
        shutil.copyfile(source / USERS, ctx.out / USERS)
    groups = user_groups(events, catalogue, split_of)
    ctx.progress.start("windows", len(groups), unit="users")
    cutter = _Cutter(len(catalogue), config, cut_us)
    for user, moments in groups.items():
        cutter.add(user, split_of[user], moments)
        ctx.progress.advance()
    ctx.progress.stop()
    facts = {"items": len(catalogue), "users": len(split_of), "cut": str(np.datetime64(cut_us, "us"))}
    for split, windows in cutter.finish().items():
        if split != "latest" and len(windows) == 0:
            raise DataError(
                f"split {split!r} has no windows: {len(split_of)} users, each needs {config.min_history} distinct "
                "earlier items. Bring more data, or lower sequences.min_history, min_item_events or min_item_users."
            )
        windows.save(ctx.out, split)
        facts[f"{split}_windows"], facts[f"{split}_users"] = len(windows), len(windows.users)
    in_catalogue = int(events["item_id"].is_in(catalogue.item_ids).sum())
    facts["events"], facts["events_outside_catalogue"] = events.height, events.height - in_catalogue
    ctx.facts.update(facts)
    ctx.tracker.params(facts)


def split_users(events: pl.DataFrame, config: Config) -> tuple[dict[str, str], int]:
    """``({user id: split}, cut in microseconds)``. A user's split depends on the id and the seed alone, by hash order.

    Raises:
        DataError: fewer than ten users.
    """
    users = sorted(events["user_id"].unique().to_list(), key=lambda user: _hash(config.seed, user))
    if config.max_users:
        users = users[: config.max_users]
    if len(users) < 10:
        raise DataError(f"events hold {len(users)} users; at least 10 are needed to split by user. Bring more data.")
    train_end = round(len(users) * config.train_share)
    valid_end = train_end + max(1, round(len(users) * config.valid_share))
    names = ["train" if i < train_end else "valid" if i < valid_end else "test" for i in range(len(users))]
    times = events["timestamp"].dt.epoch("us").sort()
    return dict(zip(users, names, strict=True)), int(times[int(len(times) * config.time_cut)])


def build_catalogue(
    items: pl.DataFrame, pictures: pl.DataFrame, training: pl.DataFrame, meta: dict, config: Config
) -> Catalogue:
    """Items with enough training events and users, sorted by id, with their pictures.

    Raises:
        DataError: no item is left, or pictures differ in size.
    """
    counts = training.group_by("item_id").agg(
        purchases=pl.len().cast(pl.Int64), buyers=pl.col("user_id").n_unique().cast(pl.Int64)
    )
    kept = (
        items.join(counts, on="item_id", how="inner")
        .filter((pl.col("purchases") >= config.min_item_events) & (pl.col("buyers") >= config.min_item_users))
        .sort(["purchases", "item_id"], descending=[True, False])
    )
    if config.max_items:
        kept = kept.head(config.max_items)
    kept = kept.sort("item_id").join(pictures.select("item_id", "height", "width", "rgb"), on="item_id", how="inner")
    if kept.is_empty():
        raise DataError(
            f"no item has {config.min_item_events} training events of {config.min_item_users} users and a picture. "
            "Lower sequences.min_item_events or sequences.min_item_users, or bring more data."
        )
    sizes = kept.select("height", "width").unique()
    if sizes.height > 1:
        raise DataError(f"pictures have {sizes.height} different sizes; one is wanted. Ingest again with one size.")
    height, width = sizes.row(0)
    rgb = np.frombuffer(b"".join(kept["rgb"].to_list()), np.uint8).reshape(kept.height, height, width, 3)
    return Catalogue(
        items=kept.drop("height", "width", "rgb"),
        rgb_IHWC=rgb,
        attributes=tuple(meta["attributes"]),
        attribution=meta["attribution"],
    )


def user_groups(
    events: pl.DataFrame, catalogue: Catalogue, split_of: dict[str, str]
) -> dict[str, list[tuple[int, np.ndarray]]]:
    """``{user: [(time in microseconds, item indices of the group), ...]}`` in time order; other items are left out."""
    index = pl.DataFrame({"item_id": catalogue.item_ids}).with_row_index("item")
    if "group_id" not in events.columns:
        events = events.with_columns(group_id=pl.col("timestamp").cast(pl.String))
    rows = (
        events.filter(pl.col("user_id").is_in(list(split_of)))
        .join(index, on="item_id", how="inner")
        .group_by("user_id", "group_id")
        .agg(time=pl.col("timestamp").dt.epoch("us").max(), items=pl.col("item").cast(pl.Int32).sort())
        .sort("user_id", "time", "group_id")
    )
    groups: dict[str, list[tuple[int, np.ndarray]]] = {user: [] for user in sorted(split_of)}
    for user, time, items in rows.select("user_id", "time", "items").iter_rows():
        groups[user].append((time, np.asarray(items, np.int32)))
    return groups


class _Cutter:
    """Collects the windows of every split while users stream by."""

    def __init__(self, n_items: int, config: Config, cut_us: int) -> None:
        self.n_items, self.config, self.cut_us = n_items, config, cut_us
        self.rows: dict[str, list[dict[str, Any]]] = {s: [] for s in ("train", "valid", "test", "latest")}
        self.users: dict[str, list[str]] = {split: [] for split in self.rows}

    def add(self, user: str, split: str, moments: list[tuple[int, np.ndarray]]) -> None:
        """Cut one user's windows into ``split`` and their present state into ``latest``."""
        distinct = np.cumsum(_first_seen([items for _, items in moments], self.n_items))
        able = [b for b in range(1, len(moments)) if distinct[b - 1] >= self.config.min_history]
        if split == "train":
            able = [b for b in able if moments[b][0] < self.cut_us]
        else:
            able = [b for b in able if moments[b][0] >= self.cut_us]
        wanted = self.config.windows_per_user if split == "train" else self.config.test_windows_per_user
        chosen = set(_evenly(able, wanted))
        rng = seeded_numpy(self.config.seed, "basket order", user)
        count = np.zeros(self.n_items)
        last = np.full(self.n_items, -1, np.int64)
        before = moments[0][0] if moments else 0
        for b, (time, items) in enumerate(moments):
            count *= 0.5 ** ((time - before) / DAY_US / self.config.half_life_days)
            before = time
            if b in chosen:
                target = np.unique(items)
                rng.shuffle(target)
                ahead = [later for _, later in moments[b + 1 : b + 1 + self.config.future_groups]]
                future = np.unique(np.concatenate(ahead)) if ahead else np.empty(0, np.int32)
                self._keep(split, user, self._row(count, last, time) | {"basket": target, "future": future})
            np.add.at(count, items, 1.0)
            last[items] = time
        if moments:
            empty = np.empty(0, np.int32)
            self._keep("latest", user, self._row(count, last, before) | {"basket": empty, "future": empty})

    def _row(self, count: np.ndarray, last: np.ndarray, time: int) -> dict[str, Any]:
        """The history as seen at ``time``. Ties are broken by item index, which earlier purchases alone decide."""
        k = self.config.history
        seen = np.flatnonzero(last >= 0)
        top = seen[np.lexsort((seen, -count[seen]))][:k]
        recent = seen[np.lexsort((seen, -last[seen]))][:k]
        return {
            "time": np.int64(time),
            "favourites": _pad(top, k, -1, np.int32),
            "weight": _pad(count[top], k, 0, np.float32),
            "age": _pad((time - last[top]) / DAY_US, k, 0, np.float32),
            "recent": _pad(recent, k, -1, np.int32),
        }

    def _keep(self, split: str, user: str, row: dict[str, Any]) -> None:
        if not self.users[split] or self.users[split][-1] != user:
            self.users[split].append(user)
        self.rows[split].append(row | {"user": np.int32(len(self.users[split]) - 1)})

    def finish(self) -> dict[str, Windows]:
        return {split: _windows(self.users[split], rows, self.config.history) for split, rows in self.rows.items()}


def _windows(users: list[str], rows: list[dict[str, Any]], history: int) -> Windows:
    def stack(name: str, dtype: type, width: int) -> np.ndarray:
        return np.stack([row[name] for row in rows]) if rows else np.empty((0, width), dtype)

    def jagged(name: str) -> tuple[np.ndarray, np.ndarray]:
        lengths = [len(row[name]) for row in rows]
        values = np.concatenate([row[name] for row in rows]) if rows else np.empty(0, np.int32)
        return values.astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    basket, basket_offsets = jagged("basket")
    future, future_offsets = jagged("future")
    return Windows(
        users=users,
        user_W=np.array([row["user"] for row in rows], np.int32),
        time_W=np.array([row["time"] for row in rows], np.int64),
        favourites_WK=stack("favourites", np.int32, history),
        weight_WK=stack("weight", np.float32, history),
        age_days_WK=stack("age", np.float32, history),
        recent_WK=stack("recent", np.int32, history),
        basket=basket,
        basket_offsets=basket_offsets,
        future=future,
        future_offsets=future_offsets,
    )


def _first_seen(groups: Iterable[np.ndarray], n_items: int) -> list[int]:
    """How many items each group holds that no earlier group held."""
    seen = np.zeros(n_items, bool)
    fresh = []
    for items in groups:
        unique = np.unique(items)
        fresh.append(int((~seen[unique]).sum()))
        seen[unique] = True
    return fresh


def _evenly(values: list[int], wanted: int) -> list[int]:
    """At most ``wanted`` of ``values``, evenly spaced over the list.

    Example:
        >>> _evenly([1, 2, 3, 4, 5, 6, 7, 8], 2)
        [3, 7]
    """
    if len(values) <= wanted:
        return values
    places = ((np.arange(wanted) + 0.5) * len(values) / wanted).astype(int)
    return [values[place] for place in places]


def _pad(values: np.ndarray, width: int, fill: float, dtype: type) -> np.ndarray:
    padded: np.ndarray = np.full(width, fill, dtype)
    padded[: len(values)] = values
    return padded


def _hash(seed: int, user: str) -> str:
    return hashlib.sha256(f"{seed}/{user}".encode()).hexdigest()
