"""Stage ``judge``: fit a user-interest model on what people took next, against what is as popular but was not taken.

    pictures ─▶ eyes (attribute heads) ─▶ embeddings of the catalogue, clean and degraded ┐
    train windows ─▶ history, positives, popularity-matched negatives ────────────────────┴▶ judge ─▶ valid GAUC stops

Which judge is one word (``judge.model``); each has settings of its own name.

Letters: W windows, U windows of a step, C candidates, I items, A views, P picture width, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import polars as pl
import torch
from torch import Tensor

from couturier.components.data.formats import Catalogue, Windows
from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.encoder import EncoderConfig, TileEncoder, vocabulary_of, word_bags
from couturier.components.interest.eyes import EyesFit
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judge import (
    JudgeSettings,
    history_batch,
    judge_class,
    make_judge,
    save_judge,
)
from couturier.components.interest.loop import FitLoop, LoopConfig
from couturier.components.interest.metrics import Popularity, trial, user_auc
from couturier.components.interest.proof import prove, scores_of
from couturier.components.interest.transitions import window_transitions
from couturier.components.interest.window_examples import WindowConfig, WindowExamples
from couturier.components.lineage.checkpoints import Checkpoints
from couturier.components.lineage.stages import StageContext
from couturier.components.runtime import global_seed, seeded_numpy, threads


@dataclass(frozen=True, kw_only=True)
class Config(JudgeSettings, WindowConfig, LoopConfig):
    """How a judge is fitted."""

    threads: int = 2
    model: str = "attention"
    """A name in ``JUDGES``."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    vocabulary: int = 2048
    """The most frequent words of the catalogue that get an embedding."""
    views: int = 4
    """A, looks at each picture that candidates are drawn from in training: one clean, the others degraded."""
    eval_negatives: int = 64
    """Negatives of a window in the metrics."""
    calibration_users: int = 512

    def __post_init__(self) -> None:
        WindowConfig.__post_init__(self)
        LoopConfig.__post_init__(self)
        judge_class(self.model)
        for name in ("eval_negatives", "views", "calibration_users"):
            if vars(self)[name] < 1:
                raise ConfigError(f"judge.{name} is {vars(self)[name]}; it must be at least 1.")


def run(ctx: StageContext) -> None:
    """``sequences`` → ``judge/``, ``curves.parquet``; facts: the GAUCs on test windows, picture-only."""
    config: Config = ctx.config
    with threads(config.threads):
        fitter = _Fitter(ctx, config)
        judge = fitter.fit()
        fitter.calibrate(judge)
        ctx.facts.update(fitter.facts(judge))
    save_judge(judge, ctx.out / "judge", vocabulary=fitter.vocabulary)
    schema = {"step": pl.Int64, "name": pl.String, "value": pl.Float64}
    pl.DataFrame(fitter.curves, schema=schema, orient="row").write_parquet(ctx.out / "curves.parquet")
    ctx.tracker.file(ctx.out / "curves.parquet")


def reading_of(catalogue: Catalogue, limit: int) -> tuple[list[str], Tensor, Tensor]:
    """``(vocabulary, word ids, offsets)`` of a catalogue's titles and texts."""
    texts = [" ".join(filter(None, row)) for row in catalogue.items.select("title", "text").rows()]
    vocabulary = vocabulary_of(texts, limit=limit)
    return vocabulary, *word_bags(texts, vocabulary)


def content_of(catalogue: Catalogue, limit: int, pictures_IP: Tensor, eyes: TileEncoder | None) -> Content:
    """What a judge is given of a catalogue."""
    vocabulary, word_ids, word_offsets = reading_of(catalogue, limit)
    return Content(
        pictures_IP=pictures_IP,
        word_ids=word_ids,
        word_offsets=word_offsets,
        vocabulary=len(vocabulary),
        counts_I=torch.from_numpy(catalogue.items["purchases"].to_numpy().astype(np.float32)),
        eyes=eyes,
    )


class _Fitter:
    """The stage's parts: steps 0 to ``encoder.steps`` train the eyes, those after it the judge."""

    def __init__(self, ctx: StageContext, config: Config) -> None:
        self.ctx, self.config = ctx, config
        folder = ctx.inputs["sequences"]
        self.catalogue = Catalogue.load(folder)
        self.windows = {split: Windows.load(folder, split) for split in ("train", "valid", "test")}
        self.popularity = Popularity(self.windows["train"], len(self.catalogue))
        self.vocabulary, _, _ = reading_of(self.catalogue, config.vocabulary)
        shown = seeded_numpy(config.seed, "judge", "trial", "valid")
        self.valid_trial = trial(
            self.windows["valid"], self.popularity, len(self.catalogue), config.eval_negatives, shown
        )
        self.curves: list[tuple[int, str, float]] = []
        self.best = (0.0, 0)

    def fit(self) -> ContentJudge:
        """Train the eyes, then the judge, until the last step or until validation says enough."""
        config, progress = self.config, self.ctx.progress
        checkpoints = self.ctx.scratch / "checkpoints"
        eyes = EyesFit(
            self.catalogue,
            config.encoder,
            seed=config.seed,
            checkpoints=Checkpoints(checkpoints / "eyes"),
            checkpoint_every=config.checkpoint_every,
            log=self._log,
        )
        if eyes.step == 0:
            self.ctx.tracker.params(asdict(config))
        judging = Checkpoints(checkpoints / "judge")
        begun = judging.newest()
        total = config.encoder.steps + config.steps
        progress.start("judge", total, done=begun.step if begun else eyes.step, unit="steps")
        encoder = eyes.run(progress)
        views_IAP = eyes.views(config.views)
        self.accuracy = eyes.accuracy(views_IAP[:, 0])
        loop = FitLoop(
            self._new_judge(views_IAP, encoder),
            WindowExamples(config, self.windows["train"], self.popularity, views_IAP, seed=config.seed),
            self._valid_gauc,
            config,
            checkpoints=judging,
            first=config.encoder.steps,
            progress=progress,
            log=self._log,
        )
        judge = loop.run()
        progress.stop()
        self.curves, self.best = eyes.curves + loop.curves, (max(0.0, loop.best_figure), loop.best_step)
        return judge

    def _new_judge(self, views_IAP: Tensor, encoder: TileEncoder) -> ContentJudge:
        config = self.config
        content = content_of(self.catalogue, config.vocabulary, views_IAP[:, 0].contiguous(), encoder)
        with global_seed(config.seed, "judge", "model"):
            judge = make_judge(config.model, config.settings_of(config.model), config.features, content)
        if judge.wants_transitions:
            judge.transitions = window_transitions(self.windows["train"], items=len(self.catalogue))
        return judge

    def _valid_gauc(self, judge: ContentJudge) -> float:
        valid = self.windows["valid"]
        return user_auc(scores_of(judge, valid, self.valid_trial), self.valid_trial, valid.user_W).gauc

    @torch.no_grad()
    def calibrate(self, judge: ContentJudge) -> None:
        """Set the judge's unit: mean and SD over pairs of a train window and a random catalogue picture."""
        train, random = self.windows["train"], seeded_numpy(self.config.seed, "judge", "calibration")
        rows = random.integers(len(train), size=self.config.calibration_users)
        items_WC = random.integers(len(self.catalogue), size=(len(rows), 32))
        state = judge.encode(history_batch(train, rows, judge.embed_items()))
        judge.calibrate(judge.score(state, judge.embed_items(words=False)[torch.from_numpy(items_WC)]))

    def facts(self, judge: ContentJudge) -> dict[str, float | int]:
        """What the judge is worth on test windows, what its eyes read, and when it stopped."""
        config, test = self.config, self.windows["test"]
        out = prove(judge, test, self.popularity, negatives_a_window=config.eval_negatives, seed=config.seed)
        seen = {name: round(value, 4) for name, value in self.accuracy.items()}
        gauc, step = self.best
        return out | seen | {"best_step": step, "valid_gauc": round(gauc, 5)}

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self.ctx.tracker.metrics(values, step=step)
