"""The Prefect server that a run talks to: somebody's own, the one of ``couturier up``, or one that lives with the run.

    retrain ──▶ server() ──▶ PREFECT_API_URL set?        ──▶ use it
                         ──▶ `couturier up` answers?     ──▶ use it
                         ──▶ start a child on a free port; it stops with us, also when we are killed

The child is Prefect's own server without its web pages. It starts in the background, while we import the rest.
Its log lies in ``<workspace>/prefect/server.log``, and its records in the database that ``couturier up`` shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from couturier.components.errors import CouturierError
from couturier.components.files import read_json
from couturier.components.lineage.workspace import Workspace
from couturier.components.ports import free_port

UP_RECORD = "up.json"
_STARTUP_S = 120.0
_PARENT_CHECK_S = 1.0


def prefect_environment(workspace: Workspace) -> dict[str, str]:
    """Settings of Prefect that keep its state in the workspace and its log lines off the terminal."""
    return {
        "PREFECT_HOME": str(workspace.prefect_home),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(round(_STARTUP_S)),
        "PREFECT_LOGGING_LEVEL": "WARNING",
        # Errors of a run are told once, by our own console; Prefect keeps the traceback with the run.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_CLI_PROMPT": "false",
    }


class LocalServer:
    """A Prefect server that is our child. ``start`` returns at once, ``wait`` when it answers."""

    def __init__(self, workspace: Workspace, *, port: int | None = None, web: bool = False) -> None:
        self.workspace = workspace
        self.port = port or free_port()
        self.web = web
        self.log = workspace.prefect_home / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api_url(self) -> str:
        return f"{self.address}/api"

    def start(self) -> LocalServer:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **prefect_environment(self.workspace), "PREFECT__SERVER_FINAL": "1"}
        environment.pop("PREFECT_API_URL", None)
        if self.web:
            environment["PREFECT_UI_API_URL"] = self.api_url
        else:
            environment |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}
        command = [sys.executable, "-m", __name__, str(self.port), str(os.getpid())]
        with self.log.open("ab") as log:
            # A group of its own: Ctrl-C reaches us alone, and we stop the server when the last record is written.
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def wait(self) -> None:
        """Return when the server answers.

        Raises:
            CouturierError: it ended, or did not answer within two minutes.
        """
        until = time.monotonic() + _STARTUP_S
        while time.monotonic() < until:
            if self._process is None or self._process.poll() is not None:
                raise CouturierError(f"Prefect's server ended while it started; its last words are in {self.log}.")
            if answers(self.api_url):
                return
            time.sleep(0.1)
        raise CouturierError(
            f"Prefect's server did not answer on {self.api_url} within {_STARTUP_S:.0f} s; see {self.log}."
        )

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=8)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


@contextmanager
def server(workspace: Workspace) -> Iterator[LocalServer | None]:
    """Point this process at a Prefect server for the time of the block; None where one was there already.

    The server may still be starting inside the block: call ``wait`` before the first flow.
    """
    os.environ.update(prefect_environment(workspace))
    found = os.environ.get("PREFECT_API_URL") or _of_up(workspace)
    if found:
        os.environ["PREFECT_API_URL"] = found
        yield None
        return
    own = LocalServer(workspace).start()
    os.environ["PREFECT_API_URL"] = own.api_url
    try:
        yield own
    finally:
        own.stop()
        os.environ.pop("PREFECT_API_URL", None)


def answers(api_url: str, *, timeout_s: float = 2.0) -> bool:
    """Whether a Prefect server is healthy there."""
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=timeout_s) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _of_up(workspace: Workspace) -> str | None:
    """The server of a running ``couturier up`` on this workspace."""
    record = workspace.root / UP_RECORD
    if not record.exists():
        return None
    url = str(read_json(record)["prefect_api"])
    return url if answers(url) else None


def _serve(port: int, parent: int) -> None:
    """The child: Prefect's server on loopback until the parent is gone."""
    import uvicorn

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_S)
        running.should_exit = True
        time.sleep(10)
        os._exit(1)

    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error"
    )
    running = uvicorn.Server(config)
    threading.Thread(target=watch, daemon=True).start()
    running.run()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))


