"""Where a run comes from: the commit of the code, the digest of a config, the md5 of the data, the person."""

from __future__ import annotations

import dataclasses
import getpass
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from couturier.components.errors import LineageError
from couturier.components.files import sha256_of_json

if TYPE_CHECKING:
    from couturier.components.lineage.stages import ArtifactStore

# The folder that holds the rooms: the checkout in an editable install, site-packages in an installed one.
_CODE = Path(__file__).resolve().parents[2]


def code_commit(folder: Path | None = None) -> str:
    """The git commit of the code that runs (``-dirty`` when tracked files differ), or the installed version."""
    code = folder or _CODE
    commit = _git(code, "rev-parse", "HEAD")
    # An installed package may happen to lie inside somebody else's checkout: only a checkout that tracks us counts.
    if commit is None or not _git(code, "ls-files", "pyproject.toml"):
        return f"version {importlib.metadata.version('couturier')} (no git checkout)"
    return f"{commit}-dirty" if _git(code, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def config_hash(config: Any) -> str:
    """The SHA-256 of a config dataclass or mapping, as canonical JSON; paths and other objects by their words."""
    value = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
    return sha256_of_json(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        entries = [_plain(entry) for entry in value]
        return sorted(entries, key=str) if isinstance(value, set | frozenset) else entries
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def whoami() -> str:
    """Who acts, when nobody is named: ``COUTURIER_WHO``, else the login name."""
    named = os.environ.get("COUTURIER_WHO", "").strip()
    if named:
        return named
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


def data_md5(store: ArtifactStore, artifact_id: str) -> str:
    """The md5 of the ``data/`` folder that an artifact goes back to.

    Raises:
        LineageError: the artifact, or one it was made from, is absent, or none of them read ``data/``.
    """
    for manifest in store.ancestry(artifact_id).values():
        if "data" in manifest["external"]:
            return str(manifest["external"]["data"])
    raise LineageError(f"artifact {artifact_id!r} goes back to no version of data/. Run `couturier retrain` again.")
