"""Events that the service collected, joined to what an adapter read: the loop from serving back to ingestion.

A feedback line is an event in contract form, and more (``event_id``, ``model``, how a picture was drawn). An answer to
a drawn picture counts for the real item nearest to it. A line that is no event (cut short, a field missing) cannot
become a row: it is named in the warnings, with its file and number, and stays where it lies.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from couturier.components.data.formats import EVENT_COLUMNS
from couturier.components.data.raw import RawTables
from couturier.components.data.reading import session_groups
from couturier.components.errors import DataError

_GAP_MINUTES = 30.0
_NAMED = 5  # lines named in the warnings; the rest are counted


def with_collected(raw: RawTables, folder: Path) -> RawTables:
    """``raw`` and the events of ``folder``'s ``events-*.jsonl``, in time order; new people join ``users``.

    Raises:
        DataError: no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"ingest.feedback names {folder}, which is no folder; the service keeps its feedback in one.")
    files = tuple(sorted(folder.glob("events-*.jsonl")))
    rows, unread = _rows(files)
    meta = dict(raw.meta)
    if unread:
        named = ", ".join(unread[:_NAMED]) + (f" and {len(unread) - _NAMED} more" if len(unread) > _NAMED else "")
        meta["warnings"] = [*meta.get("warnings", []), f"feedback lines that are no events: {named}"]
    inputs = (*raw.inputs, *files)
    if not rows:
        return dataclasses.replace(raw, meta=meta, inputs=inputs)
    columns: dict[str, Any] = dict(EVENT_COLUMNS)
    new = pl.DataFrame(rows, schema=columns, orient="row")
    new = session_groups(new, gap_minutes=_GAP_MINUTES).with_columns(group_id=pl.lit("feedback-") + pl.col("group_id"))
    new = new.with_columns(quantity=pl.lit(1.0)).select(
        [name if name in new.columns or name == "quantity" else pl.lit(None).alias(name) for name in raw.events.columns]
    )
    events = pl.concat([raw.events, new.cast(raw.events.schema)]).sort("timestamp", maintain_order=True)
    met = new.select("user_id").unique().join(raw.users.select("user_id"), on="user_id", how="anti").sort("user_id")
    users = pl.concat([raw.users, met], how="diagonal")
    return dataclasses.replace(raw, events=events, users=users, meta=meta, inputs=inputs)


def _rows(files: tuple[Path, ...]) -> tuple[list[tuple[Any, ...]], list[str]]:
    """``(events by time, lines that are none)``; an event that stands twice (by its id) counts once."""
    found: dict[str, tuple[Any, ...]] = {}
    unread: list[str] = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                said = json.loads(line)
                moment = datetime.fromisoformat(said["timestamp"]).astimezone(UTC)
                row = (str(said["user_id"]), str(said["item_id"]), moment, str(said["kind"]), float(said["value"]))
                found[str(said["event_id"])] = row
            except (ValueError, KeyError, TypeError):
                unread.append(f"{path.name}:{number}")
    return [row for _, row in sorted(found.items(), key=lambda pair: (pair[1][2], pair[0]))], unread
