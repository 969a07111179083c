"""Events that served pictures earned, appended one line each, whole or not at all.

A line has the columns of the event contract (``user_id``, ``item_id``, ``timestamp``, ``kind``, ``value``) and, for a
picture that was drawn, ``generation``: its id and everything needed to draw it again. ``item_id`` is then the nearest
real item. ``event_id`` is unique; ``model`` is the bento that answered.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from couturier.components.errors import CouturierError
from couturier.components.files import sync_folder

MAX_FILE_BYTES = 64 * 1024 * 1024


class FeedbackFullError(CouturierError):
    """Today's file has reached its size limit; nothing was written."""


class FeedbackLog:
    """One JSON-lines file a day (UTC) in ``folder``. Safe between threads and between processes."""

    def __init__(self, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.folder, self.max_file_bytes = folder, max_file_bytes
        self._lock = threading.Lock()

    def append(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Write one event, synced to disk, and return it with ``event_id`` and ``timestamp`` (set here, UTC).

        Raises:
            FeedbackFullError: the file of the day would grow beyond its limit.
        """
        now = datetime.now(UTC)
        row = {**event, "event_id": uuid.uuid4().hex, "timestamp": now.isoformat(timespec="microseconds")}
        line = json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"events-{now:%Y-%m-%d}.jsonl"
        fresh = not path.exists()
        with self._lock, path.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file.fileno()).st_size
            if size + len(line) > self.max_file_bytes:
                raise FeedbackFullError(
                    f"{path.name} holds {size} bytes of at most {self.max_file_bytes}; ingest and move it, then go on."
                )
            self._append_whole(file.fileno(), line, size)
        if fresh:
            sync_folder(self.folder)
        return row

    def _append_whole(self, descriptor: int, line: bytes, size: int) -> None:
        """One write; a line that was cut short (full disk) is taken back, one that a kill left open is closed first."""
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            written = os.write(descriptor, line)
            if written != len(line):
                raise FeedbackFullError(f"only {written} of {len(line)} bytes fitted on the disk; free some space.")
            os.fsync(descriptor)
        except (OSError, FeedbackFullError):
            os.ftruncate(descriptor, size)
            raise


class Drawn:
    """The latest pictures drawn, by id, so that feedback can name one. Bounded; the oldest go first."""

    def __init__(self, limit: int = 20_000) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._recipes: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def remember(self, generation_id: str, recipe: dict[str, Any]) -> None:
        with self._lock:
            self._recipes[generation_id] = recipe
            self._recipes.move_to_end(generation_id)
            while len(self._recipes) > self.limit:
                self._recipes.popitem(last=False)

    def recipe(self, generation_id: str) -> dict[str, Any] | None:
        with self._lock:
            return self._recipes.get(generation_id)
