"""From a registered version to a champion: let it meet the champion, hear the gate, and move the alias if earned.

::

    examine ── duel stage: the champion draws for the candidate's users, windows and seeds ──▶ gate.decide ──▶ journal
    consider ─ examine (or the verdict that still stands) ──▶ Registry.promote when it says promote
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from couturier.components.data.formats import USERS, Windows
from couturier.components.lineage import gate
from couturier.components.lineage.gate import Config, Verdict
from couturier.components.lineage.registry import Move, Registry, Version
from couturier.components.lineage.stages import Artifact, ArtifactStore, Progress, Stage
from couturier.components.lineage.tracking import tracked
from couturier.components.lineage.workspace import Workspace

PER_USER = "per_user.parquet"


def consider(
    workspace: Workspace,
    number: int,
    *,
    config: Config,
    who: str,
    why: str,
    progress: Progress | None = None,
) -> tuple[Verdict, Move | None]:
    """Ask the gate about a version, and make it the champion if it earned that.

    A verdict against the champion of today stands: it is not asked for again, and a promotion that was earned and
    not carried out, because of a kill, is carried out now.
    """
    registry = Registry(workspace)
    registry.reconcile()
    champion = registry.champion()
    if champion is not None and champion.number == number:
        return _verdict_of_champion(registry, champion), None
    standing = registry.standing_verdict(number)
    if standing is not None:
        verdict = Verdict.from_dict(standing.payload)
    elif champion is not None and _model(champion) == _model(registry.version(number)):
        verdict = _same_model(registry, number, champion, who=who)
    else:
        verdict = examine(workspace, number, config=config, who=who, progress=progress)
    if verdict.decision != "promote":
        return verdict, None
    return verdict, registry.promote(number, who=who, why=why)


def examine(
    workspace: Workspace, number: int, *, config: Config, who: str, progress: Progress | None = None
) -> Verdict:
    """The gate's verdict on a version against the champion there is, written to the journal.

    Raises:
        LineageError: no such version, the champion's model is the candidate's, or an artifact is gone.
        DataError: the figures of the two sides do not fit together.
    """
    registry = Registry(workspace)
    candidate, champion = registry.version(number), registry.champion()
    store = ArtifactStore(workspace)
    proof = store.open(candidate.manifests["evaluate"])
    figures: dict[str, Any] = {"evaluate": proof.id}
    theirs = None
    if champion is not None:
        gate.require_two(_model(candidate), _model(champion))  # before the champion draws thousands of pictures
        duel = tracked(store, duel_stage(candidate, champion), parent_run_id=candidate.run_id, progress=progress)
        figures["duel"] = duel.id
        theirs = pl.read_parquet(duel.path / PER_USER)
    verdict = gate.decide(
        pl.read_parquet(proof.path / PER_USER),
        theirs,
        config=config,
        candidate=_model(candidate),
        champion=None if champion is None else _model(champion),
        users=people(store.open(candidate.manifests["sequences"])),
    )
    _record(registry, candidate, champion, verdict, who=who, more={"config": asdict(config), **figures})
    return verdict


def duel_stage(candidate: Version, champion: Version) -> Stage:
    """The stage in which the champion draws for the candidate's test users: same windows, same seeds."""
    from couturier.components.evaluation import duel

    mine, theirs = candidate.manifests, champion.manifests
    return Stage(
        name="duel",
        run=duel.run,
        config=duel.Config(),
        inputs={
            "evaluate": mine["evaluate"],
            "sequences": mine["sequences"],
            "judge": mine["judge"],
            "rl": theirs["rl"],
            "tokenise": theirs["tokenise"],
            "champion_sequences": theirs["sequences"],
        },
    )


def people(sequences: Artifact) -> pl.DataFrame:
    """What the gate slices by: ``user_id``, ``history`` (decayed purchases known of a test user, the mean over their
    windows) and every demographics column."""
    windows = Windows.load(sequences.path, "test")
    known = np.bincount(windows.user_W, weights=windows.weight_WK.sum(axis=1), minlength=len(windows.users))
    count = np.bincount(windows.user_W, minlength=len(windows.users))
    frame = pl.DataFrame({"user_id": windows.users, "history": known / np.maximum(count, 1)})
    described: Path = sequences.path / USERS
    if described.exists():
        frame = frame.join(
            pl.read_parquet(described).with_columns(pl.col("user_id").cast(pl.String)), "user_id", "left"
        )
    return frame


def current(workspace: Workspace) -> dict[str, Any]:
    """The champion there is, since when and why."""
    registry = Registry(workspace)
    live, champion = registry.journal.what_was_live(), registry.champion()
    return {
        "champion": None if champion is None else champion.as_dict(),
        "since": None if live is None else live.since,
        "who": None if live is None else live.who,
        "why": None if live is None else live.why,
    }


def _verdict_of_champion(registry: Registry, champion: Version) -> Verdict:
    for entry in registry.journal.history(("verdict", "override"), version=champion.number, limit=1):
        if entry.kind == "verdict":
            return Verdict.from_dict(entry.payload)
    reason = f"version {champion.number} is the champion, by an override that is in the journal"
    return Verdict(decision="promote", reasons=(reason,), figures={}, candidate=_model(champion), champion=None)


def _same_model(registry: Registry, number: int, champion: Version, *, who: str) -> Verdict:
    """The champion's own model in another bento: no comparison can tell them apart, so people decide."""
    candidate = registry.version(number)
    reason = (
        f"version {number} holds the model of the champion, version {champion.number}, in another bento, and the gate "
        f"does not compare a model with itself; `couturier promote {number} --force --why REASON` puts it in use"
    )
    verdict = Verdict(
        decision="hold", reasons=(reason,), figures={}, candidate=_model(candidate), champion=_model(champion)
    )
    _record(registry, candidate, champion, verdict, who=who, more={})
    return verdict


def _record(
    registry: Registry,
    candidate: Version,
    champion: Version | None,
    verdict: Verdict,
    *,
    who: str,
    more: dict[str, Any],
) -> None:
    registry.journal.append(
        "verdict",
        who=who,
        run_id=candidate.run_id,
        version=candidate.number,
        payload={**verdict.as_dict(), "champion_version": None if champion is None else champion.number, **more},
    )


def _model(version: Version) -> str:
    return version.manifests["rl"]
