"""Versions of ``data/`` with DVC: ``data.dvc`` names the bytes, the cache keeps them, a remote shares them.

    data/ ──version_data──▶ data.dvc (committed) + cache in the workspace ──push──▶ remote
      ▲                                                                              │
      └───────────────────────────────── pull ◀──────────────────────────────────────┘

DVC's Python interface is used, since each call of its command line costs a second. The command line sees the same
repository: ``dvc status`` is clean after an ingestion whose bytes ``data.dvc`` already names.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from couturier.components.errors import DataError, LineageError, MissingExtraError
from couturier.components.lineage.workspace import Workspace

if TYPE_CHECKING:
    from dvc.repo import Repo

DVC_FILE = "data.dvc"
# A copy or a copy-on-write link keeps the files in data/ writable; DVC's hard links would not.
_LINKS = "reflink,copy"
_ADHOC_REMOTE = "couturier-adhoc"


@dataclass(frozen=True, kw_only=True)
class DataVersion:
    """What ``data.dvc`` says: DVC's MD5 of the folder (ends in ``.dir``), its bytes and how many files.

    ``changed`` is true where ``data.dvc`` was written anew because it named other bytes, or none.
    """

    md5: str
    changed: bool
    size: int
    files: int


def version_data(workspace: Workspace) -> DataVersion:
    """Make ``data.dvc`` name what lies in ``data/`` and keep a copy of it in the cache; do nothing where both hold.

    Raises:
        DataError: ``data/`` is missing or empty.
        LineageError: DVC refuses (another DVC process holds the lock, ``data/`` is tracked by git, …).
    """
    if not workspace.data.is_dir() or not any(workspace.data.iterdir()):
        raise DataError(f"there is nothing to version in {workspace.data}. Run `couturier ingest` first.")
    with _repository(workspace, "versioning data/") as repo:
        before = _recorded(repo, workspace)
        if before is None or repo.status(targets=[str(workspace.project / DVC_FILE)]):
            repo.add(str(workspace.data))
        now = _recorded(repo, workspace)
        if now is None:
            raise LineageError(f"DVC did not write {workspace.project / DVC_FILE}. Run `dvc add data` to see why.")
        changed = before is None or before.md5 != now.md5
        return DataVersion(md5=now.md5, changed=changed, size=now.size, files=now.files)


def recorded(workspace: Workspace) -> DataVersion | None:
    """What ``data.dvc`` names now, whatever lies in ``data/``; None where there is no ``data.dvc``."""
    if not (workspace.project / DVC_FILE).exists():
        return None
    with _repository(workspace, f"reading {DVC_FILE}") as repo:
        return _recorded(repo, workspace)


def status(workspace: Workspace) -> Literal["clean", "modified", "deleted", "not in cache", "unversioned"]:
    """How ``data/`` stands to ``data.dvc``, in DVC's words.

    ``unversioned`` means that there is no ``data.dvc``; ``not in cache``, that the bytes are right but not kept.
    """
    if not (workspace.project / DVC_FILE).exists():
        return "unversioned"
    with _repository(workspace, "the status of data/") as repo:
        out = _output(repo, workspace)
        found = set(out.workspace_status().values())
        if "deleted" in found:
            return "deleted"
        if found:
            return "modified"
        return "not in cache" if out.changed_cache() else "clean"


def push(workspace: Workspace, remote: str = "") -> int:
    """Copy the version that ``data.dvc`` names to a remote; returns how many files were sent.

    ``remote`` is the name of a configured remote, a URL or a folder; empty takes DVC's default remote.

    Raises:
        DataError: there is no ``data.dvc``.
        LineageError: no such remote, no way to it, or the version is not in the cache.
    """
    _need_version(workspace)
    with _repository(workspace, f"pushing data/ to {remote or 'the default remote'}", remote) as repo:
        if _output(repo, workspace).changed_cache():
            raise LineageError(
                f"the version that {DVC_FILE} names is not in the cache, so it cannot be pushed. "
                "Run `couturier ingest` (or `dvc pull`) first."
            )
        sent: int = repo.push(targets=[str(workspace.project / DVC_FILE)], remote=_remote_name(repo, remote))
        return sent


def pull(workspace: Workspace, remote: str = "", *, force: bool = False) -> int:
    """Bring the version that ``data.dvc`` names from a remote into ``data/``; returns how many files were fetched.

    Files in ``data/`` that no version holds are kept unless ``force`` is true.

    Raises:
        DataError: there is no ``data.dvc``, or ``data/`` holds changes that no version holds.
        LineageError: no such remote, no way to it, or the version is not there.
    """
    _need_version(workspace)
    with _repository(workspace, f"pulling data/ from {remote or 'the default remote'}", remote) as repo:
        if not force and _unsaved(_output(repo, workspace)):
            raise DataError(
                f"{workspace.data} holds files that no version holds, and a pull would overwrite them. "
                "Keep them with `couturier ingest` or `dvc add data`, move them away, or pull with force."
            )
        result: dict[str, Any] = repo.pull(
            targets=[str(workspace.project / DVC_FILE)], remote=_remote_name(repo, remote), force=force
        )
        return int(result["stats"].get("fetched", 0))


def md5_of_file(path: Path) -> str:
    """What DVC calls a file by. It tells bytes apart; it is no protection against forgery."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _need_version(workspace: Workspace) -> None:
    if not (workspace.project / DVC_FILE).exists():
        raise DataError(
            f"{workspace.project / DVC_FILE} does not exist. Run `couturier ingest` to make a first version."
        )


@contextmanager
def _repository(workspace: Workspace, doing: str, remote: str = "") -> Iterator[Repo]:
    """The project's DVC repository, made where there is none, with its cache and databases in the workspace.

    Raises:
        MissingExtraError: DVC is not installed.
        LineageError: what DVC raised, with what was being done.
    """
    try:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
        from dvc.scm import SCMError
    except ImportError as error:
        raise MissingExtraError("dvc", extra="train", needed_for="Versioning data/") from error
    loggers = [logging.getLogger(name) for name in ("dvc", "dvc_data")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:  # DVC's progress bars follow its level, and our own line is on the screen
        logger.setLevel(logging.CRITICAL)
    try:
        _prepare(workspace)
        with Repo(str(workspace.project), config=_overrides(workspace, remote)) as repo:
            yield repo
    except (DvcException, SCMError) as error:
        raise LineageError(f"{doing} failed: {' '.join(str(error).split())}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _overrides(workspace: Workspace, remote: str) -> dict[str, Any]:
    folder = workspace.root / "dvc"
    overrides: dict[str, Any] = {
        "core": {"site_cache_dir": str(folder / "site")},
        "cache": {"dir": str(folder / "cache"), "type": _LINKS},
    }
    if remote and ("/" in remote or "\\" in remote):
        url = remote if "://" in remote else str(Path(remote).resolve())
        overrides["remote"] = {_ADHOC_REMOTE: {"url": url}}
    return overrides


def _remote_name(repo: Repo, remote: str) -> str | None:
    """A name as it is, a URL or folder as the remote that was configured for this call, None for the default."""
    return (_ADHOC_REMOTE if _ADHOC_REMOTE in repo.config["remote"] else remote) or None


def _prepare(workspace: Workspace) -> None:
    """A ``.dvc`` folder as the repository has it, and a note for DVC's command line where the cache lies elsewhere."""
    from dvc.config import Config

    folder = workspace.project / ".dvc"
    if not (folder / "config").exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = Config.init(str(folder))
        with config.edit("repo") as repo:
            repo["core"]["analytics"] = False
            if not (workspace.project / ".git").exists():
                repo["core"]["no_scm"] = True
            repo["cache"]["type"] = _LINKS
    config = Config(str(folder))
    cache = str(workspace.root / "dvc" / "cache")
    if config["cache"].get("dir") != cache:
        with config.edit("local") as local:
            if config.load_one("repo")["cache"].get("dir") == cache:
                local["cache"].pop("dir")
            else:
                local["cache"]["dir"] = cache


def _output(repo: Repo, workspace: Workspace) -> Any:
    return repo.stage.load_one(str(workspace.project / DVC_FILE)).outs[0]


def _unsaved(out: Any) -> bool:
    """Whether ``data/`` differs from ``data.dvc`` in bytes that the cache does not hold."""
    if "modified" not in out.workspace_status().values():
        return False
    folder = Path(out.fs_path)
    cached = Path(out.cache.path)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            md5 = md5_of_file(path)
            if not (cached / md5[:2] / md5[2:]).exists():
                return True
    return False


def _recorded(repo: Repo, workspace: Workspace) -> DataVersion | None:
    if not (workspace.project / DVC_FILE).exists():
        return None
    out = _output(repo, workspace)
    return DataVersion(
        md5=str(out.hash_info.value), changed=False, size=int(out.meta.size or 0), files=int(out.meta.nfiles or 0)
    )
