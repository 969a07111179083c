"""Children that never outlive us: each runs under a warden, which ends it when we do, even by ``kill -9``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from couturier.components.errors import CouturierError
from couturier.serving import warden


class Child:
    """One command with all its descendants. Ctrl-C at the terminal reaches us alone; we end it in our own order.

    Args:
        name: what people call it.
        command: after the Python interpreter, such as ``["-m", "mlflow", "server"]``.
        environment: all of it.
        log: the file that its words go to.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.command, self.environment, self.log = name, list(command), dict(environment), log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # -P: the folder we stand in may hold modules whose names hide others.
        python = [sys.executable, "-P"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*python, str(Path(warden.__file__)), *python, *self.command],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Raises:
        CouturierError: the child has ended by itself.
        """
        if not self.running():
            words = self.log.read_text(errors="replace").strip().splitlines()[-3:] if self.log.exists() else []
            raise CouturierError(f"{self.name} ended by itself. Its log, {self.log}, ends with: {' | '.join(words)}")

    def ask_to_stop(self) -> None:
        """Close the pipe that the warden watches, and go on: several children end at the same time."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def stop(self, patience_s: float = 15.0, *, at_once: bool = False) -> None:
        """Return when the child and all its descendants are gone; ``at_once`` leaves them no time to end in order."""
        if self._process is None:
            return
        if at_once:
            _kill_below(self._process.pid)
        self.ask_to_stop()
        try:
            self._process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def _kill_below(warden_pid: int) -> None:
    import psutil

    try:
        descendants = psutil.Process(warden_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in descendants:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
