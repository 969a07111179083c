"""When flows run by themselves: on a schedule, on demand, and when ``data.dvc`` names other data than before.

    watcher ── data.dvc has another md5 ──▶ event couturier.data.changed ──▶ Prefect's trigger ──▶ retrain
    schedule (cron) ────────────────────────────────────────────────────────────────────────────▶ retrain
    a person, on Prefect's page or by `prefect deployment run` ─────────────▶ retrain · promote · rollback

``couturier up`` runs this module as a child, against its Prefect server. One run at a time; others wait their turn.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from typing import Any

from prefect import serve
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.events import DeploymentEventTrigger, emit_event

from couturier.components.data.versioning import DVC_FILE
from couturier.components.lineage.workspace import Workspace
from couturier.flows import records
from couturier.flows.promote import promote
from couturier.flows.retrain import retrain
from couturier.flows.rollback import rollback

DATA_CHANGED = "couturier.data.changed"
DATA = "couturier.data"
DEPLOYMENT = "local"
LOOK_EVERY_S = 2.0
_MD5 = re.compile(r"^\s*(?:-\s*)?md5:\s*([0-9a-f]{32}(?:\.dir)?)\s*$", re.MULTILINE)


def deployments(*, recipe: str, settings: list[str], schedule: str, who: str) -> list[RunnerDeployment]:
    """``retrain/local`` with its schedule and its trigger, and ``promote`` and ``rollback`` on demand."""
    changed = DeploymentEventTrigger(
        name="data.dvc changed",
        description="Retrain when data.dvc names other data than before.",
        expect={DATA_CHANGED},
        match={"prefect.resource.id": DATA},
        enabled=True,
    )
    module = EntrypointType.MODULE_PATH
    made = [
        retrain.to_deployment(
            DEPLOYMENT,
            cron=schedule or None,
            triggers=[changed],
            parameters={"recipe": recipe, "settings": settings, "who": who},
            description="The whole chain; what nothing has changed for is reused.",
            entrypoint_type=module,
        ),
        promote.to_deployment(DEPLOYMENT, parameters={"who": who}, entrypoint_type=module),
        rollback.to_deployment(DEPLOYMENT, parameters={"who": who}, entrypoint_type=module),
    ]
    return [deployment for deployment in made if isinstance(deployment, RunnerDeployment)]


def recorded_md5(workspace: Workspace) -> str | None:
    """The md5 in ``data.dvc``; None where there is none, or while it is being written."""
    path = workspace.project / DVC_FILE
    try:
        found = _MD5.search(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found.group(1) if found else None


class Watcher:
    """Tells Prefect when ``data.dvc`` names other data, unless a run has that data already."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.seen = recorded_md5(workspace)

    def look(self) -> str | None:
        """The md5 that an event was sent for, or None."""
        md5 = recorded_md5(self.workspace)
        if md5 is None or md5 == self.seen:
            return None
        self.seen = md5
        if md5 in _trained(self.workspace):
            return None
        emit_event(event=DATA_CHANGED, resource={"prefect.resource.id": DATA}, payload={"md5": md5})
        return md5

    def watch(self, end: threading.Event) -> None:
        while not end.wait(LOOK_EVERY_S):
            self.look()


def _trained(workspace: Workspace) -> set[str]:
    """Data that a run is learning from or has learned from."""
    alive = (records.RUNNING, records.FINISHED)
    return {str(run["data_md5"]) for run in records.all_runs(workspace) if run["status"] in alive and "data_md5" in run}


def main(settings: dict[str, Any]) -> None:
    """Serve the deployments and watch ``data.dvc`` until we are told to end."""
    end = threading.Event()
    watcher = Watcher(Workspace.find())
    threading.Thread(target=watcher.watch, args=(end,), name="data.dvc", daemon=True).start()
    try:
        serve(*deployments(**settings), limit=1, print_starting_message=False)
    finally:
        end.set()


if __name__ == "__main__":
    # As a module of its right name, so that Prefect finds the flows where the workers will look for them.
    from couturier.flows import triggers

    triggers.main(json.loads(sys.argv[1]))
