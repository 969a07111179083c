"""The Prefect server that a run talks to: somebody's own, the one of ``couturier up``, or one that lives with the run.

    orchestrated ──▶ PREFECT_API_URL set?        ──▶ use it
                 ──▶ `couturier up` answers?     ──▶ use it
                 ──▶ start a child on a free port; it ends with us, also when we are killed

The child is Prefect's own server without its web pages. It starts in the background, while we import the rest.
Its log lies in ``<workspace>/prefect/server.log``, and its records in the database that ``couturier up`` shows.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from couturier.components.errors import CouturierError
from couturier.components.files import read_json
from couturier.components.lineage.workspace import Workspace
from couturier.components.ports import LOOPBACK, free_port
from couturier.flows.processes import Child

UP_RECORD = "up.json"
_STARTUP_S = 120.0


def prefect_environment(workspace: Workspace) -> dict[str, str]:
    """Settings of Prefect that keep its state in the workspace and its log lines off the terminal."""
    return {
        "PREFECT_HOME": str(workspace.prefect_home),
        "PREFECT_LOGGING_LEVEL": "WARNING",
        # Errors of a run are told once, by our own console; Prefect keeps the traceback with the run.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    }


class LocalServer(Child):
    """A Prefect server that is our child. ``start`` returns at once, ``wait`` when it answers."""

    def __init__(self, workspace: Workspace, *, port: int = 0, web: bool = False) -> None:
        self.address = f"http://{LOOPBACK}:{port or free_port()}"
        self.api_url = f"{self.address}/api"
        self.ready = False
        environment = {**os.environ, **prefect_environment(workspace), "PREFECT__SERVER_FINAL": "1"}
        environment.pop("PREFECT_API_URL", None)
        if web:
            environment["PREFECT_UI_API_URL"] = self.api_url
        else:
            environment |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}
        command = ["-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--log-level", "error"]
        command += ["--host", LOOPBACK, "--port", self.address.rpartition(":")[2]]
        super().__init__("Prefect's server", command, environment, workspace.prefect_home / "server.log")

    def wait(self) -> None:
        """Return when the server answers.

        Raises:
            CouturierError: it ended, or did not answer within two minutes.
        """
        until = time.monotonic() + _STARTUP_S
        while not answers(self.api_url):
            self.check()
            if time.monotonic() > until:
                raise CouturierError(
                    f"{self.name} did not answer on {self.api_url} within {_STARTUP_S:.0f} s; see {self.log}."
                )
            time.sleep(0.1)
        self.ready = True


@contextmanager
def orchestrated(workspace: Workspace) -> Iterator[LocalServer | None]:
    """Point this process at a Prefect server for the time of the block; None where one was there already.

    Our own may still be starting inside the block: call ``wait`` on it before the first flow. At the end it is handed
    the log lines and events that Prefect still holds, and stopped.
    """
    os.environ.update(prefect_environment(workspace))
    before = os.environ.get("PREFECT_API_URL")
    found = before or _of_up(workspace)
    own = None if found else LocalServer(workspace)
    os.environ["PREFECT_API_URL"] = found or (own.api_url if own else "")
    try:
        if own:
            own.start()
        yield own
    finally:
        if own and own.ready and own.running():
            _send_last_records()
        if own:
            # One that is still starting would first finish its migrations, while somebody waits for an error.
            own.stop(at_once=not own.ready)
        if before is None:
            del os.environ["PREFECT_API_URL"]


def answers(api_url: str, *, timeout_s: float = 2.0) -> bool:
    """Whether a Prefect server is healthy there."""
    return responds(f"{api_url}/health", timeout_s=timeout_s)


def responds(url: str, *, timeout_s: float = 2.0) -> bool:
    """Whether something answers 200 there."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _of_up(workspace: Workspace) -> str | None:
    """The server of a running ``couturier up`` on this workspace."""
    record = workspace.root / UP_RECORD
    if not record.exists():
        return None
    url = str(read_json(record)["prefect_api"])
    return url if answers(url) else None


def _send_last_records() -> None:
    if "prefect.events.worker" not in sys.modules:
        return  # nothing ran
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=3)
    EventsWorker.drain_all(timeout=3)
