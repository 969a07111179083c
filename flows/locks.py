"""One retraining, and one ``couturier up``, at a time in a workspace.

The lock is the operating system's: it goes when its process goes, whatever ends it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from couturier.components.errors import CouturierError
from couturier.components.files import read_json, write_json
from couturier.components.lineage.workspace import Workspace

SAID = {"retrain": "a retraining is under way", "up": "`couturier up` runs already"}


@contextmanager
def only_one(workspace: Workspace, what: Literal["retrain", "up"] = "retrain") -> Iterator[int | None]:
    """Hold the workspace for one kind of work. Yields the process id of a holder that was killed, or None.

    The same process may enter twice.

    Raises:
        CouturierError: another process holds it.
    """
    from filelock import FileLock, Timeout

    workspace.root.mkdir(parents=True, exist_ok=True)
    holder = workspace.root / f"{what}.holder.json"
    lock = FileLock(workspace.root / f"{what}.lock", is_singleton=True, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        seen = _read(holder)
        said = f"process {seen['pid']}, since {seen['since']}" if seen else "another process"
        raise CouturierError(
            f"{SAID[what]} in {workspace.root} ({said}). Wait for it, stop it with Ctrl-C, or name another "
            "folder in COUTURIER_WORKSPACE."
        ) from None
    first = lock.lock_counter == 1
    try:
        left = _read(holder) if first else None
        if first:
            write_json(holder, {"pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")})
        yield int(left["pid"]) if left else None
    finally:
        if first:
            holder.unlink(missing_ok=True)
        lock.release()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = read_json(path)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found
