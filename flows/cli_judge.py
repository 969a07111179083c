"""The verb ``explain``: what of a person's history speaks for an item or a picture."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from couturier.flows.cli_base import Json, emit, need, out


def add_to(app: typer.Typer) -> None:
    app.command()(explain)


def explain(
    user: Annotated[str, typer.Argument(help="Whose history to read.")],
    items: Annotated[str, typer.Option(help="Item ids with commas; without them, the next pictures are drawn.")] = "",
    n: Annotated[int, typer.Option("--n", help="How many pictures to draw where no items are named.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the pictures, as in `couturier generate`.")] = 0,
    top: Annotated[int, typer.Option(help="How many history items to name for each.")] = 5,
    concept: Annotated[str, typer.Option(help="Attribute that names where an interest stands (multimodal).")] = "",
    model: Annotated[str, typer.Option("--model", help="A version number, champion, challenger or latest.")] = (
        "champion"
    ),
    json: Json = False,
) -> None:
    """Tell why a model's judge would show a person an item, or the next picture that the model draws.

    A contribution is the score less the score without that history item, in standard deviations over random pairs of
    a person and a picture. With the judge `multimodal`: what picture and words each add, and how the interest moved.

    Examples: \\
    `couturier explain 1023` \\
    `couturier explain 1023 --items 17,204 --top 3 --json`
    """
    need("mlflow", extra="train", verb="explain")
    from couturier.flows.explain import explain as work

    found = work(user=user, items=items, n=n, seed=seed, top=top, concept=concept, model=model)
    if json:
        emit(found)
        return
    out().print(f"User {found['user']}, judge {found['judge']}, {found['history']} favourites.", markup=False)
    for candidate in found["candidates"]:
        _told(candidate)
    if "interest" in found:
        _moved(found["interest"])


def _told(candidate: dict[str, Any]) -> None:
    near = candidate.get("nearest")
    name = f"a picture like {near['title']}" if near else f"{candidate['title']} ({candidate['item_id']})"
    out().print(f"\n{name}: {candidate['score']:+.2f} SD", markup=False)
    for reason in candidate["because"]:
        line = f"  {reason['contribution']:+.3f}  {reason['title']}, {reason['age_days']:.0f} days ago"
        out().print(line, markup=False)
    for modality, said in candidate.get("modalities", {}).items():
        line = f"  {said['adds']:+.3f}  {modality}, in it (weight {said['weight']:.2f}) and in the history"
        out().print(line, markup=False)


def _moved(interest: dict[str, Any]) -> None:
    from couturier.components.console import table

    rows = [
        (
            step["title"],
            f"{step['age_days']:.0f}",
            f"{step['share']:.3f}",
            f"{step['drift']:.3f}",
            step["nearest"] or "",
        )
        for step in interest["trace"]
    ]
    nearest = f"nearest {interest['concept']}" if interest["concept"] else "nearest"
    out().print("\nHow the interest moved, oldest first:", markup=False)
    out().print(table("", ("item", "days ago", "share", "drift", nearest), rows))
