"""A world of feeds: what a behaviour is says more than what it is about.

A person has two topics of eight at heart, and gives a like to one and comments on the other; the feed pushes two other
topics, which they skip, more often than they do anything else; and they view a bit of everything. What they like next
is of a topic at heart. So topics that come up most are not the ones to show, and who reads only which items somebody
met cannot tell the two apart. The multimodal judge (arXiv 2509.04751) claims an embedding of viewing, liking and
commenting as what they are; the judge beside it reads the same histories without their kinds. Its target is what was
liked or commented on, never what was skipped or viewed.

What was found at seed 0: .960, attention .725, DIN .711; the multimodal judge with the kinds hidden from it .676.

Letters: I items, X people, T history length, E examples, C candidates, P width of the content vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.attention import AttentionConfig, AttentionJudge
from couturier.components.interest.judges.din import DinConfig, DinJudge
from couturier.components.interest.judges.multimodal import MultimodalConfig, MultimodalJudge
from couturier.components.interest.loop import FitLoop, LoopConfig
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed, seeded_numpy

from .base import Comparison
from .multimodal_surfaces import pair_auc

TOPICS, ITEMS, VIEW, OWN, NOISE = 8, 160, 16, 0.6, 0.1
LIKE, COMMENT, VIEWED, SKIP = range(4)
SHARES = (0.15, 0.15, 0.3, 0.4)  # of the kinds, in their order
LEARNED, VALID, PROOFS, LENGTH, SHOWN = 500, 200, 600, 16, 60
STEPS, BATCH, NEGATIVES, RATES = 240, 64, 6, (1e-2, 3e-2)
FEATURES = FeatureConfig(words=0)
RIVALS: dict[str, Callable[[Content], ContentJudge]] = {
    "multimodal": lambda content: MultimodalJudge(MultimodalConfig(width=16, hidden=32), FEATURES, content),
    "attention": lambda content: AttentionJudge(AttentionConfig(heads=2, head_width=16, hidden=32), FEATURES, content),
    "din": lambda content: DinJudge(DinConfig(width=16, unit=16, unit_2=8), FEATURES, content),
}


@dataclass(frozen=True, kw_only=True)
class People:
    """The topics each has at heart, what they met, and what they did about it."""

    heart_X2: np.ndarray
    item_XT: np.ndarray
    kind_XT: np.ndarray

    def __len__(self) -> int:
        return len(self.heart_X2)

    def history(self, rows: np.ndarray, items_ID: torch.Tensor) -> HistoryBatch:
        """What a judge reads of some of them."""
        count = len(rows)
        return HistoryBatch(
            features_ND=items_ID[torch.from_numpy(self.item_XT[rows].ravel())],
            age_days_N=torch.arange(LENGTH, 0, -1).repeat(count) / 24,
            weight_N=torch.ones(count * LENGTH),
            offsets=torch.arange(count + 1) * LENGTH,
            kind_N=torch.from_numpy(self.kind_XT[rows].ravel()),
            in_time_order=True,
        )


def meet(random: np.random.Generator, count: int) -> People:
    """Random people."""
    order_XK = np.stack([random.permutation(TOPICS) for _ in range(count)])
    kind_XT = random.choice(len(SHARES), size=(count, LENGTH), p=SHARES)
    pushed_XT = np.take_along_axis(order_XK, random.integers(2, 4, size=(count, LENGTH)), axis=1)
    any_XT = random.integers(TOPICS, size=(count, LENGTH))
    topic_XT = np.select(
        [kind_XT == LIKE, kind_XT == COMMENT, kind_XT == SKIP], [order_XK[:, :1], order_XK[:, 1:2], pushed_XT], any_XT
    )
    item_XT = random.integers(ITEMS // TOPICS, size=(count, LENGTH)) * TOPICS + topic_XT
    return People(heart_X2=order_XK[:, :2], item_XT=item_XT, kind_XT=kind_XT)


class Choices:
    """Feeds a fit: a thing of a topic at heart before some of other topics; a step's number says all of its batch."""

    def __init__(self, people: People, seed: int) -> None:
        self.people, self.seed = people, seed

    def batch(self, judge: ContentJudge, step: int) -> TrainBatch:
        random, items_ID = seeded_numpy(self.seed, "chosen", str(step)), judge.embed_items()
        rows = random.integers(len(self.people), size=BATCH)
        heart_U2 = self.people.heart_X2[rows]
        items_UC = random.integers(ITEMS, size=(BATCH, 1 + NEGATIVES))
        items_UC[:, 0] = random.integers(ITEMS // TOPICS, size=BATCH) * TOPICS + np.where(
            random.random(BATCH) < 0.5, heart_U2[:, 0], heart_U2[:, 1]
        )
        wanted_UC = (items_UC[..., None] % TOPICS == heart_U2[:, None]).any(-1)
        wanted_UC[:, 0] = False  # the positive; a negative that is at heart is left out
        shown_UC = torch.from_numpy(items_UC)
        return TrainBatch(
            history=self.people.history(rows, items_ID),
            items_UC=shown_UC.masked_fill(torch.from_numpy(wanted_UC), -1),
            candidates_UCD=items_ID[shown_UC],
            positives=1,
        )

    def rows(self) -> list[int]:
        return []

    def state(self) -> dict[str, Any]:
        return {}

    def seek(self, state: dict[str, Any]) -> None: ...


@torch.no_grad()
def aucs(people: People, judge: ContentJudge, *, seed: int, blind: bool = False) -> np.ndarray:
    """For each person the AUC of topics at heart among random items; ``blind`` hides what was done about each item."""
    items_XC, items_ID = seeded_numpy(seed, "shown").integers(ITEMS, size=(len(people), SHOWN)), judge.embed_items()
    history = people.history(np.arange(len(people)), items_ID)
    history = replace(history, kind_N=None) if blind else history
    score_XC = judge.score(judge.encode(history), items_ID[torch.from_numpy(items_XC)]).numpy()
    return pair_auc(score_XC, (items_XC[..., None] % TOPICS == people.heart_X2[:, None]).any(-1))


def run(seed: int, *, ours: str = "multimodal", other: str = "attention") -> tuple[Comparison, ContentJudge, People]:
    """The comparison, our judge and the people compared."""
    random = seeded_numpy(seed, "world")
    latent_IL = np.concatenate(
        [np.eye(TOPICS)[np.arange(ITEMS) % TOPICS], OWN * random.normal(size=(ITEMS, TOPICS))], 1
    )
    vectors_IP = latent_IL @ random.normal(size=(2 * TOPICS, VIEW)) / 2 + NOISE * random.normal(size=(ITEMS, VIEW))
    learned, valid, proofs = (meet(random, count) for count in (LEARNED, VALID, PROOFS))
    content = Content.of_vectors(torch.from_numpy(vectors_IP).float())
    judges = [_fitted(RIVALS[name], content, learned, valid, seed) for name in (ours, other)]
    comparison = Comparison(
        claim="a like, a comment, a view and a skip are read as what they are (multimodal)",
        ours=ours,
        other=other,
        figure="AUC of topics at heart",
        ours_U=aucs(proofs, judges[0], seed=seed),
        other_U=aucs(proofs, judges[1], seed=seed),
        best_U=np.ones(PROOFS),
    )
    return comparison, judges[0], proofs


def compare(seed: int, folder: Path) -> Comparison:
    """The multimodal judge and the attention judge, which reads no kinds."""
    return run(seed)[0]


def _fitted(
    make: Callable[[Content], ContentJudge], content: Content, learned: People, valid: People, seed: int
) -> ContentJudge:
    loops = []
    for rate in RATES:
        with global_seed(seed, "world", "model"):
            judge = make(content)
        config = LoopConfig(seed=seed, steps=STEPS, learning_rate=rate, eval_every=STEPS // 6, patience=3)
        loop = FitLoop(judge, Choices(learned, seed), lambda judge: float(aucs(valid, judge, seed=seed).mean()), config)
        loop.run()
        loops.append((loop.best_figure, judge))
    return max(loops, key=lambda loop: loop[0])[1]
