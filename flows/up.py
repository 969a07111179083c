"""``couturier up``: everything on loopback, started together and stopped together.

    up ─┬─ Prefect's server and page ◀── deployments: retrain (schedule, demand, data.dvc), promote, rollback
        ├─ MLflow's page
        └─ the champion's service ◀── the journal: another champion, another bento on the same port

Each is a child under a warden: when ``up`` ends, even by ``kill -9``, they end.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType

from couturier.components.errors import CouturierError
from couturier.components.files import write_json
from couturier.components.lineage.mlflow_store import ensure_database, mlflow_uri
from couturier.components.lineage.provenance import whoami
from couturier.components.lineage.registry import Registry
from couturier.components.lineage.workspace import Workspace
from couturier.components.ports import LOOPBACK
from couturier.flows import locks, service
from couturier.flows.orchestrator import UP_RECORD, LocalServer, prefect_environment, responds
from couturier.flows.processes import Child

STARTUP_S = 150.0
LOOK_EVERY_S = 1.0
USUAL = {"prefect": 4200, "mlflow": 5000, "service": service.PORT}


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Ports on loopback; 0 takes the usual one or, if that is busy, any free one."""

    prefect: int = 0
    mlflow: int = 0
    service: int = 0

    def chosen(self) -> dict[str, int]:
        """
        Raises:
            CouturierError: one that was asked for is in use.
        """
        asked = {
            "prefect": (self.prefect, "--prefect-port", "Prefect's page"),
            "mlflow": (self.mlflow, "--mlflow-port", "MLflow's page"),
            "service": (self.service, "--port", "the service"),
        }
        return {
            name: service.chosen_port(port, USUAL[name], option=option, purpose=purpose)
            for name, (port, option, purpose) in asked.items()
        }


def run_everything(
    ports: Ports, *, schedule: str, recipe: str, settings: list[str], ready: Callable[[dict[str, str]], None]
) -> None:
    """Start everything, call ``ready`` with the addresses, and stay until Ctrl-C, SIGTERM or the death of a child.

    Raises:
        CouturierError: a port is busy, another ``up`` runs here, or a child ended by itself.
    """
    workspace = Workspace.find()
    chosen = ports.chosen()
    with ExitStack() as stack:
        stack.enter_context(locks.only_one(workspace, "up"))
        told = stack.enter_context(_told_to_stop())
        server = LocalServer(workspace, port=chosen["prefect"], web=True)
        mlflow = _mlflow(workspace, chosen["mlflow"])
        for child in (server, mlflow):
            stack.callback(child.stop)
            child.start()
        server.wait()
        work = {"recipe": recipe, "settings": settings, "schedule": schedule, "who": whoami()}
        deployments = _deployments(workspace, server, work)
        stack.callback(deployments.stop)
        deployments.start()
        _until(mlflow, f"http://{LOOPBACK}:{chosen['mlflow']}/health")
        champion = ChampionService(workspace, chosen["service"])
        stack.callback(champion.stop)
        champion.follow()
        _until_deployed(deployments, server)
        where = {
            "prefect": server.address,
            "prefect_api": server.api_url,
            "mlflow": f"http://{LOOPBACK}:{chosen['mlflow']}",
            "service": champion.says(),
            "service_port": str(chosen["service"]),
            "pid": str(os.getpid()),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        for child in (server, mlflow, deployments):
            stack.callback(child.ask_to_stop)
        record = workspace.root / UP_RECORD
        stack.callback(record.unlink, missing_ok=True)
        write_json(record, where)
        ready(where)
        while not told.wait(LOOK_EVERY_S):
            for child in (server, mlflow, deployments):
                child.check()
            champion.follow()


class ChampionService:
    """The service of whoever is the champion, on one port for good."""

    def __init__(self, workspace: Workspace, port: int) -> None:
        self.registry, self.workspace, self.port = Registry(workspace), workspace, port
        self.number: int | None = None
        self._running = ExitStack()

    def follow(self) -> None:
        """Serve the champion of now, if it is not the one being served.

        Raises:
            CouturierError: its bento does not start.
        """
        number = self.registry.journal.aliases().get("champion")
        if number == self.number:
            return
        self.stop()
        if number is not None:
            version = self.registry.version(number)
            self._running.enter_context(service.model_service(self.workspace, version, self.port))
        self.number = number

    def says(self) -> str:
        if self.number is None:
            return "no champion yet: `couturier retrain` makes one, and it is served as soon as it is there"
        return f"http://{LOOPBACK}:{self.port}"

    def stop(self) -> None:
        self._running.close()
        self.number = None


def _mlflow(workspace: Workspace, port: int) -> Child:
    """One worker and no job queue: its defaults take four times the memory and twice the time to start."""
    ensure_database(workspace)
    command = ["-m", "mlflow", "server", "--backend-store-uri", mlflow_uri(workspace), "--workers", "1"]
    command += ["--default-artifact-root", str(workspace.mlflow_artifacts), "--host", LOOPBACK, "--port", str(port)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return Child("MLflow's page", command, environment, workspace.root / "logs" / "mlflow.log")


def _deployments(workspace: Workspace, server: LocalServer, work: Mapping[str, object]) -> Child:
    environment = {
        **os.environ,
        **prefect_environment(workspace),
        "PREFECT_API_URL": server.api_url,
        "COUTURIER_PROJECT": str(workspace.project),
        "COUTURIER_WORKSPACE": str(workspace.root),
    }
    command = ["-m", "couturier.flows.triggers", json.dumps(work)]
    return Child("the deployments", command, environment, workspace.root / "logs" / "deployments.log")


def _until(child: Child, url: str) -> None:
    until = time.monotonic() + STARTUP_S
    while not responds(url):
        child.check()
        if time.monotonic() > until:
            raise CouturierError(f"{child.name} did not answer on {url} within {STARTUP_S:.0f} s; see {child.log}.")
        time.sleep(0.2)


def _until_deployed(child: Child, server: LocalServer) -> None:
    """Wait until Prefect knows the last of the deployments."""
    _until(child, f"{server.api_url}/deployments/name/rollback/local")


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, so that everything is stopped in order, once."""
    told = threading.Event()

    def tell(number: int, frame: FrameType | None) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
