from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from couturier.components.errors import CouturierError
from couturier.components.lineage.workspace import Workspace
from couturier.flows.locks import only_one

HOLD = """
import sys, time
from pathlib import Path
from couturier.components.lineage.workspace import Workspace
from couturier.flows.locks import only_one
with only_one(Workspace(project=Path(sys.argv[1]), root=Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(project=tmp_path, root=tmp_path)


def hold(workspace: Workspace) -> subprocess.Popen[str]:
    """Another process that holds the workspace."""
    command = [sys.executable, "-c", HOLD, str(workspace.root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_two_do_not_collide_and_a_killed_holder_lets_go(workspace: Workspace) -> None:
    process = hold(workspace)
    try:
        said = rf"retraining is under way .*process {process.pid}.*Ctrl-C"
        with pytest.raises(CouturierError, match=said), only_one(workspace):
            raise AssertionError("two processes hold the workspace")
    finally:
        process.kill()
        process.wait()
    with only_one(workspace) as killed:
        assert killed == process.pid
    with only_one(workspace) as killed:
        assert killed is None


def test_the_same_process_may_enter_twice(workspace: Workspace) -> None:
    with only_one(workspace), only_one(workspace):
        pass
    assert not list(workspace.root.glob("*.holder.json"))


def test_two_kinds_of_work_do_not_disturb_each_other(workspace: Workspace) -> None:
    with only_one(workspace), only_one(workspace, "up"):
        assert {path.name for path in workspace.root.glob("*.holder.json")} == {
            "retrain.holder.json",
            "up.holder.json",
        }
