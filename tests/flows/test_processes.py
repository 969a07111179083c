from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from couturier.components.errors import CouturierError
from couturier.flows.processes import Child

SLEEP = "import time; time.sleep(99)"
FAMILY = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); {SLEEP}"
OWNER = f"""
import os, time
from pathlib import Path
from couturier.flows.processes import Child
child = Child("sleeper", ["-c", {FAMILY!r}], dict(os.environ), Path(os.devnull))
child.start()
print("started", flush=True)
time.sleep(99)
"""


def until(condition: Callable[[], bool], patience_s: float = 20.0) -> bool:
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def alive(process: psutil.Process) -> bool:
    """An orphan that has ended may wait for somebody to reap it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_stop_ends_a_child_with_all_its_descendants(tmp_path: Path) -> None:
    child = Child("sleeper", ["-c", FAMILY], os.environ, tmp_path / "log")
    before = set(family(os.getpid()))
    child.start()
    assert until(lambda: len(set(family(os.getpid())) - before) == 3)  # warden, child, grandchild
    started = set(family(os.getpid())) - before
    child.check()
    child.stop()
    assert until(lambda: not any(alive(process) for process in started)), [
        (p.status(), p.cmdline()) for p in started if alive(p)
    ]


def test_no_child_outlives_an_owner_that_was_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "started\n"
    assert until(lambda: len(family(owner.pid)) == 3)
    started = family(owner.pid)
    owner.kill()
    owner.wait()
    assert until(lambda: not any(alive(process) for process in started)), [
        (p.status(), p.cmdline()) for p in started if alive(p)
    ]


def test_a_child_that_ends_by_itself_is_told_with_its_last_words(tmp_path: Path) -> None:
    child = Child("the talker", ["-c", "print('my last words'); raise SystemExit(3)"], os.environ, tmp_path / "log")
    child.start()
    assert until(lambda: not child.running())
    with pytest.raises(CouturierError, match="the talker ended by itself.*my last words"):
        child.check()
    child.stop()
