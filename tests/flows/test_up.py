"""``couturier up`` with everything real: pages, deployments, the champion's service, and the event that retrains."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from tests.conftest import Project, SmokeRun


def until(condition: Callable[[], bool], patience_s: float) -> bool:
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def ask(url: str, form: dict[str, Any] | None = None) -> Any:
    data = None if form is None else json.dumps(form).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture
def running(smoke_run: SmokeRun) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """``couturier up`` on the project of the smoke run, and the addresses it printed."""
    process = smoke_run.project.start("up", "--recipe", "smoke", "--schedule", "", "--json")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def promoted(project: Project, number: int) -> None:
    models = project.run("models", "--json").json["models"]
    if [one["number"] for one in models if "champion" in one["aliases"]] != [number]:
        project.run("promote", str(number), "--force", "--why", "a test of up")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_up_serves_follows_retrains_and_stops(
    smoke_run: SmokeRun, running: tuple[subprocess.Popen[str], dict[str, str]]
) -> None:
    project, (process, where) = smoke_run.project, running
    family = psutil.Process(process.pid).children(recursive=True)
    names = {one["name"] for one in ask(f"{where['prefect_api']}/deployments/filter", {})}
    assert names == {"local"}
    with urllib.request.urlopen(f"{where['mlflow']}/health", timeout=30) as answer:
        assert answer.status == 200
    assert "`couturier up` runs already" in project.run("up", code=1).err

    promoted(project, 1)  # through the same Prefect server
    port = json.loads((project.workspace / "up.json").read_text())["service_port"]
    said = f"http://127.0.0.1:{port}/version"
    assert until(lambda: answers(said), 90)
    assert smoke_run.record["stages"]["rl"]["id"] in json.dumps(ask(said))

    before = {run["run_id"] for run in project.run("runs", "--json").json["runs"]}
    project.run("ingest", "--max-users", "200")

    def retrained() -> bool:
        runs = [run for run in project.run("runs", "--json").json["runs"] if run["run_id"] not in before]
        return bool(runs) and runs[0]["status"] == "finished"

    assert until(retrained, 400)
    family += psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert not (project.workspace / "up.json").exists()
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def answers(url: str) -> bool:
    try:
        ask(url)
    except OSError:
        return False
    return True
