"""One virtual environment for each peer, since their pins contradict each other.

    requirements/<peer>.txt ─▶ <cache>/venvs/<peer>-<hash of the file> ─▶ python -m peers.<peer>_peer

The cache lies outside the tree: ``COUTURIER_PEERS``, or ``couturier/peers`` in the user's cache folder. It also keeps
the wheels, the splits and every run, so that a later comparison fits nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from couturier.components.errors import DataError

HERE = Path(__file__).resolve().parent
PEERS = ("rectools", "implicit", "fuxictr")
_INSTALL_S = 1800


class PeerUnavailable(DataError):
    """A peer's environment is not there and could not be, or was not to be, made."""


def cache_folder() -> Path:
    """Where everything of the peers is kept between runs."""
    chosen = os.environ.get("COUTURIER_PEERS")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen) if chosen else base / "couturier" / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def requirements(peer: str) -> Path:
    return HERE / "requirements" / f"{peer}.txt"


def environment(peer: str, cache: Path, *, install: bool) -> Path:
    """The Python of a peer's environment; made first where ``install`` says so.

    Raises:
        PeerUnavailable: it is not there and may not be made, or the installation failed.
    """
    digest = hashlib.sha256(requirements(peer).read_bytes()).hexdigest()[:8]
    folder = cache / "venvs" / f"{peer}-{digest}"
    python = folder / "bin" / "python"
    if (folder / "whole").is_file():
        return python
    if not install:
        raise PeerUnavailable(f"{peer}: no environment yet; run once without --no-install to make it.")
    shutil.rmtree(folder, ignore_errors=True)
    _checked([sys.executable, "-m", "venv", str(folder)], peer)
    _checked([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements(peer))], peer)
    (folder / "whole").touch()
    return python


def _checked(command: list[str], peer: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise PeerUnavailable(f"{peer}: installing took more than {_INSTALL_S} s.") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no message"]
        raise PeerUnavailable(f"{peer}: not installed: {lines[-1].strip()[:200]}")


def run_adapter(
    python: Path, peer: str, arguments: Mapping[str, str], out: Path, *, threads: int, limit_s: float
) -> dict[str, Any]:
    """Run one adapter process to its end, or find that it has run; its ``result.json``.

    Raises:
        PeerUnavailable: it failed or took longer than ``limit_s``; the last line of its errors is in the message.
    """
    if not (out / "result.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
        command = [str(python), "-m", f"peers.{peer}_peer", *words, "--out", str(out)]
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        try:
            done = subprocess.run(
                command, cwd=HERE.parent, env=env, capture_output=True, text=True, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise PeerUnavailable(f"{peer} {arguments['model']}: not done in {limit_s:.0f} s.") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise PeerUnavailable(f"{peer} {arguments['model']} failed: {last[:300]}")
    facts: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return facts
