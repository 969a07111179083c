"""Runs one command and ends it with all its descendants when standard input closes, or on SIGTERM.

    parent ──pipe──▶ warden ──▶ bentoml ──▶ worker

A parent that dies without a word (``kill -9``) closes the pipe, so no server outlives the one who started it. The
workers make sessions of their own, so ending a process group is not enough. Run as a script; imports nothing of ours.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    """Run ``command`` until it ends or we are told to end it; its exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    told = threading.Event()

    def tell(*_: object) -> None:
        if not told.is_set():
            told.set()
            # Not a daemon: this process leaves only when the last worker has.
            threading.Thread(target=_end, args=(child.pid,)).start()

    signal.signal(signal.SIGTERM, tell)
    signal.signal(signal.SIGINT, tell)

    def watch() -> None:
        while os.read(0, 4096):
            continue
        tell()

    threading.Thread(target=watch, daemon=True).start()
    return child.wait()


def _end(pid: int, patience_s: float = 5.0) -> None:
    import psutil

    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for process in family:
            try:
                ask(process)
            except psutil.NoSuchProcess:
                continue
        _, family = psutil.wait_procs(family, timeout=patience_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
