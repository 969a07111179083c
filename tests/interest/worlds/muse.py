"""A world of topics whose newest items nobody has met: what they look like is all there is to go by.

Each person likes two topics of sixteen and takes warm items of them (nine times in ten). An item's content is its
topic's direction with noise. The judge that reads identities alone knows warm items as well as can be and new ones not
at all; MUSE (arXiv 2512.07216) searches and compares by content as well. The best score is the chance of the taste.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.din import DinConfig
from couturier.components.interest.judges.muse import MuseConfig
from couturier.components.interest.log import Log
from couturier.components.interest.log_fit import LogFitConfig, fit_log
from couturier.components.interest.types import HistoryBatch

from .base import Comparison, planted_log

TOPICS, WARM, NEW, USERS, LENGTH, OWN = 16, 240, 160, 300, 22, 0.9
WIDTH, NOISE, NEGATIVES = 16, 0.5, 40
STEPS, RATES = 240, (3e-3, 1e-2)


@dataclass(frozen=True, kw_only=True)
class World:
    """``taken[u]`` ends with a warm item (validation) and a new one (the test); ``taste_UT`` are chances of topics."""

    topic_I: np.ndarray
    vectors_IP: torch.Tensor
    taken: list[list[int]]
    taste_UT: np.ndarray


def plant(seed: int) -> World:
    """A world; items below ``WARM`` are warm, the others new."""
    random = np.random.default_rng(seed)
    topic_I = np.arange(WARM + NEW) % TOPICS
    centre_TP = np.linalg.qr(random.normal(size=(WIDTH, TOPICS)))[0].T
    vectors_IP = centre_TP[topic_I] + NOISE * random.normal(size=(len(topic_I), WIDTH)) / WIDTH**0.5
    taste_UT = np.full((USERS, TOPICS), (1 - OWN) / TOPICS)
    taken = []
    for user in range(USERS):
        taste_UT[user, random.choice(TOPICS, 2, replace=False)] += OWN / 2
        topics = random.choice(TOPICS, LENGTH, p=taste_UT[user])
        warm = [int(random.choice(np.flatnonzero(topic_I[:WARM] == topic))) for topic in topics[:-1]]
        taken.append([*warm, int(WARM + random.choice(np.flatnonzero(topic_I[WARM:] == topics[-1])))])
    return World(topic_I=topic_I, vectors_IP=torch.from_numpy(vectors_IP).float(), taken=taken, taste_UT=taste_UT)


def fitted(
    world: World,
    log: Log,
    model: str,
    *,
    ids_only: bool,
    seed: int,
    rates: Sequence[float] = RATES,
    muse: MuseConfig | None = None,
) -> ContentJudge:
    """A judge at the best of the learning rates on validation; ``ids_only`` shows it no content."""
    vectors_IP = torch.zeros(len(world.vectors_IP), 1) if ids_only else world.vectors_IP
    content = Content.of_vectors(vectors_IP, torch.from_numpy(log.counts(2)))
    fits = [
        fit_log(
            log,
            content,
            LogFitConfig(
                seed=seed,
                model=model,
                steps=STEPS,
                batch=128,
                history=LENGTH,
                negatives=6,
                eval_every=STEPS // 3,
                learning_rate=rate,
                valid_metric="auc",
                features=FeatureConfig(words=0, ids=16),
                muse=muse or MuseConfig(),
                din=DinConfig(width=16),
            ),
        )
        for rate in rates
    ]
    return max(fits, key=lambda fit: fit.valid).judge


@torch.no_grad()
def aucs(world: World, judge: ContentJudge, *, new: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """AUC of each user's held-out item against random ones, by the judge and by the true taste; ties half.

    ``new`` ranks the new item among new ones, else the held-out warm item among warm ones.
    """
    random, cut = np.random.default_rng(seed), -1 if new else -2
    low, high = (WARM, WARM + NEW) if new else (0, WARM)
    items_UC = random.integers(low, high, size=(USERS, 1 + NEGATIVES))
    items_UC[:, 0] = [taken[cut] for taken in world.taken]
    history = torch.tensor([taken[:-2] for taken in world.taken])
    items_ID = judge.embed_items()
    batch = HistoryBatch(
        features_ND=items_ID[history.flatten()],
        age_days_N=torch.arange(history.shape[1], 0, -1).repeat(USERS) / 24,
        weight_N=torch.ones(history.numel()),
        offsets=torch.arange(USERS + 1) * history.shape[1],
        in_time_order=True,
    )
    scores_UC = judge.score(judge.encode(batch), items_ID[torch.from_numpy(items_UC)]).double().numpy()
    best_UC = np.take_along_axis(world.taste_UT, world.topic_I[items_UC], axis=1)
    return _auc(scores_UC), _auc(best_UC)


def _auc(scores_UC: np.ndarray) -> np.ndarray:
    won = (scores_UC[:, :1] > scores_UC[:, 1:]) + 0.5 * (scores_UC[:, :1] == scores_UC[:, 1:])
    return np.asarray(won.mean(1))


def compare_both(seed: int, folder: Path) -> tuple[Comparison, Comparison]:
    """MUSE against DIN by identities, on new items and on warm ones."""
    world = plant(seed)
    log = planted_log(folder, world.taken, len(world.topic_I))
    muse = fitted(world, log, "muse", ids_only=False, seed=seed)
    din = fitted(world, log, "din", ids_only=True, seed=seed)
    out = []
    for new in (True, False):
        ours_U, best_U = aucs(world, muse, new=new, seed=seed)
        other_U, _ = aucs(world, din, new=new, seed=seed)
        out.append(
            Comparison(
                claim="MUSE judges an item nobody has met by its content" if new else "and warm items no worse",
                ours="muse",
                other="din by identities",
                figure="AUC on new items" if new else "AUC on warm items",
                ours_U=ours_U,
                other_U=other_U,
                best_U=best_U,
            )
        )
    return out[0], out[1]


def compare(seed: int, folder: Path) -> Comparison:
    """MUSE against DIN by identities: AUC on items that were never taken in training."""
    return compare_both(seed, folder)[0]
