"""What every verb of the command line shares: where output goes, how JSON is printed, how a missing extra is told."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from couturier.components.errors import MissingExtraError

Json = Annotated[
    bool, typer.Option("--json", help="Print facts for machines: the last line of stdout is one JSON object.")
]
Who = Annotated[str | None, typer.Option(help="Who answers for it; your login name if nobody is named.")]
Why = Annotated[str, typer.Option(help="The reason, kept in the journal.")]


def out() -> Console:
    """Facts for people, on stdout."""
    return Console(highlight=False, soft_wrap=True)


def emit(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, sort_keys=False, default=str) + "\n")
    sys.stdout.flush()


def need(package: str, *, extra: str, verb: str) -> None:
    """Tell in one sentence that an extra is not installed, before anything heavy is tried.

    Raises:
        MissingExtraError: the package is not there.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra=extra, needed_for=f"`couturier {verb}`")
