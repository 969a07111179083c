"""``kill -9`` in every stage in turn, through the command line: what was done is kept, and the end is the same."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from tests.conftest import Project, SmokeRun

TRAINED = ("tokenise", "judge", "sft", "rl")
ORDER = ("validate", "sequences", *TRAINED, "evaluate", "package")


def begun(project: Project, stage: str) -> Callable[[], bool]:
    """Whether a stage is at work; a training stage, whether it has left a checkpoint too."""
    artifacts, scratch = project.workspace / "artifacts", project.workspace / "scratch"
    if stage in ("tokenise", "sft", "rl"):
        return lambda: any(scratch.glob(f"{stage}-*/**/step-*")) and any(artifacts.glob(f".{stage}-*.half"))
    return lambda: any(artifacts.glob(f".{stage}-*.half"))


def killed_when(
    project: Project, words: tuple[str, ...], condition: Callable[[], bool], patience_s: float = 240
) -> None:
    """Start a retraining and kill it as soon as the condition holds."""
    process = project.start(*words)
    try:
        until = time.monotonic() + patience_s
        while not condition():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, f"nothing to kill within {patience_s} s"
            time.sleep(0.005)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -9


def digests(project: Project, record: dict[str, Any], stage: str) -> dict[str, str]:
    """Every weight, code and window that a stage left, by file."""
    folder = project.workspace / "artifacts" / record["stages"][stage]["id"]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".parquet", ".png")
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_in_every_stage_the_chain_ends_with_the_same_bits(smoke_run: SmokeRun, tmp_path: Path) -> None:
    project, words = type(smoke_run.project)(folder=tmp_path), smoke_run.words
    data = project.folder / "data"
    killed_when(project, words, lambda: data.exists() and any(data.iterdir()))
    for stage in ORDER:
        killed_when(project, words, begun(project, stage))
    record = project.run(*words, timeout_s=600).json
    reused = {name for name, stage in record["stages"].items() if stage["reused"]}
    assert set(ORDER[:-1]) <= reused
    for stage in ORDER:
        assert record["stages"][stage]["id"] == smoke_run.record["stages"][stage]["id"]
        assert digests(project, record, stage) == digests(smoke_run.project, smoke_run.record, stage), stage
    assert record["bento"] == smoke_run.record["bento"]
    runs = project.run("runs", "--json").json["runs"]
    assert [run["status"] for run in runs] == ["finished", *["killed"] * (len(runs) - 1)]
    assert not left_over(project)


def left_over(project: Project) -> list[str]:
    """Processes that still work in that project."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(project.folder) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found
