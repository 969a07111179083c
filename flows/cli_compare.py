"""The verb ``compare``: which judge knows one's own people best."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from couturier.flows.cli_base import Json, emit, need, out


def add_to(app: typer.Typer) -> None:
    app.command()(compare)


def compare(
    judges: Annotated[str, typer.Option(help="Names with commas, or all.")] = "all",
    recipe: Annotated[str, typer.Option(help="Whose contract and sequences settings to use.")] = "demo",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Replace a fit setting, such as steps=1000 or din.hidden=64."),
    ] = None,
    json: Json = False,
) -> None:
    """Fit user-interest models on `data/` and rank them: the same log, held-out events and figures for all.

    Each user's last event is the test, the one before it validation. What was fitted before with the same data,
    settings and code is reused. The winner's name goes into a recipe as `--set judge.model=NAME`.

    Examples: \\
    `couturier compare --judges attention,din,sasrec` \\
    `couturier compare --judges all --set steps=400 --json`
    """
    need("great_expectations", extra="demo", verb="compare")
    from couturier.components.console import ConsoleProgress, table
    from couturier.components.data import contract, sequences, versioning
    from couturier.components.interest.compare import FitConfig, compare, write_comparison
    from couturier.components.interest.judge import JUDGES
    from couturier.components.lineage.stages import ArtifactStore, Stage
    from couturier.components.lineage.workspace import Workspace
    from couturier.flows import recipes
    from couturier.flows.overrides import override

    workspace, plan = Workspace.find(), recipes.named(recipe)
    config = override(FitConfig(batch=256, steps=600, patience=3), settings or [])
    names = list(JUDGES) if judges == "all" else [name.strip() for name in judges.split(",") if name.strip()]
    store, progress = ArtifactStore(workspace), ConsoleProgress()
    version = versioning.version_data(workspace)
    clean = store.materialise(
        Stage(name="validate", run=contract.run, config=plan.contract, external={"data": version.md5}),
        progress=progress,
    )
    windows = store.materialise(
        Stage(name="sequences", run=sequences.run, config=plan.sequences, inputs={"validate": clean.id}),
        progress=progress,
    )
    found = compare(store, clean, windows, names, config, progress=progress)
    record, picture = write_comparison(found, workspace.root / "comparisons" / windows.id)
    if json:
        emit({**found, "record": str(record), "picture": str(picture)})
        return
    rows = [_row(name, found["table"][name]) for name in _ranked(found["table"])]
    out().print(table("", ("judge", "NDCG@10", "Hit@10", "AUC", "fit s", "histories/s"), rows))
    seen = "may be taken again" if found["seen_items_are_candidates"] else "are left out"
    out().print(
        f"{found['users']:,} users, {found['items']:,} items, {found['events']:,} events; items taken before {seen} "
        f"({found['repeat_share']:.0%} of held-out events repeat one).",
        markup=False,
    )
    out().print(f"{record}\n{picture}", markup=False)
    out().print(f"Next: couturier retrain --set judge.model={found['best']}", markup=False)


def _ranked(table: dict[str, dict[str, Any]]) -> list[str]:
    return sorted(table, key=lambda name: -table[name]["ndcg@10"][0])


def _row(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    def shown(figure: str) -> str:
        if figure not in row:
            return ""
        mean, low, high = row[figure]
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"

    fit, rate = row.get("fit_s"), row.get("samples_a_s")
    return (
        name,
        shown("ndcg@10"),
        shown("hit@10"),
        shown("auc"),
        "" if fit is None else f"{fit:.0f}",
        "" if rate is None else f"{rate:,.0f}",
    )
