"""Workspaces with MLflow's real database, made once a session and copied: its migrations take seconds."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from couturier.components.files import write_json
from couturier.components.lineage.mlflow_store import ensure_database, experiment_id, mlflow_client
from couturier.components.lineage.registry import Registered, Registry
from couturier.components.lineage.stages import ArtifactStore, Stage, StageContext
from couturier.components.lineage.workspace import Workspace

WorkspaceMaker = Callable[[Path], Workspace]


@pytest.fixture(scope="session")
def make_workspace(tmp_path_factory: pytest.TempPathFactory) -> WorkspaceMaker:
    template = Workspace(project=tmp_path_factory.mktemp("template"), root=tmp_path_factory.mktemp("template-root"))
    ensure_database(template)

    def make(folder: Path) -> Workspace:
        workspace = Workspace(project=folder, root=folder / ".couturier")
        workspace.mlflow_db.parent.mkdir(parents=True)
        shutil.copy(template.mlflow_db, workspace.mlflow_db)
        with closing(sqlite3.connect(workspace.mlflow_db)) as connection, connection:
            connection.execute("UPDATE experiments SET artifact_location = ?", (str(workspace.mlflow_artifacts),))
        return workspace

    return make


@pytest.fixture
def workspace(make_workspace: WorkspaceMaker, tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path)


@dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0


def _run(context: StageContext) -> None:
    (context.out / "model").mkdir()
    write_json(context.out / "model" / "config.json", {"seed": context.config.seed})
    context.facts["seed"] = context.config.seed


Chain = Callable[[Workspace, int], dict[str, str]]
_INPUTS = {
    "sequences": ("validate",),
    "tokenise": ("sequences",),
    "judge": ("sequences",),
    "sft": ("sequences", "tokenise"),
    "rl": ("sequences", "tokenise", "judge", "sft"),
    "evaluate": ("sequences", "tokenise", "judge", "sft", "rl"),
    "package": ("sequences", "tokenise", "judge", "rl"),
}


@pytest.fixture(scope="session")
def make_chain() -> Chain:
    """The artifacts of one retraining, in small: ids by stage. ``seed`` changes RL and what follows it."""

    def make(workspace: Workspace, seed: int) -> dict[str, str]:
        store = ArtifactStore(workspace)
        first = Stage(name="validate", run=_run, config=Config(), external={"data": "d41d8"})
        ids = {"validate": store.materialise(first).id}
        for name, inputs in _INPUTS.items():
            config = Config(seed=seed if name in ("rl", "evaluate", "package") else 0)
            stage = Stage(name=name, run=_run, config=config, inputs={key: ids[key] for key in inputs})
            ids[name] = store.materialise(stage).id
        return ids

    return make


@pytest.fixture(scope="session")
def register(make_chain: Chain) -> Callable[..., Registered]:
    """Register the model of one small retraining."""

    def register(workspace: Workspace, seed: int, *, bento: str = "", run_id: str = "") -> Registered:
        ids = make_chain(workspace, seed)
        client = mlflow_client(workspace)
        run_id = run_id or client.create_run(experiment_id(client, workspace)).info.run_id
        return Registry(workspace).register(
            rl=ids["rl"],
            evaluate=ids["evaluate"],
            package=ids["package"],
            bento=bento or f"couturier:{seed}",
            recipe="smoke",
            config_hash="c0ffee",
            run_id=run_id,
            who="ada",
        )

    return register
