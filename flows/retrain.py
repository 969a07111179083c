"""Data in, a judged and packaged model out, and the next champion if it has earned it.

    ingest ▶ version ▶ validate ▶ sequences ▶ tokenise ─┬▶ judge ─┐
                                                        └▶ sft ───┴▶ rl ▶ evaluate ▶ package ▶ register ▶ gate

Each line below is a Prefect task. A stage whose manifest id is known is not run again; a killed run goes on where it
was. ``couturier retrain`` runs this on the spot; ``couturier up`` deploys it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow

from couturier.components.alignment import align, sft
from couturier.components.data import contract, sequences
from couturier.components.data.formats import META
from couturier.components.data.ingest import ingest
from couturier.components.data.versioning import version_data
from couturier.components.evaluation import evaluate
from couturier.components.files import read_json
from couturier.components.generator import tokenise
from couturier.components.interest import fit
from couturier.components.lineage.journal import Journal
from couturier.components.lineage.promotion import consider
from couturier.components.lineage.registry import Registry
from couturier.components.lineage.stages import Artifact
from couturier.components.lineage.workspace import Workspace
from couturier.flows import recipes
from couturier.flows.run import Run, running
from couturier.serving import package


@flow(name="retrain", persist_result=False, validate_parameters=True)
def retrain(recipe: str = "demo", settings: list[str] | None = None, who: str | None = None) -> dict[str, Any]:
    """The whole chain. Returns the record that ``couturier retrain --json`` prints.

    Args:
        recipe: a name in ``recipes.RECIPES``.
        settings: ``name=value`` replacements, as after ``--set``.
        who: who answers for the run; the login name if nobody is named.
    """
    plan = recipes.named(recipe, settings or [])
    workspace = Workspace.find()
    with running(plan, workspace, who=who, settings=settings or []) as run:
        run.step("ingest", lambda: fill_data(run), lambda facts: (facts["reused"], facts))
        data = run.step("version", lambda: version_data(workspace), lambda it: (not it.changed, {"md5": it.md5}))
        run.learns_from(data.md5)

        clean = run.stage("validate", contract.run, plan.contract, external={"data": data.md5})
        windows = run.stage("sequences", sequences.run, plan.sequences, validate=clean)
        codec = run.stage("tokenise", tokenise.run, plan.tokenise, sequences=windows)
        judge = run.stage("judge", fit.run, plan.judge, sequences=windows)
        tuned = run.stage("sft", sft.run, plan.sft, sequences=windows, tokenise=codec)
        aligned = run.stage("rl", align.run, plan.rl, sequences=windows, tokenise=codec, judge=judge, sft=tuned)
        if stopped := note_stop(Registry(workspace).journal, aligned, who=run.who, run_id=run.run_id):
            run.console.print(f"  [yellow]rl {stopped}[/yellow]")

        proof = run.stage(
            "evaluate",
            evaluate.run,
            plan.evaluate,
            sequences=windows,
            tokenise=codec,
            judge=judge,
            sft=tuned,
            rl=aligned,
        )
        bento = run.stage(
            "package", package.run, plan.package, sequences=windows, tokenise=codec, judge=judge, rl=aligned
        )
        tag = str(read_json(bento.path / "bento.json")["tag"])

        registry = Registry(workspace)
        registered = run.step(
            "register",
            lambda: registry.register(
                rl=aligned.id,
                evaluate=proof.id,
                package=bento.id,
                bento=tag,
                recipe=plan.name,
                config_hash=run.record["config_hash"],
                run_id=run.run_id,
                who=run.who,
            ),
            lambda it: (not it.created, {"version": it.version.number}),
        )
        verdict = run.step("gate", lambda: pass_gate(run, registered.version.number), lambda it: (it["reused"], it))
        version = registry.version(registered.version.number)
        return run.finish(
            model={"name": "couturier", "version": version.number, "alias": next(iter(version.aliases), None)},
            bento=tag,
            report=str(proof.path / "report.html"),
            verdict=verdict["decision"],
            gate=verdict,
        )


def fill_data(run: Run) -> dict[str, Any]:
    """Ingest with the recipe's adapter if ``data/`` is empty. What lies there was put there by somebody: it is used."""
    meta = run.workspace.data / META
    if meta.exists():
        facts: Mapping[str, Any] = read_json(meta)
        return {"reused": True, "adapter": facts["adapter"], **facts["rows"]}
    settings = run.recipe.ingest
    made = ingest(settings.adapter, settings, run.workspace, run.progress)
    return {"reused": made["reused"], "adapter": made["adapter"], **made["rows"]}


def note_stop(journal: Journal, aligned: Artifact, *, who: str, run_id: str) -> str:
    """Put on record that a guard ended the alignment early; the model of that moment goes on to the gate.

    Returns the reason, empty where no guard spoke. An artifact's stop is on record once, however often it is reused.
    """
    reason = str(aligned.facts["stopped"])
    if reason == align.DONE:
        return ""
    noted = {entry.payload["artifact"] for entry in journal.history(("training_stopped",))}
    if aligned.id not in noted:
        facts = {"stage": "rl", "artifact": aligned.id, "reason": reason}
        journal.append("training_stopped", who=who, run_id=run_id, payload=facts)
    return reason


def pass_gate(run: Run, number: int) -> dict[str, Any]:
    """The gate's decision on a version, and its promotion if earned. A decision that stands is not asked for again."""
    registry = Registry(run.workspace)
    known = "champion" in registry.version(number).aliases or registry.standing_verdict(number) is not None
    why = f"retraining run {run.run_id}"
    verdict, move = consider(run.workspace, number, config=run.recipe.gate, who=run.who, why=why, progress=run.progress)
    moved = None if move is None else move.sentence
    return {"reused": known and move is None, **verdict.as_dict(), "moved": moved}
