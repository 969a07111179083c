"""A behaviour log on disk that a fit streams: one Parquet file, a user's events together and in time order.

``log.parquet`` has ``user`` i32, ``item`` i32 (a catalogue row), ``time_s`` i64, ``kind`` i8, ``value`` f32; a row
group is a shard of whole users. ``log.json`` has the numbers of users, items and events, and the names of the kinds.
Writing partitions by user and sorts a shard at a time, so neither writing nor reading ever holds the log in memory.

Letters: N events of a shard, U users of a shard.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pyarrow import parquet

from couturier.components.errors import DataError
from couturier.components.files import read_json, write_json, written_beside

LOG, FACTS = "log.parquet", "log.json"
_SCHEMA = pa.schema(
    [("user", pa.int32()), ("item", pa.int32()), ("time_s", pa.int64()), ("kind", pa.int8()), ("value", pa.float32())]
)
_MOST_SHARDS = 512  # each is a file that is open while a log is written
_READ_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Whole users of a log: user ``users_U[u]`` owns events ``offsets[u]`` to ``offsets[u + 1]``, oldest first."""

    users_U: np.ndarray
    offsets: np.ndarray
    item_N: np.ndarray
    time_s_N: np.ndarray
    kind_N: np.ndarray
    value_N: np.ndarray

    @classmethod
    def joined(cls, shards: Sequence[Shard]) -> Shard:
        """Several shards as one."""
        starts = np.cumsum([0, *(shard.offsets[-1] for shard in shards[:-1])])
        ends = [shard.offsets[1:] + start for shard, start in zip(shards, starts, strict=True)]
        return cls(
            users_U=np.concatenate([shard.users_U for shard in shards]),
            offsets=np.concatenate([[0], *ends]).astype(np.int64),
            item_N=np.concatenate([shard.item_N for shard in shards]),
            time_s_N=np.concatenate([shard.time_s_N for shard in shards]),
            kind_N=np.concatenate([shard.kind_N for shard in shards]),
            value_N=np.concatenate([shard.value_N for shard in shards]),
        )


class Log:
    """A log that ``write_log`` wrote.

    Raises:
        DataError: the folder holds none.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / FACTS).exists():
            raise DataError(f"no behaviour log in {folder}: {FACTS} is missing.")
        facts = read_json(folder / FACTS)
        self.folder = folder
        self.users: int = facts["users"]
        self.items: int = facts["items"]
        self.events: int = facts["events"]
        self.kinds: list[str] = facts["kinds"]
        self.shards: int = facts["shards"]

    def shard(self, index: int) -> Shard:
        """One shard; only it is read."""
        with parquet.ParquetFile(self.folder / LOG) as file:
            table = file.read_row_group(index)
        user_N = table["user"].to_numpy()
        starts = np.flatnonzero(np.r_[True, np.diff(user_N) != 0]) if len(user_N) else np.zeros(0, dtype=np.int64)
        return Shard(
            users_U=user_N[starts],
            offsets=np.r_[starts, len(user_N)].astype(np.int64),
            item_N=table["item"].to_numpy(),
            time_s_N=table["time_s"].to_numpy(),
            kind_N=table["kind"].to_numpy(),
            value_N=table["value"].to_numpy(),
        )

    def counts(self, holdout: int = 0) -> np.ndarray:
        """int64 ``[I]``: how often each item was taken, each user's last ``holdout`` events left out."""
        out = np.zeros(self.items, dtype=np.int64)
        for index in range(self.shards):
            shard = self.shard(index)
            owner = np.repeat(np.arange(len(shard.users_U)), np.diff(shard.offsets))
            kept = np.arange(len(shard.item_N)) < shard.offsets[1:][owner] - holdout
            out += np.bincount(shard.item_N[kept], minlength=self.items)
        return out


def write_log(events: Path, item_ids: Sequence[str], folder: Path, *, rows_per_shard: int = 65_536) -> Log:
    """Write the log of an ``events.parquet`` in contract form (see ``data.formats``); other items' events are left out.

    Users are numbered by their sorted ids; ``users.parquet`` keeps the ids. Kinds are numbered from 0 by their sorted
    names. ``value`` is the event's value (0 where it is null).

    Raises:
        DataError: no event is about a catalogue item, or a timestamp or id is null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = pl.DataFrame({"item_id": list(item_ids), "item": np.arange(len(item_ids), dtype=np.int32)})
    scan = pl.scan_parquet(events)
    kept = scan.join(known.lazy(), on="item_id", how="semi")
    users = kept.group_by("user_id").len().sort("user_id").collect(engine="streaming")
    if not users.height:
        raise DataError(f"no event in {events.name} is about one of the {len(item_ids)} catalogue items.")
    if users["user_id"].null_count():
        raise DataError(f"{users['user_id'].null_count()} user_id in {events.name} is null; validate the data first.")
    kinds = scan.select(pl.col("kind").unique().sort()).collect(engine="streaming")["kind"].to_list()
    total = int(users["len"].sum())
    target = max(rows_per_shard, -(-total // _MOST_SHARDS))
    users = users.with_columns(
        user=pl.int_range(pl.len(), dtype=pl.Int32), shard=((pl.col("len").cum_sum() - 1) // target).cast(pl.Int32)
    )
    # A user longer than a shard leaves numbers unused: shards are numbered again without gaps.
    users = users.with_columns(shard=pl.col("shard").rank("dense").cast(pl.Int32) - 1)
    parts = folder / ".parts"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    try:
        _partition(events, users, known, kinds, parts)
        shards = int(users["shard"].max() or 0) + 1  # type: ignore[arg-type]
        _join(parts, shards, folder / LOG)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    users.select("user", "user_id").write_parquet(folder / "users.parquet")
    facts = {"users": users.height, "items": len(item_ids), "events": total, "kinds": kinds, "shards": shards}
    write_json(folder / FACTS, facts)
    return Log(folder)


def _partition(events: Path, users: pl.DataFrame, items: pl.DataFrame, kinds: list[str], parts: Path) -> None:
    """Every event into the file of its user's shard, in the order it stands."""
    kind_of = pl.DataFrame({"kind": kinds, "code": np.arange(len(kinds), dtype=np.int8)})
    writers: dict[int, pa.RecordBatchStreamWriter] = {}
    try:
        for rows in _batches(events):
            frame = rows.join(users.select("user_id", "user", "shard"), on="user_id", maintain_order="left")
            frame = frame.join(items, on="item_id", maintain_order="left")
            frame = frame.join(kind_of, on="kind", maintain_order="left")
            frame = frame.select(
                "shard",
                "user",
                "item",
                (pl.col("timestamp").dt.epoch("us") // 1_000_000).alias("time_s"),
                pl.col("code").alias("kind"),
                pl.col("value").fill_null(0.0).cast(pl.Float32),
            )
            for (shard,), part in frame.partition_by("shard", as_dict=True, include_key=False).items():
                number = int(shard)
                if number not in writers:
                    # Not Parquet: hundreds of its writers open at a time hold a megabyte each.
                    writers[number] = pa.ipc.new_stream(parts / f"{number}.arrows", _SCHEMA)
                writers[number].write_table(part.to_arrow().cast(_SCHEMA))
    finally:
        for writer in writers.values():
            writer.close()


def _batches(events: Path) -> Iterator[pl.DataFrame]:
    with parquet.ParquetFile(events) as file:
        for batch in file.iter_batches(_READ_ROWS, columns=["user_id", "item_id", "timestamp", "kind", "value"]):
            frame = pl.from_arrow(batch)
            assert isinstance(frame, pl.DataFrame)
            yield frame


def _join(parts: Path, shards: int, out: Path) -> None:
    """Each shard sorted by user and time, as a row group of one file."""
    with written_beside(out) as beside, parquet.ParquetWriter(beside, _SCHEMA, compression="zstd") as writer:
        for number in range(shards):
            frame = pl.read_ipc_stream(parts / f"{number}.arrows").sort("user", "time_s", maintain_order=True)
            writer.write_table(frame.to_arrow().cast(_SCHEMA), row_group_size=max(1, frame.height))
