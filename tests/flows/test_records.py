from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from couturier.components.errors import LineageError
from couturier.components.lineage.workspace import Workspace
from couturier.flows import records


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(project=tmp_path, root=tmp_path / ".couturier")


def keep(workspace: Workspace, run_id: str, *, status: str = records.FINISHED, **facts: Any) -> None:
    started = f"2026-01-{len(list(workspace.runs.glob('*'))) + 1:02d}T00:00:00"
    records.save(workspace, {"run_id": run_id, "status": status, "started_at": started, "pid": os.getpid(), **facts})


def test_runs_come_newest_first_and_are_found_by_their_beginning(workspace: Workspace) -> None:
    for run_id in ("abc1", "abd2", "xyz3"):
        keep(workspace, run_id)
    assert [run["run_id"] for run in records.all_runs(workspace)] == ["xyz3", "abd2", "abc1"]
    assert records.find(workspace, "latest")["run_id"] == "xyz3"
    assert records.find(workspace, "abd")["run_id"] == "abd2"
    with pytest.raises(LineageError, match="2 runs .* begin with 'ab'"):
        records.find(workspace, "ab")
    with pytest.raises(LineageError, match="no run .* 'q'"):
        records.find(workspace, "q")


def test_a_report_is_asked_of_finished_runs_only(workspace: Workspace) -> None:
    keep(workspace, "done")
    keep(workspace, "late", status=records.FAILED)
    assert records.find(workspace, "latest", finished=True)["run_id"] == "done"


def test_without_runs_the_way_out_is_told(workspace: Workspace) -> None:
    with pytest.raises(LineageError, match="couturier retrain"):
        records.find(workspace, "latest")


def test_a_run_whose_process_is_gone_was_killed(workspace: Workspace) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    keep(workspace, "mine", status=records.RUNNING)
    keep(workspace, "theirs", status=records.RUNNING, pid=int(gone.stdout))
    found = {run["run_id"]: run["status"] for run in records.all_runs(workspace)}
    assert found == {"mine": records.RUNNING, "theirs": records.KILLED}


def test_a_file_that_is_no_record_is_passed_over(workspace: Workspace) -> None:
    keep(workspace, "one")
    (workspace.runs / "torn.json").write_text("{")
    assert len(records.all_runs(workspace)) == 1
