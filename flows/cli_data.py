"""Verbs around data: ``doctor``, ``ingest``, ``validate``, ``data push|pull|status``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from couturier.flows.cli_base import Json, emit, need, out

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Replace one setting; repeat for more.")
]
Remote = Annotated[str, typer.Argument(help="A remote's name, a URL or a folder; DVC's default remote if empty.")]

versions = typer.Typer(no_args_is_help=True, help="Share versions of `data/` through a DVC remote.")


def add_to(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command()(ingest)
    app.command()(validate)
    app.add_typer(versions, name="data")


def doctor(json: Json = False) -> None:
    """Check that this machine has what a run needs: packages, disk, memory, ports, a workspace that can be written.

    Example: `couturier doctor`
    """
    from couturier.flows.doctor import examine

    checks = examine()
    bad = [check for check in checks if check.state == "bad"]
    if json:
        emit({"ok": not bad, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        marks = {"good": "[green]✓[/green]", "note": "[yellow]![/yellow]", "bad": "[red]✗[/red]"}
        for check in checks:
            out().print(f"{marks[check.state]} {check.name:<12} {check.seen}")
            if check.mend:
                out().print(f"  {'':<12} {check.mend}", markup=False)
    if bad:
        raise typer.Exit(1)


def ingest(
    adapter: Annotated[str, typer.Option(help="complete-journey, files or movielens.")] = "complete-journey",
    events: Annotated[str, typer.Option(help="files: events table (.parquet, .csv, .jsonl).")] = "",
    items: Annotated[str, typer.Option(help="files: items table (.parquet, .csv, .jsonl).")] = "",
    users: Annotated[str, typer.Option(help="files: users table; made from the events if empty.")] = "",
    pictures: Annotated[str, typer.Option(help="files: folder that picture paths are relative to.")] = "",
    folder: Annotated[str, typer.Option(help="complete-journey, movielens: folder with the data set's files.")] = "",
    picture_size: Annotated[int, typer.Option(help="Height and width of pictures, pixels.")] = 32,
    max_users: Annotated[int, typer.Option(help="Keep this many users, the same ones everywhere; 0 keeps all.")] = 0,
    feedback: Annotated[bool, typer.Option("--feedback", help="Join the events that the service collected.")] = False,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Fill `data/` through an adapter and give it a version in `data.dvc`.

    The same input gives the same bytes on any machine. What an adapter read before, it does not read again.

    Examples: \\
    `couturier ingest` \\
    `couturier ingest --adapter files --events clicks.csv --items shop.parquet --pictures photos` \\
    `couturier ingest --adapter movielens --folder ml-1m` \
    `couturier ingest --feedback`   (what people did since, as the service noted it)
    """
    need("dvc", extra="demo", verb="ingest")
    from couturier.components.console import ConsoleProgress, size
    from couturier.components.data import ingest as ingestion
    from couturier.components.data import versioning
    from couturier.components.lineage.workspace import Workspace
    from couturier.flows.overrides import override

    workspace = Workspace.find()
    chosen = override(
        ingestion.Config(
            adapter=adapter,
            events=events,
            items=items,
            users=users,
            pictures=pictures,
            folder=folder,
            picture_size=picture_size,
            max_users=max_users,
            feedback=str(workspace.feedback) if feedback else "",
        ),
        settings or [],
    )
    facts = ingestion.ingest(chosen.adapter, chosen, workspace, ConsoleProgress())
    version = versioning.version_data(workspace)
    if json:
        emit({**facts, "version": version.md5, "changed": version.changed, "folder": str(workspace.data)})
        return
    done = "lies there already" if facts["reused"] else "written"
    counts = ", ".join(f"{count:,} {table}" for table, count in facts["rows"].items())
    out().print(f"{workspace.data}: {counts}; {size(facts['bytes'])}, {done}.", markup=False)
    for warning in facts["warnings"]:
        out().print(f"  note: {warning}", markup=False)
    out().print(f"data.dvc: {version.md5} ({'changed' if version.changed else 'as before'})", markup=False)
    out().print("Next: couturier validate")


def validate(
    recipe: Annotated[str, typer.Option(help="Whose contract settings to use.")] = "demo",
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Hold `data/` to the contract: what breaks a rule is quarantined, too much of it stops here.

    Examples: \\
    `couturier validate` \\
    `couturier validate --set contract.min_users=50`
    """
    need("great_expectations", extra="demo", verb="validate")
    from couturier.components.console import ConsoleProgress, seconds, table
    from couturier.components.data import contract, versioning
    from couturier.components.lineage.stages import ArtifactStore, Stage
    from couturier.components.lineage.workspace import Workspace
    from couturier.flows import recipes

    workspace = Workspace.find()
    plan = recipes.named(recipe, settings or [])
    version = versioning.version_data(workspace)
    stage = Stage(name="validate", run=contract.run, config=plan.contract, external={"data": version.md5})
    artifact = ArtifactStore(workspace).materialise(stage, progress=ConsoleProgress())
    summary = contract.contract_summary(artifact.facts)
    docs = artifact.path / "docs" / "index.html"
    if json:
        emit(
            {
                "id": artifact.id,
                "reused": artifact.reused,
                "s": round(artifact.seconds, 3),
                "tables": {row["table"]: {key: row[key] for key in row if key != "table"} for row in summary},
                "warnings": artifact.facts["warnings"],
                "docs": str(docs),
            }
        )
        return
    rows = [
        (row["table"], f"{row['raw']:,}", f"{row['kept']:,}", f"{row['quarantined']:,}", row["rules"])
        for row in summary
    ]
    out().print(table("", ("table", "raw", "kept", "quarantined", "rules that failed"), rows))
    out().print("kept + quarantined = raw for every table.", markup=False)
    for warning in artifact.facts["warnings"]:
        out().print(f"  warning: {warning}", markup=False)
    took = "found as an earlier run left it" if artifact.reused else f"took {seconds(artifact.seconds)}"
    out().print(f"Data Docs: {docs} ({took})", markup=False)


@versions.command()
def push(remote: Remote = "", json: Json = False) -> None:
    """Copy the version that `data.dvc` names to a remote.

    Examples: `couturier data push ../shared-data`, `couturier data push s3://bucket/data`
    """
    _moved("push", remote, json=json)


@versions.command()
def pull(
    remote: Remote = "",
    force: Annotated[bool, typer.Option(help="Overwrite files in data/ that no version holds.")] = False,
    json: Json = False,
) -> None:
    """Bring the version that `data.dvc` names from a remote into `data/`.

    Example: `couturier data pull ../shared-data`
    """
    _moved("pull", remote, json=json, force=force)


def _moved(verb: str, remote: str, *, json: bool, **options: Any) -> None:
    need("dvc", extra="train", verb=f"data {verb}")
    from couturier.components.data import versioning
    from couturier.components.lineage.workspace import Workspace

    moved = {"push": versioning.push, "pull": versioning.pull}[verb](Workspace.find(), remote, **options)
    if json:
        emit({"files": moved, "remote": remote})
        return
    done = "sent" if verb == "push" else "fetched"
    out().print(f"{moved} files {done}." if moved else "Nothing to do: both sides hold the same version.")


@versions.command()
def status(json: Json = False) -> None:
    """Tell how `data/` stands to `data.dvc`.

    Example: `couturier data status`
    """
    need("dvc", extra="train", verb="data status")
    from couturier.components.data import versioning
    from couturier.components.lineage.workspace import Workspace

    workspace = Workspace.find()
    state, version = versioning.status(workspace), versioning.recorded(workspace)
    if json:
        emit({"status": state, "md5": version.md5 if version else None, "folder": str(workspace.data)})
        return
    out().print(f"{workspace.data}: {state}" + (f", version {version.md5}" if version else ""), markup=False)
