"""A world of intervals: items stand on two axes, and a person takes what lies in one or two stretches of the first.

Stretches differ in breadth from person to person; within them all items are alike, outside none is taken, and
negatives are drawn uniformly, so the best possible score is whether an item lies in a stretch. What is seen of an item
is a linear image of its places, so no single point is near to both stretches and far from what lies between: boxes of
which the nearest counts can say that.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from couturier.components.interest.base import ContentJudge
from couturier.components.interest.held_out import HeldOut
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.hypercuboid import HypercuboidConfig, HypercuboidJudge
from couturier.components.interest.log import Log
from couturier.components.interest.log_examples import history_of, history_rows
from couturier.components.interest.log_fit import LogFitConfig, fit_log
from couturier.components.interest.sampling import Negatives

from .base import Comparison, planted_log

ITEMS, USERS, TAKEN = 400, 400, 24
JUDGE = HypercuboidConfig(width=8, cuboids=2, memory=16, length=24)
FIT = LogFitConfig(
    model="hypercuboid",
    hypercuboid=JUDGE,
    features=FeatureConfig(words=0),
    history=TAKEN,
    batch=64,
    steps=300,
    eval_every=100,
    patience=3,
    negatives=8,
    negative_kind="uniform",
    valid_metric="auc",
    skip_seen=False,
)
RATES = (3e-3, 1e-2)


def plant(seed: int, *, stretches: int) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    """``(places [I, 2] in -1..1, histories, stretches [U, S, 2] as middle and half breadth on the first axis)``."""
    random = np.random.default_rng(seed)
    places_I2 = random.uniform(-1, 1, (ITEMS, 2))
    half_US = random.uniform(0.05, 0.5 if stretches == 1 else 0.15, (USERS, 1)) * np.ones((1, stretches))
    if stretches == 1:
        middle_US = random.uniform(-1 + half_US, 1 - half_US)
    else:
        middle_US = random.uniform(-0.8, 0.8, (USERS, 1)) + np.array([0.0, 1.0])
        middle_US = (middle_US + 0.8) % 1.6 - 0.8
    histories = []
    for user in range(USERS):
        open_I = (np.abs(places_I2[:, :1] - middle_US[user]) <= half_US[user]).any(1)
        histories.append(random.choice(np.flatnonzero(open_I), TAKEN).tolist())
    return places_I2, histories, np.stack([middle_US, half_US], axis=-1)


def content_of(places_I2: np.ndarray) -> Content:
    """What a judge sees of an item: its places, turned into six numbers by a fixed linear map."""
    seen_IX = places_I2 @ np.random.default_rng(7).normal(size=(2, 6))
    return Content.of_vectors(torch.from_numpy(seen_IX.astype(np.float32)))


def _fitted(log: Log, content: Content, config: LogFitConfig) -> ContentJudge:
    """The judge of the learning rate that validation likes best."""
    fits = [fit_log(log, content, replace(config, learning_rate=rate)) for rate in RATES]
    return max(fits, key=lambda fit: fit.valid).judge


def compare(seed: int, folder: Path) -> Comparison:
    """AUC of users of two stretches: two boxes against one point, same budget and learning rates."""
    places_I2, histories, stretches_US2 = plant(seed, stretches=2)
    log, content = planted_log(folder, histories, ITEMS), content_of(places_I2)
    config = replace(FIT, seed=seed)
    point = replace(config, hypercuboid=replace(JUDGE, cuboids=1, points=True))
    held, negatives = HeldOut(log, "test", history=TAKEN), Negatives("uniform", np.ones(ITEMS))
    ours, other = (held.auc(_fitted(log, content, each), negatives, 100, seed=seed) for each in (config, point))
    open_UI = (np.abs(places_I2[None, :, :1] - stretches_US2[:, None, :, 0]) <= stretches_US2[:, None, :, 1]).any(-1)
    seen_U = [len(set(taken)) for taken in histories]
    # A negative is an item never taken; in a stretch it ties with what was taken.
    share_U = [(open_UI[user].sum() - seen_U[user]) / (ITEMS - seen_U[user]) for user in range(USERS)]
    return Comparison(
        claim="two boxes hold a taste of two intervals, one point cannot (hypercuboids)",
        ours="hypercuboid, two boxes",
        other="one point",
        figure="AUC against uniform negatives",
        ours_U=ours,
        other_U=other,
        best_U=1 - np.array(share_U) / 2,
    )


def breadth_correlation(seed: int, folder: Path) -> float:
    """Spearman's correlation over users of one stretch: the breadth that the judge says, and the planted one."""
    places_I2, histories, stretches_US2 = plant(seed, stretches=1)
    log = planted_log(folder, histories, ITEMS)
    config = replace(FIT, seed=seed, hypercuboid=replace(JUDGE, cuboids=1))
    judge = _fitted(log, content_of(places_I2), config)
    assert isinstance(judge, HypercuboidJudge)
    shard = log.shard(0)
    rows, offsets = history_rows(shard.offsets[:-1], shard.offsets[1:], TAKEN)
    history = history_of(shard, rows, offsets, shard.time_s_N[shard.offsets[1:] - 1], judge.embed_items())
    said_U, true_U = judge.breadth(history).numpy(), stretches_US2[shard.users_U, 0, 1]
    return float(np.corrcoef(said_U.argsort().argsort(), true_U.argsort().argsort())[0, 1])
