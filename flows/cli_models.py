"""Verbs around model versions: ``models``, ``lineage``, ``promote``, ``rollback``."""

from __future__ import annotations

from typing import Annotated

import typer

from couturier.flows.cli_base import Json, Who, Why, emit, need, out


def add_to(app: typer.Typer) -> None:
    app.command()(models)
    app.command()(lineage)
    app.command()(promote)
    app.command()(rollback)


def models(json: Json = False) -> None:
    """List registered versions, newest first, and who is the champion.

    Example: `couturier models`
    """
    need("mlflow", extra="train", verb="models")
    from couturier.components.console import table
    from couturier.components.lineage.registry import Registry
    from couturier.components.lineage.workspace import Workspace

    workspace = Workspace.find()
    versions = Registry(workspace).versions()
    if json:
        emit({"models": [version.as_dict() for version in versions]})
        return
    if not versions:
        out().print(f"No versions in {workspace.root} yet. `couturier retrain` makes the first.", markup=False)
        return
    rows = [
        (
            f"v{version.number}",
            ", ".join(version.aliases),
            version.created_at[:19].replace("T", " "),
            version.recipe,
            version.verdict or "",
            version.bento,
        )
        for version in versions
    ]
    out().print(table("", ("version", "alias", "registered (UTC)", "recipe", "verdict", "bento"), rows, left=6))


def lineage(
    what: Annotated[str, typer.Argument(help="A version, champion, latest, a run id or an artifact id.")] = "champion",
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Draw it as a Mermaid diagram.")] = False,
    json: Json = False,
) -> None:
    """Tell where a model comes from: data, code, settings, runs, verdicts.

    Examples: \\
    `couturier lineage champion` \\
    `couturier lineage 3 --mermaid`
    """
    need("mlflow", extra="train", verb="lineage")
    from couturier.components.lineage.lineage_view import as_mermaid, as_text
    from couturier.components.lineage.lineage_view import lineage as look_up
    from couturier.components.lineage.workspace import Workspace

    record = look_up(Workspace.find(), what)
    if json:
        emit(record)
    else:
        out().print(as_mermaid(record) if mermaid else as_text(record), markup=False)


def promote(
    version: Annotated[str, typer.Argument(help="A version number, latest or challenger.")] = "latest",
    force: Annotated[bool, typer.Option(help="Overrule the gate; needs --why and goes on record.")] = False,
    recipe: Annotated[str, typer.Option(help="Whose gate settings to use.")] = "demo",
    who: Who = None,
    why: Why = "",
    json: Json = False,
) -> None:
    """Ask the gate about a version and make it the champion if it has earned it.

    Examples: \\
    `couturier promote` \\
    `couturier promote 3 --force --why "the champion draws fuel"`
    """
    need("prefect", extra="train", verb="promote")
    from couturier.flows import launch

    done = launch.promote(version, who=who, why=why, force=force, recipe=recipe)
    if json:
        emit(done)
    else:
        out().print(done["sentence"], markup=False)


def rollback(who: Who = None, why: Why = "", json: Json = False) -> None:
    """Make the champion before this one the champion again.

    Example: `couturier rollback --why "complaints since noon"`
    """
    need("prefect", extra="train", verb="rollback")
    from couturier.flows import launch

    done = launch.rollback(who=who, why=why)
    if json:
        emit(done)
    else:
        out().print(done["sentence"], markup=False)
