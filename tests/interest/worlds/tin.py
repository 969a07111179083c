"""A world of kinds of things in which what was just taken is wanted again, and less the longer ago it was.

Whether a kind is taken when it is shown depends on category match *and* recency: every behaviour of that kind speaks
for it, the newer the louder. So neither "which kinds are there" nor "what came last" is enough, which is what the
temporal interest network is for (Zhou et al., arXiv 2308.08487). The chance that a kind is taken is known: the best
score. With ten kinds, as in the paper's matrices, a network can tell a match without a product; with forty it cannot.

Letters: X histories, M behaviours of each (the newest first), K kinds, N kinds that were not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from couturier.components.interest.base import ContentJudge
from couturier.components.interest.correlation import measured_correlation
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judge import JudgeSettings, make_judge
from couturier.components.interest.judges.din import DinConfig
from couturier.components.interest.judges.tin import TinConfig
from couturier.components.interest.loop import FitLoop, LoopConfig
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed, seeded_numpy

from .base import Comparison

KINDS, MANY_KINDS, MEMORY = 10, 40, 10
LEARNED, VALID, PROOFS = 20_000, 1_000, 2_000
SPEAKS = np.linspace(1.0, 0.1, MEMORY)  # how loud a behaviour of the same kind is, the newest first
STRENGTH, LEVEL = 4.0, -3.0  # of a sigmoid
STEPS, BATCH, BAD, RATES = 400, 128, 4, (3e-3, 1e-2)
SETTINGS = JudgeSettings(tin=TinConfig(embedding=16, times=MEMORY + 1, hidden=32), din=DinConfig(width=16))


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Histories of kinds, the newest first, a kind that was taken when shown and some that were not."""

    kinds: int
    history_XM: np.ndarray
    taken_X: np.ndarray
    bad_XN: np.ndarray


def chances(history_XM: np.ndarray, kinds: int) -> np.ndarray:
    """``[X, K]``: how likely each kind is taken when it is shown."""
    speaks_XK = ((history_XM[..., None] == np.arange(kinds)) * SPEAKS[:, None]).sum(1)
    return np.asarray(1 / (1 + np.exp(-LEVEL - STRENGTH * speaks_XK)))


def show(random: np.random.Generator, count: int, kinds: int) -> Shown:
    """Every kind is shown as often as any other; who takes what is drawn by ``chances``."""
    history_XM = random.integers(kinds, size=(count, MEMORY))
    chance_XK = chances(history_XM, kinds)
    taken_X = _drawn(random, chance_XK, 1)[:, 0]
    return Shown(kinds=kinds, history_XM=history_XM, taken_X=taken_X, bad_XN=_drawn(random, 1 - chance_XK, BAD))


def _drawn(random: np.random.Generator, weight_XK: np.ndarray, count: int) -> np.ndarray:
    edge_XK = weight_XK.cumsum(1) / weight_XK.sum(1, keepdims=True)
    place_XN = (random.random((len(weight_XK), count, 1)) > edge_XK[:, None]).sum(-1)
    return np.asarray(place_XN.clip(max=weight_XK.shape[1] - 1))


def history_of(shown: Shown, rows: slice | np.ndarray) -> HistoryBatch:
    """What a judge reads: kinds an hour apart, as one-hot content."""
    oldest_first = torch.from_numpy(shown.history_XM[rows, ::-1].copy())
    people, length = oldest_first.shape
    return HistoryBatch(
        features_ND=torch.eye(shown.kinds)[oldest_first.flatten()],
        age_days_N=(torch.arange(length, 0, -1) / 24).repeat(people),
        weight_N=torch.ones(people * length),
        offsets=torch.arange(people + 1) * length,
        in_time_order=True,
    )


class Impressions:
    """Feeds a fit; a step's number says all about its batch."""

    def __init__(self, shown: Shown, seed: int) -> None:
        self.shown, self.seed = shown, seed

    def batch(self, judge: ContentJudge, step: int) -> TrainBatch:
        rows = seeded_numpy(self.seed, "shown", str(step)).integers(len(self.shown.taken_X), size=BATCH)
        taken_X1 = self.shown.taken_X[rows][:, None]
        items_UC = torch.from_numpy(np.concatenate([taken_X1, self.shown.bad_XN[rows]], axis=1))
        return TrainBatch(
            history=history_of(self.shown, rows),
            items_UC=items_UC,
            candidates_UCD=torch.eye(self.shown.kinds)[items_UC],
            positives=1,
        )

    def rows(self) -> list[int]:
        return []

    def state(self) -> dict[str, Any]:
        return {}

    def seek(self, state: dict[str, Any]) -> None: ...


@torch.no_grad()
def aucs(shown: Shown, judge: ContentJudge | None) -> np.ndarray:
    """For each history the share of other kinds ranked below the one taken, ties half; None is the best score."""
    if judge is None:
        score_XK = chances(shown.history_XM, shown.kinds)
    else:
        state = judge.encode(history_of(shown, slice(None)))
        score_XK = judge.score(state, torch.eye(shown.kinds).expand(len(shown.taken_X), -1, -1)).numpy()
    own_X1 = np.take_along_axis(score_XK, shown.taken_X[:, None], axis=1)
    won_X = (own_X1 > score_XK).sum(1) + 0.5 * ((own_X1 == score_XK).sum(1) - 1)
    return np.asarray(won_X / (shown.kinds - 1))


def fitted(
    name: str,
    *,
    seed: int,
    kinds: int = KINDS,
    settings: JudgeSettings = SETTINGS,
    steps: int = STEPS,
    rates: Sequence[float] = RATES,
) -> ContentJudge:
    """A judge at the best of the learning rates on validation."""
    learned = show(seeded_numpy(seed, "learn"), LEARNED, kinds)
    valid = show(seeded_numpy(seed, "valid"), VALID, kinds)
    content, loops = Content.of_vectors(torch.eye(kinds)), []
    for rate in rates:
        with global_seed(seed, "world", "model"):
            judge = make_judge(name, settings.settings_of(name), FeatureConfig(words=0), content)
        config = LoopConfig(seed=seed, steps=steps, learning_rate=rate, eval_every=max(1, steps // 4))
        loop = FitLoop(judge, Impressions(learned, seed), lambda judge: float(aucs(valid, judge).mean()), config)
        loop.run()
        loops.append(loop)
    return max(loops, key=lambda loop: loop.best_figure).judge


def proof(seed: int, kinds: int = KINDS) -> Shown:
    """Histories that nothing was fitted on."""
    return show(seeded_numpy(seed, "proof"), PROOFS, kinds)


def measured(seed: int, samples: int = 200_000) -> np.ndarray:
    """Mutual information ``[target, behaviour, position]`` in the world of ten kinds, over many samples."""
    shown = show(seeded_numpy(seed, "measure"), samples, KINDS)
    target = np.concatenate([shown.taken_X, shown.bad_XN[:, 0]])
    label = np.repeat([True, False], samples)
    return measured_correlation(target, label, np.concatenate([shown.history_XM] * 2), categories=KINDS)


def without(part: str) -> JudgeSettings:
    """The settings with a TIN that lacks a part: ``use_time``, ``use_attention`` or ``use_product``."""
    lacking = {
        "use_time": replace(SETTINGS.tin, use_time=False),
        "use_attention": replace(SETTINGS.tin, use_attention=False),
        "use_product": replace(SETTINGS.tin, use_product=False),
    }
    return replace(SETTINGS, tin=lacking[part])


def compare(seed: int, folder: Path) -> Comparison:
    """TIN against DIN: AUC of the kind taken among all kinds, of histories never seen."""
    shown = proof(seed)
    return Comparison(
        claim="TIN reads when and what together, DIN only what",
        ours="tin",
        other="din",
        figure="AUC of the kind taken",
        ours_U=aucs(shown, fitted("tin", seed=seed)),
        other_U=aucs(shown, fitted("din", seed=seed)),
        best_U=aucs(shown, None),
    )
