"""Verbs around the model in use: ``generate``, ``serve``, ``up``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from couturier.flows.cli_base import Json, emit, need, out

Model = Annotated[str, typer.Option("--model", help="A version number, champion, challenger or latest.")]


def add_to(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(serve)
    app.command()(up)


def generate(
    user: Annotated[str, typer.Option(help="Whose next item to draw.")] = "",
    history: Annotated[str, typer.Option(help="Instead of a user: item ids, favourite first, with commas.")] = "",
    n: Annotated[int, typer.Option("--n", help="How many pictures.")] = 8,
    guidance: Annotated[float, typer.Option(help="0 ignores the history, 1 follows it, above 1 more strongly.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Below 1 safer, above 1 more varied.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same pictures.")] = 0,
    likeliest: Annotated[
        bool,
        typer.Option(
            "--likeliest", help="The likeliest pictures, all different, the surest first, instead of random draws."
        ),
    ] = False,
    new: Annotated[
        bool, typer.Option("--new", help="The likeliest pictures that are none of the history's own items.")
    ] = False,
    folder: Annotated[Path, typer.Option("--out", help="Where to write the PNGs.")] = Path("pictures"),
    scale: Annotated[int, typer.Option(min=1, help="Screen pixels for each pixel drawn.")] = 4,
    model: Model = "champion",
    titles: Annotated[
        bool, typer.Option("--titles", help="Give each picture a title for this person, where the judge prefers one.")
    ] = False,
    writer: Annotated[
        str, typer.Option(help="Who proposes titles: phrases, smollm2, a language model's folder, or auto.")
    ] = "auto",
    json: Json = False,
) -> None:
    """Draw the next item for one person, in this process: a PNG each, and `grid.png` with the history above.

    Examples: \\
    `couturier generate --user 1023 --n 8 --out pictures` \\
    `couturier generate --history 17,204,9 --guidance 2` \\
    `couturier generate --user 1023 --n 10 --new` \\
    `couturier generate --user 1023 --titles`
    """
    need("mlflow", extra="train", verb="generate")
    from couturier.flows.generate import draw

    done = draw(
        user=user, history=history, n=n, guidance=guidance, temperature=temperature, seed=seed, folder=folder,
        scale=scale, model=model, titles=writer if titles else "",
        likeliest=likeliest, new=new,
    )  # fmt: skip
    if json:
        emit(done)
        return
    out().print(f"{len(done['pictures'])} pictures by {done['bento']} in {folder}:", markup=False)
    for picture in done["pictures"]:
        said = f"{picture['title']} (by {picture['titled_by']}); " if titles else ""
        name = Path(picture["path"]).name
        out().print(f"  {name}  {said}nearest item: {picture['nearest']['title']}", markup=False)
    out().print(f"History and pictures side by side: {done['grid']}", markup=False)
    out().print(done["attribution"], markup=False, style="dim")


def serve(
    port: Annotated[int, typer.Option(help="Port on loopback; 0 takes 3000 or, if that is busy, any free one.")] = 0,
    model: Model = "champion",
    json: Json = False,
) -> None:
    """Serve a model's bento on loopback until Ctrl-C: pictures, scores, feedback, a page to try it on.

    Example: `couturier serve --port 3000`
    """
    need("bentoml", extra="serve", verb="serve")
    from couturier.components.lineage.workspace import Workspace
    from couturier.flows import service as services

    workspace = Workspace.find()
    chosen = services.chosen_port(port, services.PORT, option="--port", purpose="the service")
    with services.model_service(workspace, services.version_in_use(workspace, model), chosen) as service:
        if json:
            emit({"url": service.url, "bento": service.tag, "boot_s": round(service.boot_s, 2)})
        else:
            out().print(f"{service.tag} answers on {service.url}; Ctrl-C stops it.", markup=False)
        service.wait()


def up(
    prefect_port: Annotated[int, typer.Option(help="0 takes 4200 or, if that is busy, any free one.")] = 0,
    mlflow_port: Annotated[int, typer.Option(help="0 takes 5000 or, if that is busy, any free one.")] = 0,
    port: Annotated[int, typer.Option(help="The service's; 0 takes 3000 or, if that is busy, any free one.")] = 0,
    schedule: Annotated[str, typer.Option(help="When to retrain, as cron; empty for never.")] = "0 3 * * *",
    recipe: Annotated[str, typer.Option(help="What the deployments retrain with.")] = "demo",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Replace one setting; repeat for more.")
    ] = None,
    json: Json = False,
) -> None:
    """Start everything on loopback: Prefect, MLflow, the deployments, the champion's service. Ctrl-C stops all of it.

    Retraining runs on a schedule, on demand from Prefect's page, and whenever `data.dvc` changes. The service follows
    the champion: a promotion or a rollback is served within seconds.

    Examples: \\
    `couturier up` \\
    `couturier up --schedule "0 */6 * * *" --prefect-port 4201`
    """
    need("prefect", extra="demo", verb="up")
    need("bentoml", extra="serve", verb="up")
    from couturier.flows.up import Ports, run_everything

    def ready(where: dict[str, str]) -> None:
        if json:
            emit(where)
            return
        for name in ("service", "prefect", "mlflow"):
            out().print(f"  {name:<8} {where[name]}", markup=False)
        out().print("Everything runs; Ctrl-C stops all of it.")

    ports = Ports(prefect=prefect_port, mlflow=mlflow_port, service=port)
    run_everything(ports, schedule=schedule, recipe=recipe, settings=settings or [], ready=ready)
