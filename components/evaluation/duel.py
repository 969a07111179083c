"""Stage ``duel``: the champion draws for the candidate's test users, at the same windows with the same seeds.

It is measured exactly as the candidate was: on the candidate's catalogue, with its judge, by the same encoder. A
champion that was trained on another catalogue is told the histories in its own item numbers; items it never knew are
left out of what it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from couturier.components.data.formats import Catalogue, Windows
from couturier.components.evaluation import evaluate
from couturier.components.evaluation.encoder import AttributeReader
from couturier.components.evaluation.evaluate import PER_USER, long_form
from couturier.components.evaluation.metrics import Ruler
from couturier.components.evaluation.protocol import Plan, World
from couturier.components.files import read_json
from couturier.components.generator.types import load_generator
from couturier.components.lineage.stages import MANIFEST, StageContext
from couturier.components.runtime import threads

ROW = "champion"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to set: users, windows, pictures and seeds are those of the candidate's evaluation."""


def run(ctx: StageContext) -> None:
    """``evaluate``, ``sequences``, ``judge`` of the candidate and ``rl``, ``tokenise``, ``champion_sequences`` of the
    champion → ``per_user.parquet`` with row ``champion``; facts: its basket precision."""
    config = evaluate.Config(**read_json(ctx.inputs["evaluate"] / MANIFEST)["config"])
    catalogue = Catalogue.load(ctx.inputs["sequences"])
    plan = Plan.of(
        Windows.load(ctx.inputs["sequences"], "test"),
        seed=config.seed,
        windows_per_user=config.windows_per_user,
        max_users=config.max_users,
    )
    drawn = ctx.scratch / "drawn"
    drawn.mkdir(parents=True, exist_ok=True)
    ctx.progress.start("duel", len(plan), unit="windows")
    with threads(config.threads):
        world = World(
            catalogue,
            plan,
            tokenise=ctx.inputs["tokenise"],
            judge=ctx.inputs["judge"],
            pictures=config.pictures,
            batch=config.batch,
            drawn=drawn,
            advance=ctx.progress.advance,
        )
        ruler = Ruler(world.finder, AttributeReader(world.finder, catalogue, seed=config.seed), catalogue)
        theirs = Catalogue.load(ctx.inputs["champion_sequences"])
        histories = in_their_numbers(plan.favourites_VK, catalogue.item_ids, theirs.item_ids)
        champion = load_generator(ctx.inputs["rl"] / "model")
        rows_Vn = world.look(world.draw(ROW, champion, favourites_VK=histories))
        found = ruler.measure(rows_Vn, world.truth, world.liking.of(rows_Vn))
    ctx.progress.stop()
    long_form(ROW, found, plan).write_parquet(ctx.out / PER_USER)
    means = {metric: float(values.mean()) for metric, values in found.items() if np.isfinite(values).all()}
    ctx.tracker.metrics({f"{ROW}/{metric}": value for metric, value in means.items()}, step=0)
    ctx.facts.update({"windows": len(plan), "champion_basket_precision": round(means["basket_precision"], 5)})


def in_their_numbers(favourites_VK: np.ndarray, ours: list[str], theirs: list[str]) -> np.ndarray:
    """Histories in our item indices → in theirs, by item id; unknown items are left out, what stays closes up.

    Example:
        >>> in_their_numbers(np.array([[0, 1, 2]]), ["a", "b", "c"], ["c", "a"])
        array([[ 1,  0, -1]])
    """
    index = {item: i for i, item in enumerate(theirs)}
    translated = np.array([*(index.get(item, -1) for item in ours), -1])  # the last place is what -1 points at
    found_VK = translated[favourites_VK]
    order_VK = np.argsort(found_VK < 0, axis=1, kind="stable")
    return np.take_along_axis(found_VK, order_VK, axis=1)
