"""Compare judges on one's own data: the same log, the same held-out events, the same figures, side by side.

    validate, sequences ─▶ comparison-log (streamable log, what the eyes see) ─┬▶ comparison-fit, one a judge ─┐
                                                                               └▶ popularity, own favourites ──┴▶ table

Each fit is a stage of its own in the artifact store: what was fitted before is reused, a killed fit goes on. A user's
last event is the test and the one before it validation; nothing is chosen by the test.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file

from couturier.components.data.formats import EVENTS, Catalogue
from couturier.components.errors import ConfigError
from couturier.components.evaluation.statistics import bootstrap, paired_difference
from couturier.components.files import write_json, written_beside
from couturier.components.interest.encoder import EncoderConfig
from couturier.components.interest.eyes import EyesFit
from couturier.components.interest.fit import content_of
from couturier.components.interest.held_out import HeldOut, Ranking
from couturier.components.interest.items import Content
from couturier.components.interest.judge import JUDGES, judge_class, save_judge
from couturier.components.interest.log import Log, Shard, write_log
from couturier.components.interest.log_fit import LogFitConfig, fit_log
from couturier.components.interest.sampling import Negatives
from couturier.components.lineage.checkpoints import Checkpoints
from couturier.components.lineage.provenance import code_commit
from couturier.components.lineage.stages import Artifact, ArtifactStore, Progress, Stage, StageContext
from couturier.components.runtime import threads

FIGURES = ("auc", "hit@10", "ndcg@10")
BASELINES = ("popularity", "own_favourites")
_REPEATS = 0.1


@dataclass(frozen=True, kw_only=True)
class LookConfig:
    """How the catalogue is looked at before any judge is fitted."""

    seed: int = 0
    threads: int = 1
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    vocabulary: int = 2048


@dataclass(frozen=True, kw_only=True)
class FitConfig(LogFitConfig):
    """How one judge is fitted and measured."""

    vocabulary: int = 2048
    test_negatives: int = 100
    """Drawn items that the item taken is ranked against for AUC."""
    test_users: int = 4096
    """At most so many users in the test, the same for every judge."""


def look(ctx: StageContext) -> None:
    """``validate``, ``sequences`` → ``log/``, ``looks.safetensors``: the log to stream and what the eyes see."""
    config: LookConfig = ctx.config
    catalogue = Catalogue.load(ctx.inputs["sequences"])
    log = write_log(ctx.inputs["validate"] / EVENTS, catalogue.item_ids, ctx.out / "log")
    with threads(config.threads):
        eyes = EyesFit(
            catalogue,
            config.encoder,
            seed=config.seed,
            checkpoints=Checkpoints(ctx.scratch / "eyes"),
            checkpoint_every=200,
            log=lambda values, step: ctx.tracker.metrics(values, step=step),
        )
        ctx.progress.start("eyes", config.encoder.steps, done=eyes.step, unit="steps")
        eyes.run(ctx.progress)
        ctx.progress.stop()
        save_file({"pictures_IP": eyes.views(1)[:, 0].contiguous()}, ctx.out / "looks.safetensors")
    ctx.facts.update({"users": log.users, "items": log.items, "events": log.events, "kinds": log.kinds})


def fit_one(ctx: StageContext) -> None:
    """``comparison-log``, ``sequences`` → ``judge/``, ``users.parquet``: a judge, and its figures for each user."""
    config: FitConfig = ctx.config
    log, content = _opened(ctx.inputs["log"], Catalogue.load(ctx.inputs["sequences"]), config.vocabulary)
    ctx.progress.start(config.model, config.steps, unit="steps")
    fitted = fit_log(log, content, config, scratch=ctx.scratch, progress=ctx.progress)
    ctx.progress.stop()
    held = HeldOut(log, "test", history=config.history, most_users=config.test_users, seed=config.seed)
    with threads(config.threads):
        ranking = held.rank(fitted.judge, skip_seen=config.skip_seen)
        negatives = Negatives("popularity", log.counts(config.holdout))
        auc_U = held.auc(fitted.judge, negatives, config.test_negatives, seed=config.seed)
    _figures(ranking, auc_U).write_parquet(ctx.out / "users.parquet")
    save_judge(fitted.judge, ctx.out / "judge", vocabulary=[""] * content.vocabulary)
    rate = fitted.examples / max(fitted.fit_s, 1e-9)
    ctx.facts.update(
        {
            "fit_s": round(fitted.fit_s, 2),
            "samples_a_s": round(rate, 1),
            "best_step": fitted.best_step,
            "valid": round(fitted.valid, 5),
            "parameters": sum(value.numel() for value in fitted.judge.parameters()),
        }
    )


def compare(
    store: ArtifactStore,
    validate: Artifact,
    sequences: Artifact,
    judges: Sequence[str],
    config: FitConfig,
    *,
    progress: Progress,
    looks: LookConfig | None = None,
) -> dict[str, Any]:
    """Fit and measure ``judges``; what ``couturier compare --json`` prints.

    ``table`` maps a row to its figures, each ``[mean, low, high]`` over users, fit seconds and histories a second;
    ``against_best`` has each row's paired difference to the best judge by NDCG@10.

    Raises:
        ConfigError: no such judge, or none.
    """
    if not judges:
        raise ConfigError(f"no judge to compare; name some of {', '.join(sorted(JUDGES))} with --judges.")
    for name in judges:
        judge_class(name)
    looked = store.materialise(
        Stage(
            name="comparison-log",
            run=look,
            config=looks or LookConfig(seed=config.seed, threads=config.threads),
            inputs={"validate": validate.id, "sequences": sequences.id},
        ),
        progress=progress,
    )
    log = Log(looked.path / "log")
    held = HeldOut(log, "test", history=config.history, most_users=config.test_users, seed=config.seed)
    repeats = held.repeat_share()
    config = replace(config, skip_seen=repeats < _REPEATS)
    frames, facts = {}, {}
    for name in judges:
        stage = Stage(
            name=f"comparison-fit-{name}",
            run=fit_one,
            config=replace(config, model=name),
            inputs={"log": looked.id, "sequences": sequences.id},
        )
        made = store.materialise(stage, progress=progress)
        frames[name] = pl.read_parquet(made.path / "users.parquet")
        facts[name] = {**made.facts, "artifact": made.id}
    for name, ranking in _baselines(log, held, config).items():
        frames[name] = _figures(ranking, None)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} torch threads",
        "commit": code_commit(),
        "seed": config.seed,
        "users": len(next(iter(frames.values()))),
        "items": log.items,
        "events": log.events,
        "repeat_share": round(repeats, 4),
        "seen_items_are_candidates": not config.skip_seen,
        **_table(frames, facts, list(judges), config.seed),
    }


def _table(
    frames: dict[str, pl.DataFrame], facts: dict[str, dict[str, Any]], judges: list[str], seed: int
) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {}
    for name, frame in frames.items():
        table[name] = {
            figure: bootstrap(frame[figure].to_numpy(), seed=seed).as_list()
            for figure in FIGURES
            if figure in frame.columns
        } | facts.get(name, {})
    best = max(judges, key=lambda name: float(table[name]["ndcg@10"][0]))
    top_U = frames[best]["ndcg@10"].to_numpy()
    against = {
        name: paired_difference(frame["ndcg@10"].to_numpy(), top_U, seed=seed).as_list()
        for name, frame in frames.items()
        if name != best
    }
    return {"best": best, "table": table, "against_best": against}


def _figures(ranking: Ranking, auc_U: np.ndarray | None) -> pl.DataFrame:
    columns = {"user": ranking.users_U, "hit@10": ranking.hit(10), "ndcg@10": ranking.ndcg(10), "rank": ranking.rank_U}
    return pl.DataFrame(columns if auc_U is None else columns | {"auc": auc_U})


def _opened(folder: Path, catalogue: Catalogue, vocabulary: int) -> tuple[Log, Content]:
    pictures_IP = load_file(folder / "looks.safetensors")["pictures_IP"]
    log = Log(folder / "log")
    content = content_of(catalogue, vocabulary, pictures_IP, None)
    return log, replace(content, counts_I=torch.from_numpy(log.counts(2).astype(np.float32)))


def _baselines(log: Log, held: HeldOut, config: FitConfig) -> dict[str, Ranking]:
    """What no judge is needed for: what everyone takes, and what this user took most often."""
    counts_I = log.counts(config.holdout).astype(np.float64)

    def popular(shard: Shard, users: np.ndarray, target: np.ndarray) -> np.ndarray:
        return np.tile(counts_I, (len(users), 1))

    def favourite(shard: Shard, users: np.ndarray, target: np.ndarray) -> np.ndarray:
        scores_UI = np.tile(counts_I / (counts_I.sum() + 1), (len(users), 1))
        owner, items = held.taken_before(shard, users, target)
        np.add.at(scores_UI, (owner, items), 1.0)
        return scores_UI

    by = {"popularity": popular, "own_favourites": favourite}
    return {name: held.rank_by(scores, skip_seen=config.skip_seen) for name, scores in by.items()}


def write_comparison(found: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """``comparison.json`` and ``comparison.png``: a bar a row with its interval, and the time each fit took."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", found)
    rows = sorted(found["table"], key=lambda name: found["table"][name]["ndcg@10"][0])
    figure = Figure(figsize=(9, 1 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, name in zip(axes, ("ndcg@10", "auc", "fit_s"), strict=True):
        for place, row in enumerate(rows):
            value = found["table"][row].get(name)
            if value is None:
                continue
            colour = "#9ca3af" if row in BASELINES else "#2563eb"
            if isinstance(value, list):
                mean, low, high = value
                axis.barh(place, mean, color=colour)
                axis.plot([low, high], [place, place], color="#16181d", linewidth=1.5)
            else:
                axis.barh(place, value, color=colour)
        axis.set_title({"ndcg@10": "NDCG@10", "auc": "AUC, popularity-matched", "fit_s": "seconds to fit"}[name])
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlim(left=0.4)
    axes[0].set_yticks(range(len(rows)), rows)
    picture = folder / "comparison.png"
    with written_beside(picture) as beside:
        figure.savefig(beside, dpi=120, format="png")
    return folder / "comparison.json", picture
