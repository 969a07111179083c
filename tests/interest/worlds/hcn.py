"""A world of topics: everybody likes three of sixteen, unequally, and takes things of them in any order.

So a person's true interests are known, and interests that a judge finds can be held against them: do they point at
different things, and is there one near each topic that the person likes? "Hierarchical Multi-Interest Co-Network"
(arXiv 2210.10547) says that single-layer dynamic routing finds interests that repeat each other, and that a hierarchy
repeats itself less; both have four interests here. The chance of each topic is known for everybody: the best score.

Letters: U people, T behaviours of each, I items, P content width, E width of item space, K interests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.hcn import HcnConfig, HcnJudge
from couturier.components.interest.log import Log
from couturier.components.interest.log_fit import LogFitConfig, fit_log
from couturier.components.interest.types import HistoryBatch

from .base import Comparison, planted_log

TOPICS, EACH, WIDTH, NOISE = 16, 15, 24, 0.4
USERS, LENGTH, SHARES = 400, 24, (0.5, 0.3, 0.2)
STEPS, RATES = 300, (3e-3, 1e-2)
HIERARCHY = HcnConfig(embedding=24, levels=2, centres=2)
SINGLE = replace(HIERARCHY, levels=1, centres=4, redundancy=0.0)


@dataclass(frozen=True, kw_only=True)
class World:
    """``topic_UT`` are the topics of what people took, the last of which is the test; ``likes_U3`` the liked ones."""

    vectors_IP: torch.Tensor
    taken_UT: np.ndarray
    likes_U3: np.ndarray

    @property
    def topic_I(self) -> np.ndarray:
        return np.arange(len(self.vectors_IP)) // EACH


def plant(seed: int) -> World:
    """Topics are directions at random angles; an item is its topic's direction with noise."""
    random = np.random.default_rng(seed)
    centre_KP = random.normal(size=(TOPICS, WIDTH)) / WIDTH**0.5
    vectors_IP = centre_KP.repeat(EACH, 0) + NOISE * random.normal(size=(TOPICS * EACH, WIDTH)) / WIDTH**0.5
    likes_U3 = random.permuted(np.tile(np.arange(TOPICS), (USERS, 1)), axis=1)[:, :3]
    which_UT = random.choice(3, size=(USERS, LENGTH), p=SHARES)
    topic_UT = np.take_along_axis(likes_U3, which_UT, axis=1)
    taken_UT = topic_UT * EACH + random.integers(EACH, size=topic_UT.shape)
    return World(vectors_IP=torch.from_numpy(vectors_IP).float(), taken_UT=taken_UT, likes_U3=likes_U3)


def fitted(
    world: World, log: Log, config: HcnConfig, *, seed: int, steps: int = STEPS, rates: Sequence[float] = RATES
) -> HcnJudge:
    """A judge at the best of the learning rates on validation."""
    fits = []
    for rate in rates:
        settings = LogFitConfig(
            seed=seed,
            model="hcn",
            steps=steps,
            batch=128,
            history=LENGTH,
            pool=64,
            eval_every=max(1, steps // 4),
            learning_rate=rate,
            valid_metric="auc",
            features=FeatureConfig(words=0),
            hcn=config,
        )
        fits.append(fit_log(log, Content.of_vectors(world.vectors_IP), settings))
    judge = max(fits, key=lambda fit: fit.valid).judge
    assert isinstance(judge, HcnJudge)
    return judge


def history_of(world: World) -> HistoryBatch:
    """What everybody took before the last."""
    before_UT = torch.from_numpy(world.taken_UT[:, :-1])
    users, length = before_UT.shape
    return HistoryBatch(
        features_ND=world.vectors_IP[before_UT.flatten()],
        age_days_N=(torch.arange(length, 0, -1) / 24).repeat(users),
        weight_N=torch.ones(before_UT.numel()),
        offsets=torch.arange(users + 1) * length,
        in_time_order=True,
    )


@torch.no_grad()
def sameness(world: World, judge: HcnJudge) -> np.ndarray:
    """Mean absolute cosine between two interests of a person, ``[U]``."""
    direction_UKE = F.normalize(judge.interests(history_of(world)), dim=-1)
    cosine_UKK = (direction_UKE @ direction_UKE.transpose(1, 2)).abs()
    count = cosine_UKK.shape[1]
    return ((cosine_UKK.sum((1, 2)) - count) / (count * (count - 1))).numpy()


@torch.no_grad()
def coverage(world: World, judge: HcnJudge) -> np.ndarray:
    """Of a person's three topics, the share whose items are, in the mean, nearer to an interest than all others' are.

    ``[U]``: a topic is covered if it is among the three topics with the nearest interests.
    """
    tower_KE = judge.item_tower(world.vectors_IP).view(TOPICS, EACH, -1).mean(1)
    near_UK = (judge.interests(history_of(world)) @ tower_KE.T).amax(1)
    best_U3 = near_UK.topk(3, dim=1).indices.numpy()
    return np.array([len(set(best) & set(liked)) / 3 for best, liked in zip(best_U3, world.likes_U3, strict=True)])


@torch.no_grad()
def aucs(world: World, judge: HcnJudge | None) -> np.ndarray:
    """For each the share of items of other topics ranked below the one taken last; None is the best score."""
    last_U = world.taken_UT[:, -1]
    if judge is None:
        score_UI = np.zeros((USERS, TOPICS))
        np.put_along_axis(score_UI, world.likes_U3, np.broadcast_to(SHARES, (USERS, 3)), axis=1)
        score_UI = score_UI[:, world.topic_I]
    else:
        score_UI = judge.score_all(judge.encode(history_of(world)), world.vectors_IP).numpy()
    other_UI = world.topic_I != world.topic_I[last_U][:, None]
    own_U1 = np.take_along_axis(score_UI, last_U[:, None], axis=1)
    won_UI = ((own_U1 > score_UI) + 0.5 * (own_U1 == score_UI)) * other_UI
    return np.asarray(won_UI.sum(1) / other_UI.sum(1))


def both(seed: int, folder: Path) -> tuple[World, HcnJudge, HcnJudge]:
    """The world, the hierarchy and single-layer routing, fitted on the same log."""
    world = plant(seed)
    log = planted_log(folder, world.taken_UT.tolist(), len(world.vectors_IP))
    return world, fitted(world, log, HIERARCHY, seed=seed), fitted(world, log, SINGLE, seed=seed)


def compare(seed: int, folder: Path) -> Comparison:
    """HCN against single-layer dynamic routing at four interests each: how differently two of them point."""
    world, ours, other = both(seed, folder)
    return Comparison(
        claim="a hierarchy's interests repeat each other less than single-layer routing's",
        ours="hcn",
        other="hcn with one level and no penalty (dynamic routing)",
        figure="1 - mean |cosine| between interests",
        ours_U=1 - sameness(world, ours),
        other_U=1 - sameness(world, other),
    )
