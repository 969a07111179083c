"""Runs one command and ends it with all its descendants when standard input closes, or on SIGTERM.

    parent ──pipe──▶ warden ──▶ bentoml ──▶ worker

A parent that dies without a word (``kill -9``) closes the pipe, so no server outlives the one who started it. Workers
make sessions of their own, so ending a process group is not enough. Run as a script: it imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main(command: list[str]) -> int:
    """Run ``command`` until it ends or we are told to end it; its exit code, when nothing of it is left."""
    _adopt_orphans()
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def watch() -> None:
        while os.read(0, 4096):
            continue
        told.set()

    threading.Thread(target=watch, daemon=True).start()
    while child.poll() is None and not told.wait(0.2):
        continue
    _end_descendants()
    return child.wait()


def _adopt_orphans() -> None:
    """On Linux, descendants whose parent dies become ours, so that none is lost from sight."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_descendants(patience_s: float = 8.0) -> None:
    """Ask every descendant once to end; kill what is left after a while. New ones are asked as they appear."""
    import psutil

    asked: set[int] = set()
    patience = time.monotonic() + patience_s
    while True:
        living = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                living.append(process.pid)
                if time.monotonic() > patience:
                    process.kill()
                elif process.pid not in asked:
                    asked.add(process.pid)
                    process.terminate()
            except psutil.NoSuchProcess:
                continue
        if not living:
            return
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
