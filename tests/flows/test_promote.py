"""``promote`` and ``rollback`` as Prefect flows against a real server; the rules behind them are in tests/lineage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from couturier.components.errors import LineageError
from couturier.components.lineage.mlflow_store import MODEL, mlflow_client
from couturier.components.lineage.registry import Registry
from couturier.components.lineage.workspace import Workspace
from couturier.flows import launch


def _version(workspace: Workspace, number: int) -> None:
    """A registered version with just the tags that name it."""
    registry = Registry(workspace)
    registry.reconcile()
    tags = dict.fromkeys(("run_id", "recipe", "git_commit", "data_md5", "config_hash"), "x")
    tags |= {"bento": f"couturier:{number}", "manifest.rl": f"rl-{number}"}
    mlflow_client(workspace).create_model_version(MODEL, str(workspace.root), tags=tags)


def test_force_and_rollback_through_prefect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUTURIER_PROJECT", str(tmp_path))
    workspace = Workspace.find()
    for number in (1, 2):
        _version(workspace, number)
    with pytest.raises(LineageError, match="needs a reason"):
        launch.promote("1", who="ada", why="", force=True, recipe="smoke")
    first = launch.promote("1", who="ada", why="the first", force=True, recipe="smoke")
    assert first["moved"] and first["verdict"] is None and first["previous"] is None
    second = launch.promote("latest", who="ada", why="the second", force=True, recipe="smoke")
    assert (second["version"], second["previous"]) == (2, 1) and "overruled by ada" in second["sentence"]
    back = launch.rollback(who="bob", why="complaints")
    assert json.loads(json.dumps(back)) == {
        "version": 1,
        "previous": 2,
        "sentence": "Version 1 is the champion again; version 2 was rolled back.",
    }
    with pytest.raises(LineageError, match="nothing to roll back to"):
        launch.rollback(who="bob", why="again")
    champion = Registry(workspace).champion()
    assert champion is not None and champion.number == 1
