"""``couturier doctor``: what a run needs, looked at one by one, each with a way to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from couturier.components.lineage.workspace import Workspace
from couturier.components.ports import is_free
from couturier.components.telemetry import SWITCHES

DISK_GB, MEMORY_GB = 5.0, 6.0
PORTS = {"Prefect": 4200, "MLflow": 5000, "the service": 3000}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at. ``note`` is worth knowing and stops nothing."""

    name: str
    state: Literal["good", "note", "bad"]
    seen: str
    mend: str = ""


def examine() -> list[Check]:
    """All checks, in the order a newcomer would mend them."""
    workspace = Workspace.find()
    return [
        _python(),
        *_packages(),
        _lock(),
        _writable(workspace),
        _disk(workspace),
        _memory(),
        *(_port(name, port) for name, port in PORTS.items()),
        _threads(),
        _compiler(),
        _switches(),
    ]


def _python() -> Check:
    version = sys.version_info
    seen = f"{version.major}.{version.minor}.{version.micro}"
    if (3, 11) <= version[:2] < (3, 14):
        return Check(name="python", state="good", seen=seen)
    return Check(name="python", state="bad", seen=seen, mend="Use Python 3.11, 3.12 or 3.13.")


def _packages() -> list[Check]:
    """The packages of each extra, from our own metadata."""
    missing: dict[str, list[str]] = {}
    for extra in ("train", "serve", "demo"):
        missing[extra] = [name for name in _required(extra) if _installed(name) is None]
    checks = []
    for extra, names in missing.items():
        if names:
            mend = f"pip install -c constraints.lock -e '.[{extra}]'"
            checks.append(Check(name=f"extra {extra}", state="bad", seen=f"missing: {', '.join(names)}", mend=mend))
        else:
            checks.append(Check(name=f"extra {extra}", state="good", seen="all packages installed"))
    return checks


def _required(extra: str) -> list[str]:
    found = []
    for line in importlib.metadata.requires("couturier") or []:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name and name.group() != "couturier" and re.search(rf"extra == ['\"]{extra}['\"]", line):
            found.append(name.group())
    return found


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _lock() -> Check:
    """Versions that differ from the lock that was tested."""
    lock = Path(__file__).resolve().parent.parent / "constraints.lock"
    if not lock.exists():
        return Check(name="lock", state="note", seen="no constraints.lock beside the code; versions are not compared")
    pinned = dict(line.split("==", 1) for line in lock.read_text(encoding="utf-8").split() if "==" in line)
    other = [
        f"{name} {seen} (tested {wanted})"
        for name, wanted in pinned.items()
        if (seen := _installed(name)) is not None and seen != wanted
    ]
    if not other:
        return Check(
            name="lock", state="good", seen=f"every installed package is at its tested version, of {len(pinned)}"
        )
    return Check(
        name="lock",
        state="note",
        seen=f"{len(other)} packages at other versions: {', '.join(other[:5])}{' …' if len(other) > 5 else ''}",
        mend="pip install -c constraints.lock -e '.[demo]'",
    )


def _writable(workspace: Workspace) -> Check:
    try:
        workspace.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workspace.root):
            return Check(name="workspace", state="good", seen=f"{workspace.root} can be written")
    except OSError as error:
        mend = "Set COUTURIER_WORKSPACE to a folder that you may write."
        return Check(name="workspace", state="bad", seen=f"{workspace.root}: {error}", mend=mend)


def _disk(workspace: Workspace) -> Check:
    folder = next(path for path in (workspace.root, *workspace.root.parents) if path.exists())
    free_gb = shutil.disk_usage(folder).free / 1e9
    seen = f"{free_gb:.1f} GB free beside {workspace.root}"
    if free_gb >= DISK_GB:
        return Check(name="disk", state="good", seen=seen)
    mend = f"A demo workspace wants about {DISK_GB:.0f} GB; set COUTURIER_WORKSPACE to a larger disk."
    return Check(name="disk", state="note" if free_gb > 1 else "bad", seen=seen, mend=mend)


def _memory() -> Check:
    pages, page = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    total_gb = os.sysconf("SC_PHYS_PAGES") * page / 1e9
    seen = f"{total_gb:.1f} GB, {pages * page / 1e9:.1f} GB unused now"
    if total_gb >= MEMORY_GB:
        return Check(name="memory", state="good", seen=seen)
    return Check(
        name="memory", state="note", seen=seen, mend=f"The demo recipe is measured against {MEMORY_GB:.0f} GB."
    )


def _port(name: str, port: int) -> Check:
    if is_free(port):
        return Check(name=f"port {port}", state="good", seen=f"free for {name}")
    mend = f"`couturier up` takes another free port for {name} if this one is busy, and prints it."
    return Check(name=f"port {port}", state="note", seen="in use", mend=mend)


def _threads() -> Check:
    limit = os.environ.get("OMP_NUM_THREADS", "unset")
    seen = f"{os.cpu_count()} cores; OMP_NUM_THREADS {limit}; a recipe sets its own (threads=1 repeats bit for bit)"
    return Check(name="threads", state="good", seen=seen)


def _compiler() -> Check:
    from couturier.kernels import compiled

    found = compiled.compiler()
    if found:
        return Check(name="compiler", state="good", seen=f"{found}: kernels are built for this processor")
    seen = f"none of {', '.join(compiled.COMPILERS)}: kernels run in PyTorch, training and sampling take longer"
    return Check(name="compiler", state="note", seen=seen, mend="On Linux install gcc (`apt install gcc`).")


def _switches() -> Check:
    """Telemetry switches that somebody turned the other way."""
    turned = [f"{name}={os.environ[name]}" for name, quiet in SWITCHES.items() if os.environ.get(name) != quiet]
    if not turned:
        return Check(name="quiet", state="good", seen=f"{len(SWITCHES)} telemetry and hub switches are off")
    return Check(name="quiet", state="note", seen=f"set otherwise by you: {', '.join(turned)}")
