"""Talk to the service, and run a packaged bento: what the package stage, the command line and the tests use."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from couturier.components.errors import CouturierError, LineageError
from couturier.components.ports import free_port, wanted_port

# Nothing calls out, one thread computes, and no bento is looked for elsewhere.
QUIET = {"BENTOML_DO_NOT_TRACK": "True", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
_FAILED = "Initializing service error"  # what BentoML logs when the service's constructor raises


class ServiceError(CouturierError):
    """The service refused, or did not start. ``status`` is 0 when there was no answer."""

    def __init__(self, sentence: str, *, status: int = 0) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Client:
    """A service on one host and port. Every call opens its own connection, so threads may share a client.

    Raises (every method):
        ServiceError: the service answered with an error (its sentence and status), or not at all.
    """

    host: str
    port: int
    timeout_s: float = 60.0

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def generate(self, **form: Any) -> dict[str, Any]:
        """The answer of ``generate``, with every ``png`` decoded to bytes."""
        answer = self.post("generate", form)
        for picture in answer["pictures"]:
            picture["png"] = base64.b64decode(picture["png"])
        return answer

    def generate_png(self, **form: Any) -> bytes:
        return self.request("POST", "/generate.png", json.dumps(form).encode())[1]

    def score(self, **form: Any) -> dict[str, Any]:
        return self.post("score", form)

    def feedback(self, **form: Any) -> dict[str, Any]:
        return self.post("feedback", form)

    def version(self) -> dict[str, Any]:
        return self.post("version", {})

    def ready(self) -> bool:
        """Whether the model is loaded and questions are answered."""
        try:
            return self.request("GET", "/readyz")[0] == 200
        except ServiceError:
            return False

    def post(self, name: str, form: Mapping[str, Any]) -> dict[str, Any]:
        return json.loads(self.request("POST", f"/{name}", json.dumps(form).encode())[1])

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """``(status, body)`` of a good answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            status, content = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServiceError(f"no answer from {self.url}{path}: {error}. Is the service running?") from error
        finally:
            connection.close()
        if status >= 400:
            raise ServiceError(_sentence(content) or f"{path} answered {status}.", status=status)
        return status, content


@dataclass(frozen=True)
class ServedBento:
    """A bento that is up: ask it through ``client``; ``wait`` blocks until it ends by itself."""

    tag: str
    client: Client
    process: subprocess.Popen[bytes]
    boot_s: float

    @property
    def url(self) -> str:
        return self.client.url

    def wait(self) -> int:
        # Looked at, not waited for: a library that re-arms SIGINT to restart system calls makes a wait deaf to Ctrl-C.
        while (code := self.process.poll()) is None:
            time.sleep(0.1)
        return code


@contextmanager
def serve_bento(
    tag: str,
    port: int = 0,
    *,
    bentoml_home: Path,
    feedback: Path | None,
    log: Path,
    host: str = "127.0.0.1",
    registered: Mapping[str, Any] | None = None,
    timeout_s: float = 120.0,
) -> Iterator[ServedBento]:
    """Run a packaged bento while the block runs; ready when the block begins, ended with it, whatever happens.

    Args:
        tag: ``couturier:<version>``, as ``bento.json`` says.
        port: 0 takes a free one.
        bentoml_home: ``workspace.bentos``.
        feedback: the folder that events go to (``workspace.feedback``); None refuses feedback.
        log: the file that the server's own words go to.
        registered: what the registry knows of it (``model``, ``version``, ``run_id``, ``alias``), shown by ``version``.

    Raises:
        CouturierError: something listens on that port already.
        LineageError: there is no such bento.
        ServiceError: it did not become ready; the sentence ends with the last lines of the log.
    """
    bento = bento_folder(bentoml_home, tag)
    port = wanted_port(port, option="--port", purpose="the service") if port else free_port()
    settings = {**os.environ, **QUIET, "BENTOML_HOME": str(bentoml_home)}
    settings.pop("COUTURIER_BUNDLE", None)  # a bento serves what it carries
    if feedback is not None:
        settings["COUTURIER_FEEDBACK"] = str(feedback)
    if registered is not None:
        settings["COUTURIER_REGISTERED"] = json.dumps(dict(registered))
    bentoml = [sys.executable, "-m", "bentoml", "serve", str(bento), "--host", host, "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with log.open("wb") as words:
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("warden.py")), *bentoml],
            stdin=subprocess.PIPE,
            stdout=words,
            stderr=subprocess.STDOUT,
            env=settings,
            start_new_session=True,
        )
    try:
        client = Client(host, port)
        _until_ready(client, process, log, timeout_s)
        yield ServedBento(tag=tag, client=client, process=process, boot_s=time.perf_counter() - began)
    finally:
        if process.stdin is not None:
            process.stdin.close()  # the warden ends the server and all its workers
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def bento_folder(bentoml_home: Path, tag: str) -> Path:
    """Where a bento of that tag lies.

    Raises:
        LineageError: the tag has a wrong form, or there is no such bento.
    """
    if not re.fullmatch(r"[a-z0-9_]+:[a-z0-9_]+", tag):
        raise LineageError(f"{tag!r} is no bento tag; wanted couturier:<version>, as `couturier models` lists them.")
    name, _, version = tag.partition(":")
    folder = bentoml_home / "bentos" / name / version
    if not (folder / "bento.yaml").exists():
        raise LineageError(f"bento {tag} is not in the workspace; `couturier models` lists those that are.")
    return folder


def _until_ready(client: Client, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    patience = time.monotonic() + timeout_s
    # The port is bound before a worker answers on it: a question that waits long would hide that the worker failed.
    probe = Client(client.host, client.port, timeout_s=1.0)
    while not probe.ready():
        words = log.read_text(errors="replace")
        why = None
        if process.poll() is not None:
            why = f"ended with exit code {process.returncode}"
        elif _FAILED in words:  # BentoML starts a worker that failed again and again
            why = "could not load its model"
        elif time.monotonic() > patience:
            why = f"was not ready within {timeout_s:g} s"
        if why is not None:
            raise ServiceError(f"the bento {why}. Its log, {log}, ends with: {' | '.join(words.splitlines()[-5:])}")
        time.sleep(0.1)


def _sentence(content: bytes) -> str:
    try:
        value = json.loads(content)
    except ValueError:
        return content.decode("utf-8", "replace")[:200]
    return str(value.get("error", "")) if isinstance(value, dict) else ""
