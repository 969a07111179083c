"""What all tests share: a quiet environment, one torch thread, and one real run of the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from couturier.components.telemetry import quiet_environment

quiet_environment()
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("COUTURIER_PROJECT", "COUTURIER_WORKSPACE", "COUTURIER_MLFLOW_URI", "PREFECT_API_URL"):
    os.environ.pop(name, None)


# Rooms with the longest files. A file is one worker's, so that what its tests share is made once (--dist loadfile).
LONG = ("flows", "kernels", "alignment")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with one of them at the end."""

    def rank(item: pytest.Item) -> int:
        room = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONG.index(room) if room in LONG else len(LONG)

    items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models are fastest, and repeat bit for bit, on one thread."""
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of stdout, which must be one JSON object."""
        value = json.loads(self.out.rstrip("\n").rpartition("\n")[2])
        assert isinstance(value, dict)
        return value


@dataclass(frozen=True, kw_only=True)
class Project:
    """A folder with a project in it, and the real command line."""

    folder: Path

    @property
    def workspace(self) -> Path:
        return self.folder / ".couturier"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "COUTURIER_PROJECT": str(self.folder), "COLUMNS": "200", "NO_COLOR": "1"}

    def command(self, *words: str) -> list[str]:
        return [str(Path(sys.executable).with_name("couturier")), *words]

    def run(self, *words: str, code: int = 0, timeout_s: float = 300, **environment: str) -> Answer:
        """Run ``couturier WORDS`` here; it must end with ``code``."""
        done = subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        answer = Answer(code=done.returncode, out=done.stdout, err=done.stderr)
        assert answer.code == code, f"couturier {' '.join(words)} ended with {answer.code}\n{answer.out}\n{answer.err}"
        return answer

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start ``couturier WORDS`` here and go on."""
        return subprocess.Popen(
            self.command(*words),
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_hear_ctrl_c,
        )


def _hear_ctrl_c() -> None:
    """As from a terminal, also where the tests themselves run in the background and inherit a deaf ear."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty project."""
    return Project(folder=tmp_path)


# The smoke recipe on a tenth of the data.
SMOKE = ("retrain", "--recipe", "smoke", "--set", "ingest.max_users=240", "--json")


@dataclass(frozen=True, kw_only=True)
class SmokeRun:
    """A project in which ``couturier retrain --recipe smoke`` has run once, and what it said."""

    project: Project
    answer: Answer
    words: tuple[str, ...] = SMOKE

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = self.answer.json
        return record


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """One real run of the whole chain through the command line, shared by every end-to-end test."""
    project = Project(folder=tmp_path_factory.mktemp("smoke"))
    return SmokeRun(project=project, answer=project.run(*SMOKE, timeout_s=600))
