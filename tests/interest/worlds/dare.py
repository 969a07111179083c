"""A world in which what to attend to and what it means are different things, and one table must hold both.

An item has a kind and a colour. Everybody has a favourite colour for every kind, unlike from kind to kind. So what a
history says of a candidate is in its items *of that kind* (attention must look at the kind, whatever the colour), and
what they say is their *colour* (representation must hold it). In one table the colour pulls attention towards items
of the candidate's own colour, which are of other kinds. Feng et al., "DARE" (arXiv 2410.02604), say that this is why
tables should be two; the baseline is the same judge with one, TWIN, twice as wide so that it has as many parameters.
The chance of each colour is known for everybody, so a score's AUC is known in expectation, without the luck of what
was taken.

What was found, seeds 0 to 2: DARE .846 to .847 of a best possible .852, TWIN .834 to .835; as wide as one of DARE's
tables, TWIN has .817 to .824. With four colours instead of eight the differences were .005 to .010.

Letters: X people, T behaviours of each, K kinds, L colours, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from couturier.components.interest.base import ContentJudge
from couturier.components.interest.correlation import retrieval_quality
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.dare import DareConfig, DareJudge
from couturier.components.interest.loop import FitLoop, LoopConfig
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed, seeded_numpy

from .base import Comparison

KINDS, COLOURS, LENGTH, OWN = 12, 8, 60, 0.8
LEARNED, VALID, PROOFS = 3_000, 500, 1_500
STEPS, BATCH, BAD, RATES = 400, 128, 4, (3e-3, 1e-2)
DARE = DareConfig(attention=8, representation=8, time_width=4, times=LENGTH + 1, top=6, hidden=48)
TWIN = replace(DARE, tied=True, attention=16, representation=16)


@dataclass(frozen=True, kw_only=True)
class People:
    """What each had (kind and colour of ``LENGTH`` behaviours), took next, and what colour they like of each kind."""

    kind_XT: np.ndarray
    colour_XT: np.ndarray
    kind_X: np.ndarray
    colour_X: np.ndarray

    def seen(self) -> np.ndarray:
        """``[X, K, L]``: how often each had each colour of each kind."""
        out = np.zeros((len(self.kind_X), KINDS, COLOURS))
        np.add.at(out, (np.arange(len(self.kind_X))[:, None], self.kind_XT, self.colour_XT), 1.0)
        return out


def meet(random: np.random.Generator, count: int) -> People:
    """People with tastes of their own."""
    liked_XK = random.integers(COLOURS, size=(count, KINDS))
    kind_XT = random.integers(KINDS, size=(count, LENGTH + 1))
    own_XT = random.random(kind_XT.shape) < OWN
    colour_XT = np.where(own_XT, np.take_along_axis(liked_XK, kind_XT, 1), random.integers(COLOURS, size=kind_XT.shape))
    return People(
        kind_XT=kind_XT[:, :-1], colour_XT=colour_XT[:, :-1], kind_X=kind_XT[:, -1], colour_X=colour_XT[:, -1]
    )


def chances(people: People) -> np.ndarray:
    """``[X, K, L]``: how likely each colour is of each kind, given what was seen; the best score."""
    hit, miss = OWN + (1 - OWN) / COLOURS, (1 - OWN) / COLOURS
    liked = people.seen() * np.log(hit / miss)
    liked = np.exp(liked - liked.max(-1, keepdims=True))
    liked /= liked.sum(-1, keepdims=True)
    return np.asarray(liked * (hit - miss) + miss)


def features(kind: np.ndarray, colour: np.ndarray) -> Tensor:
    """One-hot kind beside one-hot colour."""
    kinds, colours = torch.eye(KINDS)[torch.from_numpy(kind)], torch.eye(COLOURS)[torch.from_numpy(colour)]
    return torch.cat([kinds, colours], dim=-1)


def history_of(people: People, rows: slice | np.ndarray) -> HistoryBatch:
    """What a judge reads, a behaviour an hour."""
    kind, colour = people.kind_XT[rows], people.colour_XT[rows]
    return HistoryBatch(
        features_ND=features(kind.ravel(), colour.ravel()),
        age_days_N=(torch.arange(LENGTH, 0, -1) / 24).repeat(len(kind)),
        weight_N=torch.ones(kind.size),
        offsets=torch.arange(len(kind) + 1) * LENGTH,
        in_time_order=True,
    )


class Choices:
    """Feeds a fit: what each took against random items; a step's number says all about its batch."""

    def __init__(self, people: People, seed: int) -> None:
        self.people, self.seed = people, seed

    def batch(self, judge: ContentJudge, step: int) -> TrainBatch:
        random = seeded_numpy(self.seed, "chosen", str(step))
        rows = random.integers(len(self.people.kind_X), size=BATCH)
        kind = np.concatenate([self.people.kind_X[rows, None], random.integers(KINDS, size=(BATCH, BAD))], axis=1)
        colour = np.concatenate([self.people.colour_X[rows, None], random.integers(COLOURS, size=(BATCH, BAD))], axis=1)
        return TrainBatch(
            history=history_of(self.people, rows),
            items_UC=torch.from_numpy(kind * COLOURS + colour),
            candidates_UCD=features(kind, colour),
            positives=1,
        )

    def rows(self) -> list[int]:
        return []

    def state(self) -> dict[str, Any]:
        return {}

    def seek(self, state: dict[str, Any]) -> None: ...


@torch.no_grad()
def aucs(people: People, judge: ContentJudge | None) -> np.ndarray:
    """For each the expected share of all other items ranked below the one taken, ties half; None is the best score."""
    chance_XC = chances(people).reshape(len(people.kind_X), -1)
    score_XC = chance_XC
    if judge is not None:
        everything = np.arange(KINDS * COLOURS)
        shown_CD, parts = features(everything // COLOURS, everything % COLOURS), []
        for start in range(0, len(people.kind_X), 250):
            state = judge.encode(history_of(people, np.arange(start, min(start + 250, len(people.kind_X)))))
            parts.append(judge.score(state, shown_CD.expand(len(state), -1, -1)).numpy())
        score_XC = np.concatenate(parts)
    below_XC = rankdata(score_XC, axis=1) - 1
    return np.asarray((chance_XC * below_XC).sum(1) / chance_XC.sum(1) / (score_XC.shape[1] - 1))


@torch.no_grad()
def retrieved(people: People, judge: DareJudge) -> np.ndarray:
    """Share of the information that the K best behaviours hold of the item taken that the search finds, a person.

    Behaviours of the item's kind inform, equally; others do not.
    """
    shown = features(people.kind_X, people.colour_X)[:, None]
    found_XK = judge.search(history_of(people, slice(None)), shown)[:, 0]
    informs_XT = torch.from_numpy((people.kind_XT == people.kind_X[:, None]).astype(np.float32))
    return retrieval_quality(found_XK, informs_XT).numpy()


def fitted(config: DareConfig, *, seed: int, steps: int = STEPS, rates: Sequence[float] = RATES) -> DareJudge:
    """A judge at the best of the learning rates on validation."""
    learned, valid = meet(seeded_numpy(seed, "learn"), LEARNED), meet(seeded_numpy(seed, "valid"), VALID)
    content, loops = Content.of_vectors(torch.eye(KINDS + COLOURS)), []
    for rate in rates:
        with global_seed(seed, "world", "model"):
            judge = DareJudge(config, FeatureConfig(words=0), content)
        loop_config = LoopConfig(seed=seed, steps=steps, learning_rate=rate, eval_every=max(1, steps // 4))
        loop = FitLoop(judge, Choices(learned, seed), lambda judge: float(aucs(valid, judge).mean()), loop_config)
        loop.run()
        loops.append((loop.best_figure, judge))
    return max(loops, key=lambda loop: loop[0])[1]


def proof(seed: int) -> People:
    """People that nothing was fitted on."""
    return meet(seeded_numpy(seed, "proof"), PROOFS)


def compare(seed: int, folder: Path) -> Comparison:
    """DARE against TWIN, the same judge with one table: AUC of the item taken, of people never seen."""
    people = proof(seed)
    return Comparison(
        claim="two tables attend to the kind and hold the colour, one table mixes them",
        ours="dare",
        other="dare tied, twice as wide (TWIN)",
        figure="expected AUC of the item taken",
        ours_U=aucs(people, fitted(DARE, seed=seed)),
        other_U=aucs(people, fitted(TWIN, seed=seed)),
        best_U=aucs(people, None),
    )
