"""One JSON file a retraining run under ``<workspace>/runs``: what ``couturier runs`` and ``couturier report`` read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from couturier.components.errors import LineageError
from couturier.components.files import read_json, write_json
from couturier.components.lineage.workspace import Workspace

RUNNING, FINISHED, FAILED, STOPPED, KILLED = "running", "finished", "failed", "stopped", "killed"


def save(workspace: Workspace, record: dict[str, Any]) -> Path:
    """Write the record of ``record["run_id"]``, over the one that was there."""
    path = workspace.runs / f"{record['run_id']}.json"
    write_json(path, record)
    return path


def all_runs(workspace: Workspace) -> list[dict[str, Any]]:
    """Every record, newest first. A run that says it is under way while its process is gone was killed."""
    found = []
    for path in workspace.runs.glob("*.json"):
        try:
            record = read_json(path)
        except (OSError, json.JSONDecodeError):
            continue  # being replaced right now, or no record of ours
        if record.get("status") == RUNNING and not _alive(int(record["pid"])):
            record["status"] = KILLED
        found.append(record)
    return sorted(found, key=lambda record: str(record["started_at"]), reverse=True)


def find(workspace: Workspace, what: str, *, finished: bool = False) -> dict[str, Any]:
    """The record of a run id (or its beginning), or of the ``latest`` run.

    Raises:
        LineageError: there is none, or the beginning fits several.
    """
    known = [run for run in all_runs(workspace) if run["status"] == FINISHED or not finished]
    if not known:
        raise LineageError(f"no finished run is recorded in {workspace.runs}. Run `couturier retrain` first.")
    if what == "latest":
        return known[0]
    fitting = [run for run in known if run["run_id"].startswith(what)]
    if len(fitting) != 1:
        said = "no run" if not fitting else f"{len(fitting)} runs"
        raise LineageError(f"{said} in {workspace.runs} begin with {what!r}. `couturier runs` lists them all.")
    return fitting[0]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
