"""The house: what is installed, what a wheel holds, which room imports which, and what the lock promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("flows", "components", "kernels", "serving")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def own_files(suffix: str) -> set[str]:
    """Files of the four rooms, as they are named inside the package."""
    return {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob(f"*{suffix}")
        if "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What a wheel built from a copy of the tree holds (a copy: setuptools leaves build folders behind)."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "tree").mkdir(exist_ok=True)
            shutil.copy(source, folder / "tree" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(folder / "tree")], check=True, timeout=120)
    (wheel,) = folder.glob("couturier-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("suffix", [".py", ".c", ".h", ".csv", ".html", ".css", ".js"])
def test_a_wheel_holds_every_file_of_ours(wheel_names: set[str], suffix: str) -> None:
    in_wheel = {name.removeprefix("couturier/") for name in wheel_names if name.endswith(suffix)}
    assert own_files(suffix) <= in_wheel


def test_a_wheel_puts_nothing_beside_the_package(wheel_names: set[str]) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel_names} == {"couturier"}


def test_kernels_is_no_package_of_that_name() -> None:
    """transformers imports a package called kernels when it finds one; a folder without __init__.py it ignores."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_arrow_runs_back_up() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": ".types"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_the_type_checker_sees_the_rooms_as_one_package() -> None:
    for room in ROOMS:
        link = ROOT / ".types" / "couturier" / room
        assert link.is_symlink()
        assert link.readlink() == Path("../..") / room


def lock() -> dict[str, str]:
    lines = (ROOT / "constraints.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines)


def test_the_lock_is_plain_and_sorted() -> None:
    text = (ROOT / "constraints.lock").read_bytes().decode()
    assert text.endswith("\n")
    assert "\r" not in text
    assert list(lock()) == sorted(lock())
    assert not re.search(r"[+/@]|couturier", text)  # no local tags, no paths, not ourselves


def test_every_direct_dependency_is_pinned_as_in_the_lock() -> None:
    direct = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    pins = {
        re.sub(r"[-_.]+", "-", one.split("==")[0]).lower(): one.split(";")[0]
        for one in direct
        if not one.startswith("couturier[")
    }
    assert pins
    for name, requirement in pins.items():
        assert requirement.split("==")[1:] == [lock()[name]], requirement


def test_what_is_installed_is_what_was_locked() -> None:
    installed = {
        name: metadata.version(name).split("+")[0] for name in ("torch", "prefect", "mlflow", "bentoml", "polars")
    }
    assert installed == {name: lock()[name] for name in installed}


def test_serving_does_not_pull_what_only_training_needs() -> None:
    serving = {one.split("==")[0] for one in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["serve"]]}
    assert not serving & {"dvc", "prefect", "mlflow", "great-expectations"}


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_points_at_files_that_are_there() -> None:
    linked = {target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target}
    listed = {f"{name}/" for name in re.findall(r"^(\w+)/ ", README, re.MULTILINE)}
    assert linked
    assert listed >= {f"{room}/" for room in ROOMS}
    assert not [name for name in linked | listed if not (ROOT / name).exists()]


def test_the_readme_names_only_verbs_that_exist() -> None:
    from typer.main import get_command

    from couturier.flows import cli

    verbs = set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"\bcouturier ([a-z]+)\b(?=[^*]*$)", README, re.MULTILINE))
    assert {"retrain", "report", "up", "rollback"} <= named
    assert named <= verbs
