"""Fit any judge on a behaviour log that is streamed from disk; alone or under ``torchrun``.

The same loop as the ``judge`` stage, fed by events instead of windows; ``couturier compare`` and the benchmarks use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.held_out import HeldOut
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judge import JudgeSettings, judge_class, make_judge
from couturier.components.interest.log import Log
from couturier.components.interest.log_examples import LogConfig, LogExamples
from couturier.components.interest.loop import FitLoop, LoopConfig
from couturier.components.interest.sampling import Negatives
from couturier.components.interest.transitions import log_transitions
from couturier.components.lineage.checkpoints import Checkpoints
from couturier.components.lineage.stages import Progress, Silent
from couturier.components.runtime import global_seed, threads


@dataclass(frozen=True, kw_only=True)
class LogFitConfig(JudgeSettings, LogConfig, LoopConfig):
    """How a judge is fitted on a log."""

    model: str = "attention"
    """A name in ``JUDGES``."""
    threads: int = 1
    features: FeatureConfig = field(default_factory=lambda: FeatureConfig(words=16, ids=32))
    drop_ids: bool = False
    """Whether to fit by content alone, so that an item nobody took can be judged as well as any."""
    valid_metric: Literal["ndcg", "auc"] = "ndcg"
    """What decides when to stop: NDCG@10 over the whole catalogue, or AUC against 50 drawn negatives."""
    valid_users: int = 1024
    """At most so many users in a look at validation."""
    skip_seen: bool = True
    """Whether what a user took before is left out when the catalogue is ranked."""

    def __post_init__(self) -> None:
        LogConfig.__post_init__(self)
        LoopConfig.__post_init__(self)
        judge_class(self.model)
        if self.valid_metric not in ("ndcg", "auc"):
            raise ConfigError(f"valid_metric is {self.valid_metric!r}; choose ndcg or auc.")


@dataclass(frozen=True, kw_only=True)
class LogFit:
    """A judge fitted on a log, and what it took: ``examples`` is histories seen, ``valid`` the best look's figure."""

    judge: ContentJudge
    curves: list[tuple[int, str, float]]
    valid: float
    best_step: int
    fit_s: float
    examples: int


def fit_log(
    log: Log,
    content: Content,
    config: LogFitConfig,
    *,
    scratch: Path | None = None,
    progress: Progress | None = None,
    log_values: Callable[[Mapping[str, float], int], None] = lambda values, step: None,
) -> LogFit:
    """Fit ``config.model``; ``scratch`` holds checkpoints, from which a killed fit goes on to the same bits.

    Raises:
        DataError: nobody has two events before the holdout.
        TrainingError: a loss that is no number.
    """
    of = judge_class(config.model)
    features = replace(config.features, ids=0) if config.drop_ids else config.features
    with threads(config.threads):
        with global_seed(config.seed, "judge", "model"):
            judge = make_judge(config.model, config.settings_of(config.model), features, content)
        if of.wants_transitions:
            judge.transitions = log_transitions(log, holdout=config.holdout)
        examples = LogExamples(config, log, pieces=of.every_position, seed=config.seed)
        loop = FitLoop(
            judge,
            examples,
            _validation(log, config, examples.counts_I),
            config,
            checkpoints=Checkpoints(scratch / "checkpoints") if scratch else None,
            progress=progress or Silent(),
            log=log_values,
        )
        begin, first = time.perf_counter(), loop.step
        loop.run()
    return LogFit(
        judge=judge,
        curves=loop.curves,
        valid=loop.best_figure,
        best_step=loop.best_step,
        fit_s=time.perf_counter() - begin,
        examples=(loop.step - first) * config.batch,
    )


def _validation(log: Log, config: LogFitConfig, counts_I: np.ndarray) -> Callable[[ContentJudge], float]:
    held = HeldOut(log, "valid", history=config.history, most_users=config.valid_users, seed=config.seed)
    negatives = Negatives(config.negative_kind if config.negative_kind != "in_batch" else "popularity", counts_I)

    def figure(judge: ContentJudge) -> float:
        if config.valid_metric == "auc":
            return float(held.auc(judge, negatives, 50, seed=config.seed).mean())
        return float(held.rank(judge, skip_seen=config.skip_seen).ndcg(10).mean())

    return figure
