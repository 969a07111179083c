from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from couturier.components.errors import ConfigError, LineageError
from couturier.components.files import write_json
from couturier.components.lineage import tracker as tracker_module
from couturier.components.lineage.mlflow_store import ensure_database, mlflow_client, mlflow_uri
from couturier.components.lineage.stages import ArtifactStore, Stage, StageContext
from couturier.components.lineage.tags import clean_name, flatten, tag_text
from couturier.components.lineage.tracker import RunTracker, hourly_cost
from couturier.components.lineage.tracking import open_run, run_facts, run_of, step_run, tracked
from couturier.components.lineage.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 60
    fail: bool = False
    inner: tuple[int, ...] = (1, 2)


def learn(context: StageContext) -> None:
    """A loop with a checkpoint every 20 steps; COUTURIER_TEST_KILL_AT kills it there."""
    kept = context.scratch / "checkpoints"
    first = max([int(path.name[5:]) for path in kept.glob("step-*")], default=0)
    for step in range(first, context.config.steps):
        context.tracker.metrics({"loss": 1 / (step + 1), "hit@10": step / 100}, step=step)
        if step % 20 == 19:
            write_json(kept / f"step-{step + 1:08}" / "state.json", {"step": step})
        if str(step) == os.environ.get("COUTURIER_TEST_KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
    if context.config.fail:
        raise ValueError("the loss is no number")
    context.tracker.picture("grid/../before", np.full((4, 4, 3), 0.5, dtype=np.float32))
    write_json(context.out / "model" / "config.json", {"a": 1})
    (context.out / "table.parquet").write_bytes(b"large")
    context.facts.update(gauc=[0.6, 0.5, 0.7], table={"grpo": {"hit@10": [0.2, 0.1, 0.3]}}, name="tiny", whole=True)


STAGE = Stage(name="sft", run=learn, config=Config(), inputs={})


def _steps(workspace: Workspace, run_id: str, key: str) -> list[int]:
    return [metric.step for metric in mlflow_client(workspace).get_metric_history(run_id, key)]


def _files(workspace: Workspace, run_id: str) -> set[str]:
    root = Path(mlflow_client(workspace).get_run(run_id).info.artifact_uri)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def _made(workspace: Workspace) -> dict[str, Any]:
    run_id = run_of(workspace, STAGE.id)
    assert run_id is not None
    return run_facts(workspace, run_id)


def test_a_stage_leaves_everything_in_a_nested_run(workspace: Workspace) -> None:
    store = ArtifactStore(workspace)
    with open_run(workspace, name="retrain", recipe="demo", params={"rl": {"steps": 3}}, who="ada") as flow:
        artifact = tracked(store, STAGE, parent_run_id=flow.run_id)
        with step_run(workspace, parent_run_id=flow.run_id, name="ingest") as step:
            step.facts({"rows": 7})
        flow.metrics({"wall_s": 2.5})
    assert not artifact.reused and artifact.id == STAGE.id, "tracking changes no id"
    parent = run_facts(workspace, flow.run_id)
    assert (
        parent["status"] == "FINISHED"
        and parent["params"] == {"rl.steps": "3"}
        and parent["metrics"] == {"wall_s": 2.5}
    )
    assert [(child["name"], child["status"]) for child in parent["children"]] == [
        ("sft", "FINISHED"),
        ("ingest", "FINISHED"),
    ]
    run = _made(workspace)
    assert run["params"] == {"steps": "60", "fail": "false", "inner": "[1, 2]"}
    assert run["metrics"]["facts/gauc/low"] == 0.5 and run["metrics"]["facts/table/grpo/hit_at_10/high"] == 0.3
    assert run["metrics"]["peak_rss_bytes"] > 1e6 and run["tags"]["facts/name"] == "tiny"
    assert run["tags"]["facts/whole"] == "true" and run["tags"]["device.cores"]
    assert _steps(workspace, run["run_id"], "loss") == list(range(60))
    assert _steps(workspace, run["run_id"], "hit_at_10") == list(range(60))
    assert _files(workspace, run["run_id"]) == {
        "pictures/grid/before.png", "model/config.json", "facts.json", "manifest.json",
        "checkpoints/step-00000060/state.json",
    }  # fmt: skip
    assert not (workspace.root / "mlflow" / "pending" / STAGE.id).exists()


def test_a_stage_says_what_it_cost_where_an_hour_has_a_price(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUTURIER_COST_PER_HOUR", "3.6")
    with open_run(workspace, name="retrain") as flow:
        tracked(ArtifactStore(workspace), STAGE, parent_run_id=flow.run_id)
    figures = _made(workspace)["metrics"]
    assert figures["cost"] == pytest.approx(figures["seconds"] / 1000)
    monkeypatch.setenv("COUTURIER_COST_PER_HOUR", "cheap")
    with pytest.raises(ConfigError, match="COUTURIER_COST_PER_HOUR is 'cheap'"):
        hourly_cost()


def test_a_reused_stage_is_a_tag(workspace: Workspace) -> None:
    store = ArtifactStore(workspace)
    with open_run(workspace, name="one") as one:
        tracked(store, STAGE, parent_run_id=one.run_id)
    with open_run(workspace, name="two") as two:
        assert tracked(store, STAGE, parent_run_id=two.run_id).reused
    second = run_facts(workspace, two.run_id)
    assert second["children"] == [] and second["tags"]["reused.sft"] == STAGE.id
    assert second["tags"]["reused_run.sft"] == _made(workspace)["run_id"]


@pytest.mark.parametrize("kill_at", [15, 47])
def test_a_killed_stage_goes_on_in_its_run_with_every_step_once(workspace: Workspace, kill_at: int) -> None:
    """15: before the first checkpoint, all is done again. 47: eight steps past the second one."""
    store = ArtifactStore(workspace)
    code = (
        "import importlib.util, sys; from pathlib import Path\n"
        "spec = importlib.util.spec_from_file_location(sys.argv[2], sys.argv[3])\n"
        "module = importlib.util.module_from_spec(spec); sys.modules[sys.argv[2]] = module\n"
        "spec.loader.exec_module(module)\n"
        "workspace = module.Workspace(project=Path(sys.argv[1]).parent, root=Path(sys.argv[1]))\n"
        "with module.open_run(workspace, name='killed') as flow:\n"
        "    module.tracked(module.ArtifactStore(workspace), module.STAGE, parent_run_id=flow.run_id)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(workspace.root), __name__, __file__],
        env={**os.environ, "COUTURIER_TEST_KILL_AT": str(kill_at), "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    killed = _made(workspace)
    assert killed["status"] == "RUNNING"
    with open_run(workspace, name="goes on") as flow:
        tracked(store, STAGE, parent_run_id=flow.run_id)
    run = _made(workspace)
    assert run["run_id"] == killed["run_id"] and run["status"] == "FINISHED"
    assert _steps(workspace, run["run_id"], "loss") == list(range(60)), "none lost, none twice"
    assert run["tags"]["mlflow.parentRunId"] == flow.run_id
    old_parent = killed["tags"]["mlflow.parentRunId"]
    assert run["tags"]["couturier.earlier_parents"] == old_parent
    assert run_facts(workspace, old_parent)["status"] == "KILLED", "the flow of the killed process is not left running"


def test_a_failed_stage_is_failed_and_goes_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(workspace)
    failing = replace(STAGE, config=Config(fail=True))
    with pytest.raises(ValueError, match="no number"), open_run(workspace, name="fails") as flow:
        tracked(store, failing, parent_run_id=flow.run_id)
    assert run_facts(workspace, flow.run_id)["status"] == "FAILED"
    run_id = run_of(workspace, failing.id)
    assert run_id is not None
    failed = run_facts(workspace, run_id)
    assert failed["status"] == "FAILED" and "no number" in failed["tags"]["couturier.error"]
    with pytest.raises(ValueError, match="no number"), open_run(workspace, name="fails again") as flow:
        tracked(store, failing, parent_run_id=flow.run_id)
    assert run_of(workspace, failing.id) == run_id and len(_steps(workspace, run_id, "loss")) == 60


def test_a_kill_after_the_last_byte_is_completed_on_reuse(workspace: Workspace) -> None:
    """The artifact is whole, its run is not: the figures said are in the file, the facts are in the artifact."""
    store = ArtifactStore(workspace)
    client = mlflow_client(workspace)
    run = client.create_run("1", tags={"couturier.artifact": STAGE.id, "couturier.kind": "stage"}, run_name="sft")
    pending = workspace.root / "mlflow" / "pending" / STAGE.id
    write_json(pending / "run.json", {"run_id": run.info.run_id})
    lines = [json.dumps(["loss", 0.5, 1, step]) for step in range(3)]
    (pending / "metrics.jsonl").write_text("\n".join(lines) + '\n["loss", 0.', encoding="utf-8")
    store.materialise(STAGE)
    with open_run(workspace, name="next") as flow:
        assert tracked(store, STAGE, parent_run_id=flow.run_id).reused
    found = _made(workspace)
    assert found["run_id"] == run.info.run_id and found["status"] == "FINISHED"
    assert _steps(workspace, run.info.run_id, "loss") == [0, 1, 2] and "facts/gauc/mean" in found["metrics"]
    assert "model/config.json" in _files(workspace, run.info.run_id) and not pending.exists()


def test_a_thrown_away_database_is_no_obstacle(workspace: Workspace) -> None:
    pending = workspace.root / "mlflow" / "pending" / STAGE.id
    write_json(pending / "run.json", {"run_id": "0" * 32})
    with open_run(workspace, name="anew") as flow:
        tracked(ArtifactStore(workspace), STAGE, parent_run_id=flow.run_id)
    assert _made(workspace)["status"] == "FINISHED"


def test_a_busy_database_keeps_figures_for_later(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with open_run(workspace, name="busy") as flow:
        pass
    tracker = RunTracker(mlflow_client(workspace), flow.run_id)
    whole = MlflowClient.log_batch

    def busy(*arguments: Any, **more: Any) -> None:
        raise MlflowException("database is locked")

    monkeypatch.setattr(MlflowClient, "log_batch", busy)
    with caplog.at_level(logging.WARNING):
        for step in range(tracker_module.BATCH + 5):
            tracker.metrics({"loss": 1.0}, step=step)
    assert "database is locked" in caplog.text
    with pytest.raises(MlflowException):
        tracker.flush()
    monkeypatch.setattr(MlflowClient, "log_batch", whole)
    tracker.flush()
    assert _steps(workspace, flow.run_id, "loss") == list(range(tracker_module.BATCH + 5))


def test_system_metrics_are_sampled(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "SYSTEM_METRICS_EVERY_S", 0.2)
    uri = mlflow_uri(workspace)
    with open_run(workspace, name="watched") as flow, tracker_module.system_metrics(uri, flow.run_id):
        time.sleep(0.7)
    names = run_facts(workspace, flow.run_id)["metrics"]
    assert "system/cpu_utilization_percentage" in names and "system/system_memory_usage_megabytes" in names


def test_a_folder_too_large_to_copy_leaves_a_note(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "COPY_LIMIT_BYTES", 1)
    with open_run(workspace, name="large") as flow:
        tracked(ArtifactStore(workspace), STAGE, parent_run_id=flow.run_id)
    files = _files(workspace, _made(workspace)["run_id"])
    assert "model.where.json" in files and "model/config.json" not in files


def test_unknown_runs_are_said_so(workspace: Workspace) -> None:
    with pytest.raises(LineageError, match="couturier runs"):
        run_facts(workspace, "f" * 32)


def test_the_database_is_made_once_by_workers_that_race(tmp_path: Path) -> None:
    workspace = Workspace(project=tmp_path, root=tmp_path / "w s")

    def work(number: int) -> str:
        with open_run(workspace, name=f"race-{number}") as flow:
            return flow.run_id

    with ThreadPoolExecutor(4) as pool:
        run_ids = set(pool.map(work, range(4)))
    assert len(run_ids) == 4 == len(mlflow_client(workspace).search_runs(["1"]))
    assert not list(workspace.mlflow_db.parent.glob("*.half*"))


def test_a_half_made_database_is_made_again(tmp_path: Path) -> None:
    workspace = Workspace(project=tmp_path, root=tmp_path)
    half = workspace.mlflow_db.with_name(".mlflow.db.half")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"cut short")
    ensure_database(workspace)
    assert workspace.mlflow_db.exists() and not half.exists()


def test_names_and_values_take_the_form_mlflow_takes() -> None:
    assert clean_name("grpo/ndcg@50 (x)") == "grpo/ndcg_at_50 _x_"
    assert tag_text("a" * 10, 5) == "aaaa…" and tag_text({"b": (1, None)}, 50) == '{"b": [1, null]}'
    nested = {"a": Config(), "b": [3.0, 1.0, 2.0], "c": [0.5, 0.4, 0.6]}
    found = dict(flatten(nested, joint=".", intervals=True))
    assert found == {
        "a.steps": 60, "a.fail": False, "a.inner": (1, 2), "b": [3.0, 1.0, 2.0],
        "c.mean": 0.5, "c.low": 0.4, "c.high": 0.6,
    }  # fmt: skip
