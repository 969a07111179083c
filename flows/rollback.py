"""Make the champion before this one the champion again."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from couturier.components.lineage.provenance import whoami
from couturier.components.lineage.registry import Registry
from couturier.components.lineage.workspace import Workspace


@flow(name="rollback", persist_result=False)
def rollback(who: str | None = None, why: str = "") -> dict[str, Any]:
    """Roll back one promotion.

    Returns:
        ``version`` (the champion now), ``previous`` (the one rolled back), ``sentence``.
    """
    return go_back(Workspace.find(), who=who or whoami(), why=why)


@task(name="go back", cache_policy=NO_CACHE, persist_result=False)
def go_back(workspace: Workspace, *, who: str, why: str) -> dict[str, Any]:
    move = Registry(workspace).rollback(who=who, why=why)
    return {"version": move.version, "previous": move.previous, "sentence": move.sentence}
