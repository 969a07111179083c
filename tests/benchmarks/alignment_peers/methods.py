"""Every way to align a generator, from one fine-tuned model, judged by one protocol.

    finished workspace ─▶ its sequences, codec, judge and fine-tuned model
        each method, each seed ─▶ stage rl ─▶ stage evaluate ─▶ a value a person and metric ─▶ means over seeds ─▶ table

The stages are the ones that ``couturier retrain`` runs, and what they make stays in the workspace: a comparison that
was killed goes on, and one method more costs that method only. ``base`` is the model before fine-tuning; ``sft``,
``best_of_n`` and ``sft_guided`` are rows of every evaluation, as the controls are. Equal compute is a matter of the
settings: ``--set METHOD:name=value``, with the processor seconds that each method took in the table. A method of
another family of generators has a fine-tuned model of its own, made here from the same sequences and codes; it is
compared with that one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from couturier.components.alignment import align, sft
from couturier.components.errors import ConfigError, DataError
from couturier.components.evaluation import evaluate
from couturier.components.evaluation.statistics import bootstrap, paired_difference
from couturier.components.files import read_json, sha256_of_json
from couturier.components.lineage.stages import MANIFEST, Artifact, ArtifactStore, Stage, StageContext
from couturier.components.lineage.workspace import Workspace
from couturier.flows import recipes

from . import ceiling

BASE, ALIGNED = "base", "grpo"
"""``ALIGNED`` is what the evaluation calls the row of stage ``rl``, whatever its method."""
_LIKELIEST = (
    "rl.distil.contrast=0",
    "rl.distil.contrast_new=0",
    "rl.distil.sharpness=1.5",
    "rl.distil.sharpness_new=1.5",
    "rl.prospect.hidden=32",
    "rl.prospect.windows=6000",
    "rl.prospect.others_share=0.05",
    "evaluate.beams=96",
)
VARIANTS = {
    "grpo_credit": ("grpo", ("rl.grpo.credit.kind=coupled",)),
    "grpo_random_credit": ("grpo", ("rl.grpo.credit.kind=random",)),
    "imitation_new": ("imitation", (*_LIKELIEST, "evaluate.new=true")),
    "dpo_none": ("dpo", ("rl.dpo.share=0.01", "rl.dpo.weight=0")),
    "dpo_1_percent": ("dpo", ("rl.dpo.share=0.01",)),
    "dpo_5_percent": ("dpo", ("rl.dpo.share=0.05",)),
}
"""Rows that are a method with one option turned: its name and settings. Those of ``dpo`` ask how much of the gain over
none is left when one sample in a hundred gets a pair (OneRec: as good as five). ``imitation_new`` imitates what will
be taken, not what this person takes oftener than others, with a prospect that knows what follows what, and shows its
ten likeliest pictures of what is new to the person, each once: equal novelty where nothing can be copied."""
FAMILIES = {"ppd": ("sft.generator.family=diffusion", "sft.lr=2e-3", "evaluate.best_of=1")}
"""Methods of another family than the workspace's: how it is fine-tuned, and what of its evaluation nobody reads."""
SHARED_ROWS = ("sft", "sft_guided", "best_of_n", "popularity", "copy_favourites", "nearest_item", "oracle")
FINE_TUNED_ROWS = ("sft", "sft_wrong_user", "unconditional", "sft_guided", "best_of_n")
"""What an evaluation draws from the model before alignment: the same for every method."""
AGAINST = ("wrong_user", "popularity_eq", "copy_favourites_eq", "nearest_item_eq")
"""Controls that belong to each aligned model: another person's pictures from it, and real items that are shown as much
anew, and repeated as much, as its own."""
PRECISION = "basket_precision"
METRICS = (PRECISION, "judge", "distinct_hits", "ndcg@10", "sim_next", "diversity", "copied", "mush")
INPUTS = ("sequences", "tokenise", "judge", "sft")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is compared."""

    workspace: Path
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: str = "demo"
    settings: tuple[str, ...] = ()
    """``name=value`` for all methods, ``METHOD:name=value`` for one."""


def known() -> tuple[str, ...]:
    """The methods there are."""
    return (BASE, *align.METHODS, *VARIANTS)


def compare(asked: Asked, say: Callable[[str], None]) -> dict[str, Any]:
    """``rows``: metric → ``[mean, low, high]`` over people, values averaged over seeds first; ``minus_sft`` likewise;
    ``against``: of each method, what its basket precision has over its own controls; ``ceiling``: of none;
    ``processor_s``: of each method's stage, mean over seeds; ``left_out``: methods that cannot run here, and why.

    Raises:
        ConfigError: a method nobody knows.
        DataError: the workspace holds no finished evaluation.
    """
    for method in asked.methods:
        if method not in known():
            raise ConfigError(f"method {method!r} is unknown; choose from {', '.join(known())}.")
    store = ArtifactStore(Workspace(project=asked.workspace, root=asked.workspace))
    inputs = finished(store)
    frames: dict[str, list[pl.DataFrame]] = {}
    against: dict[tuple[str, str], list[pl.DataFrame]] = {}
    spent: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}
    for method, seed in itertools.product(asked.methods, asked.seeds):
        if method in left_out:
            continue
        try:
            made, proof = run(store, inputs, asked, method, seed)
        except ConfigError as error:
            # A method may want another family of generators than the workspace holds.
            left_out[method] = str(error)
            say(f"left out: {method}: {error}")
            continue
        found = pl.read_parquet(proof.path / evaluate.PER_USER)
        frames.setdefault(method, []).append(found.filter(pl.col("row") == ALIGNED))
        for row in AGAINST:
            against.setdefault((method, row), []).append(found.filter(pl.col("row") == row))
        spent.setdefault(method, []).append(float(store.manifest(made.id)["processor_s"]))
        for row in ("sft",) if method in FAMILIES else SHARED_ROWS:
            frames.setdefault(own_row(row, method), []).append(found.filter(pl.col("row") == row))
        say(f"{method}, seed {seed}: {spent[method][-1]:.0f} s of processors")
    people = {row: by_person(parts) for row, parts in frames.items()}
    return {
        "rows": {
            row: {metric: interval(of, metric) for metric in METRICS if metric in of} for row, of in people.items()
        },
        "minus_sft": {
            row: {metric: difference(of, people[own_row("sft", row)], metric) for metric in METRICS if metric in of}
            for row, of in people.items()
            if row.partition(" of ")[0] != "sft"
        },
        "against": {
            method: {row: difference(people[method], by_person(against[method, row]), PRECISION) for row in AGAINST}
            for method in spent
        },
        "processor_s": {method: float(np.mean(all_)) for method, all_ in spent.items()},
        "ceiling": ceiling.ceiling(store, inputs, recipes.named(asked.recipe, []).rl.prospect, seed=asked.seeds[0]),
        "left_out": left_out,
        "inputs": inputs,
        "seeds": list(asked.seeds),
        "settings": list(asked.settings),
        "recipe": asked.recipe,
    }


def finished(store: ArtifactStore) -> dict[str, str]:
    """Ids of the stages behind the newest finished evaluation; one of a method of another family only if there is no
    other.

    Raises:
        DataError: there is none.
    """
    found = [read_json(path) for path in store.workspace.artifacts.glob(f"evaluate-*/{MANIFEST}")]
    if not found:
        raise DataError(
            f"{store.workspace.root} holds no finished evaluation; run `couturier retrain` with "
            "COUTURIER_WORKSPACE set to it, or give another --workspace."
        )

    def age(manifest: dict[str, Any]) -> tuple[bool, str]:
        family = store.manifest(manifest["inputs"]["sft"])["config"]["generator"]["family"]
        own = any(f"sft.generator.family={family}" in settings for settings in FAMILIES.values())
        return not own, str(manifest["made_at"])

    newest = max(found, key=age)
    return {name: str(newest["inputs"][name]) for name in INPUTS}


def run(
    store: ArtifactStore, inputs: dict[str, str], asked: Asked, method: str, seed: int
) -> tuple[Artifact, Artifact]:
    """The model that a method makes, and its evaluation; what the workspace has is not made again."""
    of, turned = VARIANTS.get(method, (method, ()))
    given = settings_of(method, asked.settings, of)
    plan = recipes.named(asked.recipe, [*given, *turned, *FAMILIES.get(of, ()), f"seed={seed}"])
    without_sft = {name: inputs[name] for name in INPUTS if name not in ("judge", "sft")}
    if method == BASE:
        untrained = dataclasses.replace(plan.sft, grounding_steps=0, steps=0)
        made = store.materialise(Stage(name="sft", run=sft.run, config=untrained, inputs=without_sft))
    else:
        if of in FAMILIES:
            other = recipes.named(asked.recipe, [*given, *FAMILIES[of]]).sft
            fine_tuned = store.materialise(Stage(name="sft", run=sft.run, config=other, inputs=without_sft))
            inputs = inputs | {"sft": fine_tuned.id}
        config = dataclasses.replace(plan.rl, method=of)
        made = store.materialise(Stage(name="rl", run=align.run, config=config, inputs=inputs))
    kept = store.workspace.scratch / f"drawn-{sha256_of_json([inputs, asdict(plan.evaluate)])[:16]}"
    evaluated = evaluate.run if method == BASE else sharing(evaluate.run, kept)
    proof = Stage(name="evaluate", run=evaluated, config=plan.evaluate, inputs=inputs | {"rl": made.id})
    return made, store.materialise(proof)


def own_row(row: str, method: str) -> str:
    """What a row of a method's evaluation is called among all: the fine-tuned model of another family is another.

    Example:
        >>> own_row("sft", "grpo"), own_row("sft", "ppd")
        ('sft', 'sft of ppd')
    """
    return f"{row} of {method}" if method in FAMILIES else row


def sharing(run: Callable[[StageContext], None], kept: Path) -> Callable[[StageContext], None]:
    """An evaluation that takes what the fine-tuned model drew for this seed from another method's evaluation."""

    @functools.wraps(run)
    def shared(ctx: StageContext) -> None:
        drawn = ctx.scratch / "drawn"
        for folder in (drawn, kept):
            folder.mkdir(parents=True, exist_ok=True)
        for name in (f"{row}.safetensors" for row in FINE_TUNED_ROWS):
            if (kept / name).exists() and not (drawn / name).exists():
                os.link(kept / name, drawn / name)
        run(ctx)
        for name in (f"{row}.safetensors" for row in FINE_TUNED_ROWS):
            if (drawn / name).exists() and not (kept / name).exists():
                os.link(drawn / name, kept / name)

    return shared


def settings_of(method: str, settings: Sequence[str], of: str = "") -> list[str]:
    """The settings that hold for a method, and for the one that it is a variant ``of``.

    Example:
        >>> settings_of("grpo", ["threads=1", "grpo:rl.grpo.steps=9", "ppd:rl.ppd.steps=9"])
        ['threads=1', 'rl.grpo.steps=9']
    """
    parted = [text.partition(":") for text in settings]
    return [tail if mark else head for head, mark, tail in parted if not mark or head in (method, of)]


def by_person(parts: list[pl.DataFrame]) -> dict[str, dict[str, float]]:
    """Metric → person → mean over windows and seeds."""
    whole = pl.concat(parts).filter(pl.col("value").is_finite())
    means = whole.group_by("metric", "user_id").agg(pl.col("value").mean()).sort("metric", "user_id")
    found: dict[str, dict[str, float]] = {}
    for metric, user, value in means.iter_rows():
        found.setdefault(metric, {})[user] = value
    return found


def interval(of: dict[str, dict[str, float]], metric: str) -> list[float]:
    """Mean over people with its interval."""
    return bootstrap(np.array(list(of[metric].values())), seed=0).as_list()


def difference(of: dict[str, dict[str, float]], other: dict[str, dict[str, float]], metric: str) -> list[float]:
    """Mean difference over the people of both, with its interval."""
    both = [user for user in of[metric] if user in other[metric]]
    a, b = (np.array([one[metric][user] for user in both]) for one in (of, other))
    return paired_difference(a, b, seed=0).as_list()


def write(found: dict[str, Any], facts: dict[str, Any], folder: Path) -> list[Path]:
    """``alignment.md``, ``alignment.json`` and ``alignment.png``."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    places = [folder / f"alignment.{kind}" for kind in ("md", "json", "png")]
    places[0].write_text(markdown(found, facts), encoding="utf-8")
    places[1].write_text(json.dumps(facts | found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    rows = found["rows"]
    figure = Figure(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), ("basket_precision", "judge"), strict=True):
        # The oracle's precision is 1 by definition; beside it all others would stand in one place.
        shown = [name for name in rows if metric in rows[name] and name != "oracle"]
        mean, low, high = (np.array([rows[name][metric][i] for name in shown]) for i in range(3))
        # A mean of ones may be a rounding error beyond its interval.
        axes.errorbar(mean, shown, xerr=np.maximum([mean - low, high - mean], 0), fmt="o")
        axes.set_xlabel(metric.replace("_", " "))
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(places[2], dpi=110)
    return places


def markdown(found: dict[str, Any], facts: dict[str, Any]) -> str:
    """The table with where it comes from."""
    seen = [metric for metric in METRICS if any(metric in row for row in found["rows"].values())]
    lines = [
        "# Ways to align one fine-tuned generator",
        "",
        f"{facts['date']}, {facts['machine']}, commit {facts['commit'][:12]}; recipe `{found['recipe']}`, seeds "
        f"{', '.join(map(str, found['seeds']))}; settings {', '.join(found['settings']) or 'as they are'}. Means over "
        "people with 95 % intervals; a person's values are averaged over windows and seeds first. Pictures are judged "
        "by an encoder that no reward saw.",
        "",
        "| row | processor s | " + " | ".join(seen) + " |",
        "|---|" + "---:|" * (1 + len(seen)),
    ]
    for name, values in found["rows"].items():
        cells = [_cell(values.get(metric)) for metric in seen]
        took = found["processor_s"].get(name)
        lines.append(f"| {name} | {'' if took is None else f'{took:.0f}'} | " + " | ".join(cells) + " |")
    lines += [f"\nLeft out: {name}: {why}" for name, why in found["left_out"].items()]
    lines += ["", "Less fine-tuning (`sft`; of another family its own), person by person:", ""]
    lines.append("| row | " + " | ".join(seen) + " |")
    lines.append("|---|" + "---:|" * len(seen))
    for name, values in found["minus_sft"].items():
        lines.append(f"| {name} | " + " | ".join(_cell(values.get(metric), sign="+") for metric in seen) + " |")
    lines += [
        "",
        "Basket precision of each method less its own controls: the pictures it draws for somebody else, and real "
        "items (by popularity, of the favourites, nearest to the history) as new to the person and as often repeated "
        "as its own:",
        "",
    ]
    lines += ["| row | " + " | ".join(AGAINST) + " |", "|---|" + "---:|" * len(AGAINST)]
    for name, values in found["against"].items():
        lines.append(f"| {name} | " + " | ".join(_cell(values[row], sign="+") for row in AGAINST) + " |")
    lines += ["", *ceiling.markdown(found["ceiling"])]
    return "\n".join([*lines, "", "Made by `tests/benchmarks/alignment.py`.", ""])


def _cell(found: list[float] | None, sign: str = "") -> str:
    if found is None:
        return ""
    mean, low, high = (f"{value:{sign}.3f}" for value in found)
    return f"{mean} [{low}, {high}]"
