"""One retraining at a time in a workspace. The lock is the operating system's: it goes when its process goes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from couturier.components.errors import CouturierError
from couturier.components.files import read_json, write_json
from couturier.components.lineage.workspace import Workspace


@contextmanager
def only_one(workspace: Workspace) -> Iterator[int | None]:
    """Hold the workspace for a retraining. Yields the process id of a holder that was killed, or None.

    The same process may enter twice. What a killed process held is free at once, whatever killed it.

    Raises:
        CouturierError: another process holds it.
    """
    from filelock import FileLock, Timeout

    workspace.root.mkdir(parents=True, exist_ok=True)
    holder = workspace.root / "retrain.holder.json"
    lock = FileLock(workspace.root / "retrain.lock", is_singleton=True, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        seen = _read(holder)
        said = f"process {seen['pid']}, since {seen['since']}" if seen else "another process"
        raise CouturierError(
            f"a retraining is under way in {workspace.root} ({said}). Wait for it, stop it with Ctrl-C, or name another "
            "folder in COUTURIER_WORKSPACE."
        ) from None
    try:
        left = _read(holder) if lock.lock_counter == 1 else None
        if lock.lock_counter == 1:
            write_json(holder, {"pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")})
        yield int(left["pid"]) if left else None
    finally:
        if lock.lock_counter == 1:
            holder.unlink(missing_ok=True)
        lock.release()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = read_json(path)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found
