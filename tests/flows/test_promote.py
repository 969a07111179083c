"""``promote`` and ``rollback`` as Prefect flows against a real server; the rules behind them are in tests/lineage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from couturier.components.lineage.mlflow_store import MODEL, mlflow_client
from couturier.components.lineage.registry import Registry
from couturier.components.lineage.workspace import Workspace

# A process of its own: Prefect reads where its server is when it is imported, which other tests may have done.
_SCRIPT = """
import json
from couturier.components.errors import LineageError
from couturier.components.lineage.workspace import Workspace
from couturier.flows.orchestrator import orchestrated

def refused(call, **arguments):
    try:
        return call(**arguments)
    except LineageError as error:
        return str(error)

with orchestrated(Workspace.find()) as server:
    server.wait()
    from couturier.components.lineage.gate import Config
    from couturier.flows.promote import promote
    from couturier.flows.rollback import rollback
    answers = [
        refused(promote, version="1", who="ada", force=True),
        promote(version="1", who="ada", why="the first", force=True),
        promote(who="ada", why="the second", force=True),
        promote(version="champion", who="ada", gate=Config(draws=10)),
        rollback(who="bob", why="complaints"),
        refused(rollback, who="bob", why="again"),
    ]
print(json.dumps(answers))
"""


def _version(workspace: Workspace, number: int) -> None:
    """A registered version with just the tags that name it."""
    registry = Registry(workspace)
    registry.reconcile()
    tags = dict.fromkeys(("run_id", "recipe", "git_commit", "data_md5", "config_hash"), "x")
    tags |= {"bento": f"couturier:{number}", "manifest.rl": f"rl-{number}"}
    mlflow_client(workspace).create_model_version(MODEL, str(workspace.root), tags=tags)


def test_force_and_rollback_through_prefect(tmp_path: Path) -> None:
    workspace = Workspace(project=tmp_path, root=tmp_path / ".couturier")
    for number in (1, 2):
        _version(workspace, number)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**os.environ, "COUTURIER_PROJECT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    needs, first, second, again, back, nothing = json.loads(done.stdout.splitlines()[-1])
    assert "needs a reason" in needs
    assert first["moved"] and first["verdict"] is None and first["previous"] is None
    assert (second["version"], second["previous"]) == (2, 1) and "overruled by ada" in second["sentence"]
    assert not again["moved"] and "champion already" in again["sentence"]
    assert back == {
        "version": 1,
        "previous": 2,
        "sentence": "Version 1 is the champion again; version 2 was rolled back.",
    }
    assert "nothing to roll back to" in nothing
    champion = Registry(workspace).champion()
    assert champion is not None and champion.number == 1
