"""The command line without a run behind it: its frozen surface, its manners, its errors."""

from __future__ import annotations

import errno
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.main import get_command

from couturier.components.errors import UnknownUserError
from couturier.components.ports import LOOPBACK
from couturier.flows import cli
from couturier.kernels import compiled

if TYPE_CHECKING:
    from tests.conftest import Project

JSON = "--json"
SURFACE = {
    "": {"--debug", "--version"},
    "doctor": {JSON},
    "compare": {"--judges", "--recipe", "--set", "--json"},
    "ingest": {
        "--adapter", "--events", "--items", "--users", "--pictures", "--folder", "--picture-size", "--max-users",
        "--set", JSON, "--feedback"},
    "validate": {"--recipe", "--set", JSON},
    "retrain": {"--recipe", "--set", "--who", JSON},
    "runs": {"--limit", JSON},
    "report": {"RUN", JSON},
    "explain": {"USER", "--items", "--n", "--seed", "--top", "--concept", "--model", JSON},
    "models": {JSON},
    "lineage": {"WHAT", "--mermaid", JSON},
    "promote": {"VERSION", "--force", "--recipe", "--who", "--why", JSON},
    "rollback": {"--who", "--why", JSON},
    "generate": {
        "--user", "--history", "--n", "--guidance", "--temperature", "--seed", "--out", "--scale", "--model",
        "--titles", "--writer", "--likeliest", "--new", JSON,
    },
    "serve": {"--port", "--model", JSON},
    "up": {"--prefect-port", "--mlflow-port", "--port", "--schedule", "--recipe", "--set", JSON},
    "data push": {"REMOTE", JSON},
    "data pull": {"REMOTE", "--force", JSON},
    "data status": {JSON},
}  # fmt: skip


def words(command: object) -> set[str]:
    """Options and arguments as people type them."""
    found = set()
    for parameter in command.params:  # type: ignore[attr-defined]
        names = [name for name in parameter.opts if name.startswith("--")]
        found |= set(names) or {(parameter.metavar or parameter.name).upper()}
    return found - {"--help"}


def test_the_surface_is_frozen() -> None:
    """Scripts rest on these words. Adding one is a line here; renaming or dropping one needs a reason."""
    root = get_command(cli.app)
    seen = {"": words(root)}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        if name == "data":
            seen |= {f"data {verb}": words(inner) for verb, inner in command.commands.items()}
        else:
            seen[name] = words(command)
    assert seen == SURFACE


@pytest.mark.parametrize("verb", [name for name in SURFACE if name not in ("", "data pull")])
def test_help_teaches_by_example(verb: str) -> None:
    command = get_command(cli.app)
    for word in verb.split():
        command = command.commands[word]  # type: ignore[attr-defined]
    assert "couturier " + verb in (command.help or "")


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "prefect", "mlflow", "bentoml", "great_expectations", "dvc", "polars", "numpy"}
    code = f"import sys, couturier.flows.cli; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(project: Project) -> None:
    assert project.run("--version").out.startswith("couturier 0.")


def test_runs_of_an_empty_workspace(project: Project) -> None:
    assert "couturier retrain" in project.run("runs").out
    assert project.run("runs", "--json").json == {"runs": []}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("report", "latest"), "no finished run"),
        (("retrain", "--recipe", "smok"), "Did you mean 'smoke'"),
        (("retrain", "--set", "sft.stepz=3"), "Did you mean 'steps'"),
        (("ingest", "--adapter", "nosuch"), "adapter 'nosuch' is unknown"),
        (("ingest", "--adapter", "files", "--events", "nowhere.csv", "--items", "nowhere.csv"), "nowhere.csv"),
        (("validate",), "couturier ingest"),
        (("generate", "--user", "1"), "couturier retrain"),
        (("generate",), "--user"),
        (("serve",), "couturier retrain"),
        (("lineage", "7"), "7"),
        (("rollback",), "nothing to roll back to"),
        (("data", "push", "nowhere"), "couturier ingest"),
    ],
)
def test_an_error_is_one_sentence(project: Project, command: tuple[str, ...], said: str) -> None:
    answer = project.run(*command, code=1)
    (line,) = [line for line in answer.err.splitlines() if line.startswith("Error: ")]
    assert said in line
    assert "Traceback" not in answer.err + answer.out


def test_json_tells_errors_too(project: Project) -> None:
    answer = project.run("report", "latest", "--json", code=1)
    assert "no finished run" in answer.json["error"]


def test_debug_shows_the_traceback(project: Project) -> None:
    assert "Traceback" in project.run("report", "latest", "--debug", code=1).err


def test_a_wrong_word_is_a_usage_error(project: Project) -> None:
    assert "No such option" in project.run("retrain", "--recipes", "smoke", code=2).err


@pytest.mark.parametrize(("verb", "package", "extra"), [("retrain", "prefect", "demo"), ("serve", "bentoml", "serve")])
def test_a_missing_extra_is_told_with_its_install_line(tmp_path: Path, verb: str, package: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['couturier', {verb!r}]\n"
        "from couturier.flows.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert f"needs the package '{package}'" in done.stderr
    assert f"pip install -e '.[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--prefect-port", "--mlflow-port", "--port"])
def test_a_busy_port_is_told_before_anything_starts(project: Project, option: str) -> None:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        port = listener.getsockname()[1]
        answer = project.run("up", option, str(port), code=1)
    assert f"port {port}" in answer.err
    assert option in answer.err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (sqlite3.OperationalError("database or disk is full"), "the disk is full"),
        (PermissionError(13, "Permission denied", "x"), "Permission denied"),
        (ModuleNotFoundError("No module named 'resvg_py'", name="resvg_py"), "pip install -e '.[demo]'"),
        (UnknownUserError("user_id '9' is not known."), "user_id '9' is not known."),
    ],
)
def test_what_goes_wrong_has_a_sentence(error: Exception, said: str) -> None:
    assert said in cli._sentence(error)


def test_a_fault_of_ours_says_so_without_a_traceback(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['couturier', 'runs', '--json']\n"
        "from couturier.flows import cli, records\n"
        "records.all_runs = lambda workspace: 1 / 0\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "--debug" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor(project: Project) -> None:
    found = project.run("doctor", "--json").json
    assert found["ok"]
    checks = {check["name"]: check for check in found["checks"]}
    assert {"python", "extra train", "extra serve", "extra demo", "lock", "workspace", "disk", "threads"} <= set(checks)
    assert checks["lock"]["state"] == "good"
    text = project.run("doctor", HF_HUB_OFFLINE="0").out
    assert "HF_HUB_OFFLINE=0" in text
    assert checks["compiler"]["state"] == ("good" if compiled.compiler() else "note")
    bare = project.run("doctor", "--json", PATH=str(project.folder)).json
    (without,) = [check for check in bare["checks"] if check["name"] == "compiler"]
    assert bare["ok"]
    assert without["state"] == "note"
    assert "install gcc" in without["mend"]


def test_doctor_names_a_folder_that_cannot_be_written(project: Project) -> None:
    blocked = project.folder / "file"
    blocked.write_text("no folder")
    answer = project.run("doctor", "--json", code=1, COUTURIER_WORKSPACE=str(blocked))
    assert [check["name"] for check in answer.json["checks"] if check["state"] == "bad"] == ["workspace"]
