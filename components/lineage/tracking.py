"""Runs in MLflow: one for a flow, one nested in it for every stage that works.

::

    open_run ── parent run ─┬─ tracked(stage) ── made:   a nested run: params, curves, pictures, system metrics, models
                            ├─ tracked(stage) ── reused: a tag that points at the run that made it
                            └─ step_run ──────── a nested run for work that is no stage

A run of a killed process is marked KILLED when the next flow opens its run; a killed stage goes on in its own run.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from couturier.components.errors import LineageError
from couturier.components.lineage.mlflow_store import ensure_database, experiment_id, mlflow_client, mlflow_uri
from couturier.components.lineage.provenance import code_commit, whoami
from couturier.components.lineage.stages import Artifact, ArtifactStore, Progress, Stage, StageContext
from couturier.components.lineage.tracker import Pending, RunTracker, system_metrics
from couturier.components.lineage.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["FlowRun", "ensure_database", "mlflow_uri", "open_run", "run_facts", "run_of", "step_run", "tracked"]

PARENT = "mlflow.parentRunId"
KIND, ARTIFACT, STAGE = "couturier.kind", "couturier.artifact", "couturier.stage"
_PROCESS, _HOST = "couturier.process", "couturier.host"
# The clock that start times are reckoned from may be set right while we run.
_SAME_PROCESS_S = 5.0


class FlowRun(RunTracker):
    """The parent run of a flow; also a Tracker, for what belongs to the whole flow."""


@contextmanager
def open_run(
    workspace: Workspace,
    *,
    name: str,
    recipe: str = "",
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    who: str | None = None,
) -> Iterator[FlowRun]:
    """The MLflow run of one flow: FINISHED at the end, FAILED on an error, KILLED on Ctrl-C."""
    client = mlflow_client(workspace)
    bury_the_dead(client, workspace)
    first = {
        KIND: "flow",
        "couturier.recipe": recipe,
        "couturier.who": who or whoami(),
        "mlflow.source.git.commit": code_commit(),
        **_process_tags(),
        **{key: str(value) for key, value in (tags or {}).items()},
    }
    run = client.create_run(experiment_id(client, workspace), tags=first, run_name=name)
    flow = FlowRun(client, run.info.run_id)
    with _ended(client, flow):
        flow.tags(_device_tags())
        flow.params(params or {})
        yield flow


@contextmanager
def step_run(workspace: Workspace, *, parent_run_id: str, name: str) -> Iterator[RunTracker]:
    """A nested run for work that is no stage, such as ingest."""
    client = mlflow_client(workspace)
    tags = {KIND: "step", PARENT: parent_run_id, STAGE: name, **_process_tags()}
    run = client.create_run(experiment_id(client, workspace), tags=tags, run_name=name)
    tracker = RunTracker(client, run.info.run_id)
    with _ended(client, tracker):
        yield tracker


def tracked(store: ArtifactStore, stage: Stage, *, parent_run_id: str, progress: Progress | None = None) -> Artifact:
    """The finished stage, and its trace in MLflow: made in a nested run, or reused with a tag on the parent.

    A stage that was killed or that failed goes on in the run it had. The work and its id do not depend on tracking.
    """
    workspace = store.workspace
    client = mlflow_client(workspace)
    if store.has(stage.id):
        artifact = store.open(stage.id)
        _note_reuse(client, workspace, stage.name, artifact, parent_run_id)
        return artifact
    pending = _pending(workspace, stage.id)
    tracker = _stage_tracker(client, workspace, stage, pending, parent_run_id)

    @functools.wraps(stage.run)  # keeps __module__, which the manifest id is made from
    def run(context: StageContext) -> None:
        stage.run(context)
        # The store clears the scratch folder as soon as the stage is whole.
        tracker.checkpoints(context.scratch)

    watched = os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() != "false"
    with _ended(client, tracker):
        with system_metrics(mlflow_uri(workspace), tracker.run_id, enabled=watched):
            artifact = store.materialise(dataclasses.replace(stage, run=run), tracker=tracker, progress=progress)
        tracker.artifact(artifact)
    pending.end()
    return artifact


def run_of(workspace: Workspace, artifact_id: str) -> str | None:
    """The run that made an artifact, or None when MLflow does not know it."""
    run = _run_of(mlflow_client(workspace), workspace, artifact_id)
    return None if run is None else str(run.info.run_id)


def run_facts(workspace: Workspace, run_id: str) -> dict[str, Any]:
    """A run in plain words: name, status, params, last metrics, tags, and its nested runs.

    Raises:
        LineageError: MLflow knows no such run.
    """
    client = mlflow_client(workspace)
    run = require_run(client, run_id)
    nested = client.search_runs(
        [experiment_id(client, workspace)], f"tags.`{PARENT}` = '{run.info.run_id}'", order_by=["start_time ASC"]
    )
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "tags": dict(run.data.tags),
        "artifacts": run.info.artifact_uri,
        "children": [
            {
                "run_id": child.info.run_id,
                "name": child.info.run_name,
                "status": child.info.status,
                "artifact": child.data.tags.get(ARTIFACT),
            }
            for child in nested
        ],
    }


def require_run(client: MlflowClient, run_id: str) -> Run:
    """The run of that id.

    Raises:
        LineageError: MLflow knows no such run.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        raise LineageError(f"MLflow knows no run {run_id!r}. `couturier runs` lists those there are.") from error


def bury_the_dead(client: MlflowClient, workspace: Workspace) -> list[str]:
    """Mark runs KILLED that say RUNNING and whose process on this machine is gone; return their ids."""
    running = client.search_runs(
        [experiment_id(client, workspace)], f"attributes.status = 'RUNNING' AND tags.`{_HOST}` = '{platform.node()}'"
    )
    dead = [run.info.run_id for run in running if not _alive(run.data.tags.get(_PROCESS, ""))]
    for run_id in dead:
        client.set_terminated(run_id, status="KILLED")
    return dead


def _stage_tracker(
    client: MlflowClient, workspace: Workspace, stage: Stage, pending: Pending, parent_run_id: str
) -> RunTracker:
    """The tracker of a stage about to work: in the run it had before a kill, or in a new one."""
    earlier = _resumable(client, pending)
    if earlier is not None:
        parents = [earlier.data.tags.get("couturier.earlier_parents", ""), earlier.data.tags.get(PARENT, "")]
        client.update_run(earlier.info.run_id, status="RUNNING")
        tracker = RunTracker(client, earlier.info.run_id, pending=pending.folder)
        before = " ".join(parent for parent in parents if parent)
        tracker.tags({PARENT: parent_run_id, "couturier.earlier_parents": before, **_process_tags()})
        return tracker
    first = {
        KIND: "stage",
        STAGE: stage.name,
        ARTIFACT: stage.id,
        PARENT: parent_run_id,
        "mlflow.source.git.commit": code_commit(),
        **_process_tags(),
    }
    run = client.create_run(experiment_id(client, workspace), tags=first, run_name=stage.name)
    pending.begin(run.info.run_id)
    tracker = RunTracker(client, run.info.run_id, pending=pending.folder)
    tracker.tags({**_device_tags(), **{f"input.{name}": key for name, key in stage.inputs.items()}})
    tracker.params(dataclasses.asdict(stage.config))
    return tracker


def _note_reuse(client: MlflowClient, workspace: Workspace, name: str, artifact: Artifact, parent_run_id: str) -> None:
    made_by = _run_of(client, workspace, artifact.id)
    pending = _pending(workspace, artifact.id)
    working = made_by is not None and made_by.info.status == "RUNNING" and _alive(made_by.data.tags.get(_PROCESS, ""))
    if made_by is not None and not working and pending.run_id() == made_by.info.run_id:
        # Killed between the last byte of the stage and the last line of its run: complete the run now.
        client.update_run(made_by.info.run_id, status="RUNNING")
        tracker = RunTracker(client, made_by.info.run_id, pending=pending.folder)
        with _ended(client, tracker):
            tracker.artifact(artifact)
        pending.end()
    found = {} if made_by is None else {f"reused_run.{name}": made_by.info.run_id}
    RunTracker(client, parent_run_id).tags({f"reused.{name}": artifact.id, **found})


def _resumable(client: MlflowClient, pending: Pending) -> Run | None:
    from mlflow.exceptions import MlflowException

    run_id = pending.run_id()
    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException:  # the database was thrown away meanwhile
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _run_of(client: MlflowClient, workspace: Workspace, artifact_id: str) -> Run | None:
    found = client.search_runs(
        [experiment_id(client, workspace)],
        f"tags.`{ARTIFACT}` = '{artifact_id}'",
        order_by=["start_time DESC"],
        max_results=1,
    )
    return found[0] if found else None


@contextmanager
def _ended(client: MlflowClient, tracker: RunTracker) -> Iterator[None]:
    """End a run as the block ends."""
    try:
        yield
        tracker.flush()
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
        tracker.tags({"couturier.error": f"{type(error).__name__}: {error}"})
        client.set_terminated(tracker.run_id, status=status)
        raise
    client.set_terminated(tracker.run_id, status="FINISHED")


def _pending(workspace: Workspace, artifact_id: str) -> Pending:
    return Pending(Path(workspace.root) / "mlflow" / "pending" / artifact_id)


def _device_tags() -> dict[str, Any]:
    from couturier.components.runtime import device_facts  # imports torch

    return {f"device.{name}": value for name, value in device_facts().items()}


def _process_tags() -> dict[str, str]:
    """Which process speaks: its number and the moment it began, because numbers are used again."""
    import psutil

    return {_PROCESS: f"{os.getpid()} {psutil.Process().create_time():.2f}", _HOST: platform.node()}


def _alive(process: str) -> bool:
    import psutil

    number, _, began = process.partition(" ")
    try:
        return abs(psutil.Process(int(number)).create_time() - float(began)) < _SAME_PROCESS_S
    except (psutil.NoSuchProcess, ValueError):
        return False
