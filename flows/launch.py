"""Flows on the spot: ``couturier retrain``, ``promote`` and ``rollback`` with a Prefect server that lives as long."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from couturier.components.lineage.workspace import Workspace
from couturier.flows import locks, records
from couturier.flows.orchestrator import LocalServer, orchestrated


def retrain(recipe: str, settings: list[str], who: str | None, *, began: float) -> dict[str, Any]:
    """Run the retrain flow here and return its record.

    Args:
        recipe, settings, who: as for the flow.
        began: ``time.time()`` when the process began; ``wall_s`` counts from there, imports and servers included.

    Raises:
        CouturierError: another retraining holds the workspace, or what any stage raises.
    """
    workspace = Workspace.find()
    with locks.only_one(workspace), orchestrated(workspace) as own:
        # The server takes seconds to start, and so do these.
        from couturier.components.lineage.mlflow_store import ensure_database
        from couturier.flows import recipes
        from couturier.flows.retrain import retrain as flow

        recipes.named(recipe, settings)  # a wrong name is told before anything begins
        ensure_database(workspace)  # MLflow takes seconds too
        record = _run(own, lambda: flow(recipe, settings, who))
    record["wall_s"] = round(time.time() - began, 2)
    record["overhead_share"] = round(1 - record["learning_s"] / max(record["wall_s"], record["learning_s"]), 4)
    records.save(workspace, record)
    return record


def promote(version: str, *, who: str | None, why: str, force: bool, recipe: str) -> dict[str, Any]:
    """Run the promote flow here.

    Raises:
        LineageError: no such version, or the gate has not earned it the name.
    """
    workspace = Workspace.find()
    with orchestrated(workspace) as own:
        from couturier.flows import recipes
        from couturier.flows.promote import promote as flow

        gate = recipes.named(recipe).gate
        return _run(own, lambda: flow(version=version, who=who, why=why, force=force, gate=gate))


def rollback(*, who: str | None, why: str) -> dict[str, Any]:
    """Run the rollback flow here.

    Raises:
        LineageError: there was no champion before this one.
    """
    with orchestrated(Workspace.find()) as own:
        from couturier.flows.rollback import rollback as flow

        return _run(own, lambda: flow(who=who, why=why))


def _run(own: LocalServer | None, flow: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    if own is not None:
        own.wait()
    # The heartbeat thread sleeps in steps of a second, and the flow would wait for it.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        return flow()
