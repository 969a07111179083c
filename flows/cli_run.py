"""Verbs around a retraining: ``retrain``, ``runs``, ``report``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from couturier.flows.cli_base import Json, Who, emit, need, out


def add_to(app: typer.Typer) -> None:
    app.command()(retrain)
    app.command()(runs)
    app.command()(report)


def retrain(
    ctx: typer.Context,
    recipe: Annotated[
        str, typer.Option(help="A named recipe: demo (the real thing) or smoke (does it all fit).")
    ] = "demo",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Replace one setting; repeat for more.")
    ] = None,
    who: Who = None,
    json: Json = False,
) -> None:
    """Run the whole chain: data, contract, model, proof, package, gate.

    What an earlier run has made from the same inputs, settings and code is reused; a killed run goes on where it was.
    Data that lies in `data/` is used; with none there, the recipe's own is ingested.

    Examples: \\
    `couturier retrain` \\
    `couturier retrain --recipe smoke --json` \\
    `couturier retrain --set rl.grpo.steps=40 --set rl.seed=1`
    """
    need("prefect", extra="demo", verb="retrain")
    from couturier.flows import launch

    record = launch.retrain(recipe, settings or [], who, began=float(ctx.obj))
    _summary(record)
    if json:
        emit({key: record[key] for key in JSON_KEYS} | {key: record[key] for key in record if key not in JSON_KEYS})


JSON_KEYS = (
    "run_id",
    "wall_s",
    "stages",
    "overhead_share",
    "peak_rss_bytes",
    "model",
    "bento",
    "report",
    "verdict",
)


def _summary(record: dict[str, Any]) -> None:
    from pathlib import Path

    from couturier.components.console import seconds, size, stderr_console

    console = stderr_console()
    made = [name for name, stage in record["stages"].items() if not stage["reused"]]
    model = record["model"]
    workspace = Path(record["workspace"])
    console.print()
    console.print(
        f"[bold]{model['name']} version {model['version']}[/bold] ({model['alias'] or 'no alias'}), "
        f"verdict: {record['verdict']}"
    )
    for reason in record["gate"].get("reasons", [])[:4]:
        console.print(f"  {reason}", markup=False)
    console.print(
        f"{seconds(record['wall_s'])} in all: {seconds(record['learning_s'])} codec, judge, SFT, RL and evaluation; "
        f"{record['overhead_share']:.0%} everything around it. Memory at most {size(record['peak_rss_bytes'])}. "
        f"{len(made)} of {len(record['stages'])} stages made, the others reused."
    )
    rows = [
        ("report", record["report"]),
        ("bento", f"{record['bento']}  (in {workspace / 'bentoml'})"),
        ("MLflow", f"run {record['run_id']}  (in {workspace / 'mlflow'})"),
        ("Prefect", f"{workspace / 'prefect'}"),
    ]
    for name, where in rows:
        console.print(f"  {name:<8} {where}", markup=False)
    next_verbs = ("couturier report latest", "couturier generate --user ID", "couturier up")
    console.print("Next: " + " · ".join(f"[bold]{verb}[/bold]" for verb in next_verbs))


def runs(
    limit: Annotated[int, typer.Option(min=1, help="How many of the newest.")] = 20,
    json: Json = False,
) -> None:
    """List retraining runs, newest first.

    Example: `couturier runs --limit 5`
    """
    from couturier.components.console import seconds, table
    from couturier.components.lineage.workspace import Workspace
    from couturier.flows import records

    workspace = Workspace.find()
    found = records.all_runs(workspace)[:limit]
    if json:
        emit({"runs": found})
        return
    if not found:
        out().print(f"No runs in {workspace.root} yet. `couturier retrain` makes the first.", markup=False)
        return
    rows = [
        (
            run["run_id"][:12],
            run["started_at"][:19].replace("T", " "),
            run["recipe"],
            run["status"],
            seconds(run["wall_s"]) if "wall_s" in run else "",
            f"v{run['model']['version']}" if "model" in run else "",
            run.get("verdict", ""),
        )
        for run in found
    ]
    out().print(table("", ("run", "started (UTC)", "recipe", "status", "took", "model", "verdict"), rows, left=4))


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run id, its beginning, or `latest`.")] = "latest",
    json: Json = False,
) -> None:
    """Show what a run proved: every model and every control in one table, with 95 % intervals over users.

    Examples: \\
    `couturier report latest` \\
    `couturier report 3f2a --json`
    """
    from pathlib import Path

    from couturier.components.files import read_json
    from couturier.components.lineage.stages import ArtifactStore
    from couturier.components.lineage.workspace import Workspace
    from couturier.flows import records

    workspace = Workspace.find()
    record = records.find(workspace, run, finished=True)
    artifact = ArtifactStore(workspace).open(record["stages"]["evaluate"]["id"])
    proof = read_json(artifact.path / "table.json")
    page: Path = artifact.path / "report.html"
    if json:
        emit({"run_id": record["run_id"], **proof, "report": str(page)})
        return
    _show_table(proof)
    out().print(f"\nPictures, curves and how to read this: {page}", markup=False)


# The order in which rows answer each other: ours, what else it could be, what needs no model, what bounds it.
ROWS = (
    "grpo", "sft", "sft_guided", "best_of_n", "unconditional", "wrong_user", "copy_favourites", "copy_last",
    "popularity", "nearest_item", "random_item", "oracle",
)  # fmt: skip
SHOWN = ("basket_precision", "hit@10", "ndcg@10", "sim_next", "diversity", "novelty", "validity")
JUDGED = ("gauc", "gauc_wrong_user", "gauc_popularity", "difference")
WIDE = 185


def _show_table(proof: dict[str, Any]) -> None:
    from couturier.components.console import table

    screen = out()
    wide = screen.width >= WIDE
    found = proof["table"]
    order = [*(name for name in ROWS if name in found), *(name for name in found if name not in ROWS)]
    shown = SHOWN if wide else tuple(metric for metric in SHOWN if metric != "sim_next")
    rows = [(name, *(_interval(found[name].get(metric), wide=wide) for metric in shown)) for name in order]
    title = "Mean [95 % interval over users]" if wide else f"Means over users; intervals with --json or {WIDE} columns"
    names = shown if wide else ("basket", *shown[1:])
    screen.print(table(title, ("", *names), rows))
    if not wide:
        screen.print("basket: basket_precision, the share of pictures that are items of the true next basket")
    judge = proof.get("judge", {})
    if judge:
        said = ", ".join(f"{name} {_bounded(judge, name)}" for name in JUDGED if name in judge)
        screen.print(f"\njudge: {said}", markup=False)


def _bounded(figures: dict[str, Any], name: str) -> str:
    """A figure whose interval stands beside it as ``_low`` and ``_high``."""
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    return _interval(figures[name] if low is None else [figures[name], low, high])


def _interval(value: Any, *, wide: bool = True) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        mean, low, high = value
        return f"{mean:.3f}" if low is None or high is None or not wide else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
