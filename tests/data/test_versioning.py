"""Versions with the real DVC and a local remote, in a git repository and in a plain folder."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from couturier.components.data.versioning import DataVersion, md5_of_file, pull, push, recorded, status, version_data
from couturier.components.errors import DataError, LineageError
from couturier.components.lineage.workspace import Workspace

REPOSITORY = Path(__file__).resolve().parents[2]
IGNORED = ".couturier/\n/data/\n"


def fill(project: Path, **files: str) -> None:
    (project / "data").mkdir(parents=True, exist_ok=True)
    for name, text in (files or {"events": "one", "items": "two"}).items():
        (project / "data" / f"{name}.parquet").write_text(text)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def git(project: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=project, check=True, capture_output=True, text=True).stdout


@pytest.fixture(params=["git", "plain"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Workspace:
    """A project with the repository's own DVC settings under git, or with nothing at all."""
    project = tmp_path / "project"
    project.mkdir()
    if request.param == "git":
        git(project, "init", "-q")
        (project / ".dvc").mkdir()
        for name in ("config", ".gitignore"):
            shutil.copy(REPOSITORY / ".dvc" / name, project / ".dvc" / name)
        (project / ".gitignore").write_text(IGNORED)
    fill(project)
    return Workspace(project=project, root=project / ".couturier")


def test_the_first_version_then_nothing_then_the_next(place: Workspace) -> None:
    assert status(place) == "unversioned" and recorded(place) is None
    first = version_data(place)
    assert first.changed and first.md5.endswith(".dir") and (first.files, first.size) == (2, 6)
    assert f"md5: {first.md5}" in (place.project / "data.dvc").read_text()
    stamp = (place.project / "data.dvc").stat().st_mtime_ns
    again = version_data(place)
    assert again == DataVersion(md5=first.md5, changed=False, size=6, files=2) == recorded(place)
    assert (place.project / "data.dvc").stat().st_mtime_ns == stamp
    fill(place.project, events="more")  # the files stay writable
    assert status(place) == "modified"
    second = version_data(place)
    assert second.changed and second.md5 != first.md5 and status(place) == "clean"
    fill(place.project, events="one")
    assert version_data(place).md5 == first.md5  # the name depends on the bytes alone


def test_push_delete_pull_gives_the_same_bytes(place: Workspace, tmp_path: Path) -> None:
    version_data(place)
    before, remote = bytes_of(place.data), str(tmp_path / "remote")
    assert push(place, remote) == 3  # two files and their list
    assert push(place, remote) == 0
    shutil.rmtree(place.data)
    assert status(place) == "deleted"
    shutil.rmtree(place.root / "dvc")  # as on another machine
    assert pull(place, remote) == 3
    assert bytes_of(place.data) == before and status(place) == "clean"
    fill(place.project, events="writable")


def test_a_configured_remote_goes_by_its_name_and_may_be_the_default(place: Workspace, tmp_path: Path) -> None:
    version_data(place)
    config = place.project / ".dvc" / "config"
    config.write_text(config.read_text() + f"['remote \"store\"']\n    url = {tmp_path / 'store'}\n")
    assert push(place, "store") == 3
    with pytest.raises(LineageError, match="no remote specified"):
        push(place)
    config.write_text(config.read_text().replace("[core]", "[core]\n    remote = store"))
    assert push(place) == 0
    shutil.rmtree(place.data)
    pull(place)
    assert status(place) == "clean"


def test_unsaved_changes_survive_a_pull_unless_forced(place: Workspace, tmp_path: Path) -> None:
    version_data(place)
    remote = str(tmp_path / "remote")
    push(place, remote)
    fill(place.project, events="work of a day")
    with pytest.raises(DataError, match="a pull would overwrite them"):
        pull(place, remote)
    assert (place.data / "events.parquet").read_text() == "work of a day"
    pull(place, remote, force=True)
    assert (place.data / "events.parquet").read_text() == "one"


def test_an_older_version_that_is_in_the_cache_may_be_overwritten(place: Workspace, tmp_path: Path) -> None:
    old = version_data(place)
    push(place, str(tmp_path / "remote"))
    pointer = (place.project / "data.dvc").read_text()
    fill(place.project, events="newer")
    version_data(place)
    (place.project / "data.dvc").write_text(pointer)
    pull(place, str(tmp_path / "remote"))
    assert recorded(place) == DataVersion(md5=old.md5, changed=False, size=6, files=2)
    assert (place.data / "events.parquet").read_text() == "one"


def test_bytes_that_the_cache_lost_are_kept_again(place: Workspace, tmp_path: Path) -> None:
    """A fresh clone after an ingestion: data.dvc is right already, but nothing is kept."""
    version_data(place)
    shutil.rmtree(place.root / "dvc")
    assert status(place) == "not in cache"
    with pytest.raises(LineageError, match="not in the cache, so it cannot be pushed"):
        push(place, str(tmp_path / "remote"))
    assert not version_data(place).changed
    assert status(place) == "clean"


def test_dvc_s_own_command_line_agrees_wherever_the_workspace_is(place: Workspace, tmp_path: Path) -> None:
    def line() -> str:
        return subprocess.run(
            [sys.executable, "-m", "dvc", "status", "--json"],
            cwd=place.project,
            env=os.environ | {"DVC_SITE_CACHE_DIR": str(tmp_path / "site")},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    version_data(place)
    assert line().strip() == "{}"
    elsewhere = Workspace(project=place.project, root=tmp_path / "elsewhere")
    version_data(elsewhere)
    assert (tmp_path / "elsewhere" / "dvc" / "cache").is_dir()
    assert line().strip() == "{}"
    version_data(place)
    local = place.project / ".dvc" / "config.local"
    assert "elsewhere" not in local.read_text()


def test_git_sees_the_pointer_and_not_the_data(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    git(project, "init", "-q")
    shutil.copytree(
        REPOSITORY / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local")
    )
    (project / ".gitignore").write_text(IGNORED)
    fill(project)
    version_data(Workspace(project=project, root=project / ".couturier"))
    assert (project / ".gitignore").read_text() == IGNORED
    assert git(project, "status", "--short", "--untracked-files=all").split() == [
        "??",
        ".dvc/.gitignore",
        "??",
        ".dvc/config",
        "??",
        ".gitignore",
        "??",
        "data.dvc",
    ]


def test_nothing_to_version_and_nothing_to_push(tmp_path: Path) -> None:
    place = Workspace(project=tmp_path, root=tmp_path / "ws")
    with pytest.raises(DataError, match="there is nothing to version"):
        version_data(place)
    with pytest.raises(DataError, match="data.dvc does not exist"):
        push(place, str(tmp_path / "remote"))


def test_what_dvc_refuses_is_said_in_one_line_and_its_logger_left_as_it_was(tmp_path: Path) -> None:
    fill(tmp_path)
    place = Workspace(project=tmp_path, root=tmp_path / "ws")
    version_data(place)
    level = logging.getLogger("dvc").level
    with pytest.raises(LineageError, match="pushing data/ to nowhere failed: .*nowhere") as caught:
        push(place, "nowhere")
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "ws")
    with pytest.raises(LineageError, match="pulling data/"):
        pull(place, str(tmp_path / "empty-remote"))
    assert logging.getLogger("dvc").level == level


def test_md5_is_dvc_s(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("one")
    assert md5_of_file(tmp_path / "x") == "f97c5d29941bfb1b2fdab0874906ab82"
