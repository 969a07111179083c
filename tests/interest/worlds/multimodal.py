"""A world of short videos: two views of eight topics, likes and views that mean different things, tastes that switch.

An item has a picture and a sound, noisy linear views of what it is (its topic, and something of its own). A person
watches two topics and likes only one of them; halfway both give way to others. The judge (arXiv 2509.04751) sees new
items by their content; the same judge with identities alone cannot. ``heard`` worlds have pictures that say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.multimodal import MultimodalConfig, MultimodalJudge
from couturier.components.interest.log import Log
from couturier.components.interest.log_fit import LogFitConfig, fit_log
from couturier.components.interest.types import HistoryBatch

from .base import Comparison, planted_log

TOPICS, WARM, NEW, USERS, LENGTH = 8, 160, 80, 240, 26
VIEW, OWN, NOISE, NEGATIVES = 16, 0.6, 0.1, 40
DAYS = 3.0  # between behaviours
KINDS = ("like", "view")  # in the order of their numbers
PIECES = ("picture", "audio")


@dataclass(frozen=True, kw_only=True)
class World:
    """Each person's items, oldest first; ``liked_U2`` and ``watched_U2`` are topics before and after the switch.

    The last two of ``taken`` are a warm item (validation) and a new one (the test), both of the second half's topics.
    """

    topic_I: np.ndarray
    vectors_IP: torch.Tensor
    taken: list[list[int]]
    kinds: list[list[str]]
    values: list[list[float]]
    liked_U2: np.ndarray
    watched_U2: np.ndarray

    @property
    def switch(self) -> int:
        """The place of the first item of the new topics."""
        return (LENGTH - 2) // 2


def plant(seed: int, *, users: int = USERS, heard: bool = False) -> World:
    """A world; items below ``WARM`` are warm. With ``heard`` only the sound says what an item is."""
    random = np.random.default_rng(seed)
    topic_I = np.arange(WARM + NEW) % TOPICS
    latent_IL = np.concatenate([np.eye(TOPICS)[topic_I], OWN * random.normal(size=(len(topic_I), TOPICS))], axis=1)
    views = []
    for name in PIECES:
        view = latent_IL @ random.normal(size=(latent_IL.shape[1], VIEW)) / 2
        silent = heard and name == "picture"
        views.append(random.normal(size=view.shape) if silent else view + NOISE * random.normal(size=view.shape))
    world = World(
        topic_I=topic_I,
        vectors_IP=torch.from_numpy(np.concatenate(views, axis=1)).float(),
        taken=[],
        kinds=[],
        values=[],
        liked_U2=np.zeros((users, 2), dtype=np.int64),
        watched_U2=np.zeros((users, 2), dtype=np.int64),
    )
    for user in range(users):
        topics = random.permutation(TOPICS)[:4]
        world.liked_U2[user], world.watched_U2[user] = topics[:2], topics[2:]
        half = np.repeat([0, 1], [world.switch, LENGTH - world.switch])
        likes = random.random(LENGTH) < 0.5
        wanted = np.where(likes, topics[:2][half], topics[2:][half])
        starts = np.r_[np.zeros(LENGTH - 1, dtype=np.int64), WARM]
        ends = np.r_[np.full(LENGTH - 1, WARM), WARM + NEW]
        pools = [np.flatnonzero(topic_I[a:b] == t) + a for t, a, b in zip(wanted, starts, ends, strict=True)]
        world.taken.append([int(random.choice(pool)) for pool in pools])
        world.kinds.append([KINDS[0] if like else KINDS[1] for like in likes])
        world.values.append([float(np.clip(random.normal(0.9 if like else 0.3, 0.1), 0, 1)) for like in likes])
    return world


def logged(world: World, folder: Path) -> Log:
    """The world's events on disk."""
    times_h = [[24 * DAYS * place for place in range(LENGTH)]] * len(world.taken)
    return planted_log(folder, world.taken, len(world.topic_I), times_h=times_h, kinds=world.kinds, values=world.values)


def fitted(world: World, log: Log, *, seed: int, steps: int = 240, ids_only: bool = False) -> MultimodalJudge:
    """The judge by content and identities, or ``ids_only``."""
    vectors_IP = torch.zeros(len(world.vectors_IP), 1) if ids_only else world.vectors_IP
    pieces = tuple(f"{name}:{VIEW}" for name in PIECES)
    fit = fit_log(
        log,
        Content.of_vectors(vectors_IP, torch.from_numpy(log.counts(2))),
        LogFitConfig(
            seed=seed,
            model="multimodal",
            steps=steps,
            batch=64,
            history=LENGTH,
            negatives=6,
            learning_rate=1e-2,
            eval_every=steps // 3,
            valid_metric="auc",
            features=FeatureConfig(words=0, ids=16),
            multimodal=MultimodalConfig(width=16, hidden=32, modalities=() if ids_only else pieces),
        ),
    )
    assert isinstance(fit.judge, MultimodalJudge)
    return fit.judge


def histories(world: World, items_ID: torch.Tensor) -> HistoryBatch:
    """What everyone did before the last two events."""
    length, users = LENGTH - 2, len(world.taken)
    taken = torch.tensor([taken[:length] for taken in world.taken]).flatten()
    kinds = torch.tensor([[KINDS.index(kind) for kind in kinds[:length]] for kinds in world.kinds])
    return HistoryBatch(
        features_ND=items_ID[taken],
        age_days_N=DAYS * torch.arange(length, 0, -1).repeat(users).float(),
        weight_N=torch.ones(len(taken)),
        offsets=torch.arange(users + 1) * length,
        kind_N=kinds.flatten(),
        value_N=torch.tensor([values[:length] for values in world.values]).flatten(),
        items_N=taken,
        in_time_order=True,
    )


@torch.no_grad()
def new_item_aucs(world: World, judge: ContentJudge, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """AUC of each user's new item against random new ones, by the judge and by the true taste; ties half."""
    random, users = np.random.default_rng(seed), len(world.taken)
    items_UC = random.integers(WARM, WARM + NEW, size=(users, 1 + NEGATIVES))
    items_UC[:, 0] = [taken[-1] for taken in world.taken]
    items_ID = judge.embed_items()
    scores_UC = judge.score(judge.encode(histories(world, items_ID)), items_ID[torch.from_numpy(items_UC)]).numpy()
    topic_UC = world.topic_I[items_UC]
    best_UC = (topic_UC == world.liked_U2[:, 1:]) | (topic_UC == world.watched_U2[:, 1:])
    return auc(scores_UC), auc(best_UC.astype(np.float64))


def auc(scores_UC: np.ndarray) -> np.ndarray:
    """Of the first column against the others."""
    won = (scores_UC[:, :1] > scores_UC[:, 1:]) + 0.5 * (scores_UC[:, :1] == scores_UC[:, 1:])
    return np.asarray(won.mean(1))


def compare(seed: int, folder: Path) -> Comparison:
    """The multimodal judge with content against itself with identities alone: AUC on items nobody had taken."""
    world = plant(seed)
    log = logged(world, folder)
    ours_U, best_U = new_item_aucs(world, fitted(world, log, seed=seed), seed=seed)
    other_U, _ = new_item_aucs(world, fitted(world, log, seed=seed, ids_only=True), seed=seed)
    return Comparison(
        claim="The multimodal judge knows a new item by its picture and sound",
        ours="multimodal",
        other="multimodal by identities",
        figure="AUC on new items",
        ours_U=ours_U,
        other_U=other_U,
        best_U=best_U,
    )
