"""Workspaces with MLflow's real database, made once a session and copied: its migrations take seconds."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from couturier.components.data.formats import Windows
from couturier.components.files import read_json, write_json
from couturier.components.lineage import promotion
from couturier.components.lineage.mlflow_store import ensure_database, experiment_id, mlflow_client
from couturier.components.lineage.registry import Registered, Registry, Version
from couturier.components.lineage.stages import ArtifactStore, Stage, StageContext
from couturier.components.lineage.workspace import Workspace

PEOPLE = 120
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


def _sequences(context: StageContext) -> None:
    """Test windows of people of whom more and less is known, and one demographics column."""
    people = [f"u{number:03}" for number in range(PEOPLE)]
    one = np.ones((PEOPLE, 1), dtype=np.float32)
    empty, offsets = np.zeros(0, dtype=np.int32), np.zeros(PEOPLE + 1, dtype=np.int64)
    Windows(
        users=people,
        user_W=np.arange(PEOPLE, dtype=np.int32),
        time_W=np.zeros(PEOPLE, dtype=np.int64),
        favourites_WK=one.astype(np.int32),
        weight_WK=np.arange(PEOPLE, dtype=np.float32)[:, None],
        age_days_WK=one,
        recent_WK=one.astype(np.int32),
        basket=empty,
        basket_offsets=offsets,
        future=empty,
        future_offsets=offsets,
    ).save(context.out, "test")
    ages = [("young", "old")[number % 2] for number in range(PEOPLE)]
    pl.DataFrame({"user_id": people, "age": ages}).write_parquet(context.out / "users.parquet")


def figures(row: str, seed: int) -> pl.DataFrame:
    """What evaluation writes, drawn at random: the model of a higher seed draws better baskets."""
    rng = np.random.default_rng([seed, len(row)])
    means = {"basket_precision": 0.1 + 0.05 * seed, "validity": 0.98, "diversity": 0.7, "novelty": 0.6}
    if row == "wrong_user":
        means["basket_precision"] = 0.02
    frames = [
        pl.DataFrame(
            {
                "row": row,
                "user_id": [f"u{number:03}" for number in range(PEOPLE)],
                "window": 0,
                "metric": metric,
                "value": rng.normal(mean, 0.02, size=PEOPLE),
            }
        )
        for metric, mean in means.items()
    ]
    return pl.concat(frames)


def _evaluate(context: StageContext) -> None:
    _run(context)
    seed = context.config.seed
    pl.concat([figures("grpo", seed), figures("wrong_user", seed)]).write_parquet(context.out / "per_user.parquet")


def duel(context: StageContext) -> None:
    """The champion's figures, in place of the stage that really draws them."""
    seed = read_json(context.inputs["rl"] / "model" / "config.json")["seed"]
    figures("champion", seed).write_parquet(context.out / "per_user.parquet")


@pytest.fixture
def quick_duel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real stage draws thousands of pictures with two trained models; the end-to-end tests run that one."""

    def stage(candidate: Version, champion: Version) -> Stage:
        return Stage(name="duel", run=duel, config=Config(), inputs={"rl": champion.manifests["rl"]})

    monkeypatch.setattr(promotion, "duel_stage", stage)


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
            run = {"sequences": _sequences, "evaluate": _evaluate}.get(name, _run)
            stage = Stage(name=name, run=run, config=config, inputs={key: ids[key] for key in inputs})
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
