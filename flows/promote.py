"""Ask the gate about a version, and make it the champion if it earned that. ``force`` overrules the gate, on record."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from couturier.components.lineage.gate import Config
from couturier.components.lineage.promotion import consider
from couturier.components.lineage.provenance import whoami
from couturier.components.lineage.registry import Registry
from couturier.components.lineage.workspace import Workspace


@flow(name="promote", persist_result=False)
def promote(
    version: str = "latest", who: str | None = None, why: str = "", force: bool = False, gate: Config | None = None
) -> dict[str, Any]:
    """Promote a version.

    Args:
        version: a number, ``latest`` or ``challenger``.
        who: who answers for it; the login name if nobody is named.
        why: goes into the journal; needed with ``force``.
        force: do not ask the gate.
        gate: what the gate demands; the defaults if None.

    Returns:
        ``version``, ``previous`` (the champion before), ``moved``, ``verdict`` (None when forced), ``sentence``.
    """
    workspace = Workspace.find()
    number = Registry(workspace).version(version).number
    if force:
        return overrule(workspace, number, who=who or whoami(), why=why)
    return ask(workspace, number, gate or Config(), who=who or whoami(), why=why)


@task(name="ask the gate", cache_policy=NO_CACHE, persist_result=False)
def ask(workspace: Workspace, number: int, config: Config, *, who: str, why: str) -> dict[str, Any]:
    verdict, move = consider(workspace, number, config=config, who=who, why=why)
    sentence = f"Version {number} was not promoted ({verdict.decision}): {verdict.reasons[0]}."
    if move is not None:
        sentence = move.sentence
    elif verdict.decision == "promote":
        sentence = f"Version {number} is the champion already; nothing was moved."
    return {
        "version": number,
        "previous": None if move is None else move.previous,
        "moved": move is not None,
        "verdict": verdict.as_dict(),
        "sentence": sentence,
    }


@task(name="overrule the gate", cache_policy=NO_CACHE, persist_result=False)
def overrule(workspace: Workspace, number: int, *, who: str, why: str) -> dict[str, Any]:
    move = Registry(workspace).promote(number, who=who, why=why, force=True)
    return {
        "version": move.version,
        "previous": move.previous,
        "moved": True,
        "verdict": None,
        "sentence": f"{move.sentence} The gate was overruled by {who}: {why}",
    }
