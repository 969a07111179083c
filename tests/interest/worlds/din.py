"""A world where only what was taken of the candidate's own category says anything about it.

Everybody takes things of every category, and in each category has a flavour of their own. An item shows its category
and its flavour apart, so the mean of a history tells which flavours are liked and not where; who reads the behaviours
of the candidate's category finds it. Zhou et al. 2018 (arXiv 1706.06978): attention against pooling all alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from couturier.components.interest.held_out import HeldOut
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.din import DinConfig
from couturier.components.interest.judges.sdim import SdimConfig
from couturier.components.interest.log import Log
from couturier.components.interest.log_fit import LogFitConfig, fit_log
from couturier.components.interest.sampling import Negatives

from .base import Comparison, planted_log

CATEGORIES, FLAVOURS, EACH = 6, 4, 16
ITEMS = CATEGORIES * FLAVOURS * EACH


@dataclass(frozen=True, kw_only=True)
class Habits:
    """``taken`` a user, oldest first, and ``likes_UG``: the flavour of each user in each category."""

    taken: list[list[int]]
    likes_UG: np.ndarray


def habits(seed: int, *, users: int, length: int, faithful: float) -> Habits:
    """Users who take a random category each time, in their flavour with chance ``faithful``, else in any."""
    random = np.random.default_rng(seed)
    likes_UG = random.integers(FLAVOURS, size=(users, CATEGORIES))
    category_UT = random.integers(CATEGORIES, size=(users, length))
    flavour_UT = np.take_along_axis(likes_UG, category_UT, axis=1)
    astray_UT = random.random((users, length)) >= faithful
    astray_UT[:, -2:] = False  # what is held out is always in the flavour
    flavour_UT = np.where(astray_UT, random.integers(FLAVOURS, size=(users, length)), flavour_UT)
    item_UT = (category_UT * FLAVOURS + flavour_UT) * EACH + random.integers(EACH, size=(users, length))
    return Habits(taken=item_UT.tolist(), likes_UG=likes_UG)


def content() -> Content:
    """Category and flavour of each item, side by side."""
    cell_I = torch.arange(ITEMS) // EACH
    category, flavour = torch.eye(CATEGORIES)[cell_I // FLAVOURS], torch.eye(FLAVOURS)[cell_I % FLAVOURS]
    return Content.of_vectors(torch.cat([category, flavour], dim=1))


def best(world: Habits) -> np.ndarray:
    """AUC of who knows the flavours: what matches ties with the positive, what does not stands below."""
    cell_I = np.arange(ITEMS) // EACH
    found = []
    for taken, likes_G in zip(world.taken, world.likes_UG, strict=True):
        free = np.setdiff1d(np.arange(ITEMS), taken)
        found.append(1 - 0.5 * (cell_I[free] % FLAVOURS == likes_G[cell_I[free] // FLAVOURS]).mean())
    return np.array(found)


def auc(log: Log, config: LogFitConfig) -> np.ndarray:
    """AUC of each user of a judge fitted with these settings: the last thing taken against what never was."""
    fit = fit_log(log, content(), config)
    held = HeldOut(log, "test", history=config.history)
    return held.auc(fit.judge, Negatives("uniform", np.ones(ITEMS)), 50, seed=config.seed)


def settings(seed: int, *, history: int, steps: int, batch: int) -> LogFitConfig:
    """What every judge in this world is fitted with: the same batches and steps, by content alone."""
    return LogFitConfig(
        seed=seed,
        steps=steps,
        batch=batch,
        history=history,
        negatives=4,
        negative_kind="uniform",
        eval_every=max(1, steps // 4),
        learning_rate=1e-2,
        valid_metric="auc",
        valid_users=100,
        features=FeatureConfig(words=0),
        din=DinConfig(width=16),
        sdim=SdimConfig(width=16),
    )


def compare(seed: int, folder: Path) -> Comparison:
    """DIN against itself without attention, in histories of 24."""
    world = habits(seed, users=400, length=26, faithful=1.0)
    log = planted_log(folder, world.taken, ITEMS)
    base = replace(settings(seed, history=24, steps=400, batch=128), model="din")
    ours, other = (auc(log, replace(base, din=DinConfig(width=16, mean_pool=mean_pool))) for mean_pool in (False, True))
    return Comparison(
        claim="DIN reads the behaviours of the candidate's category; the mean of a history has lost them",
        ours="din",
        other="din with mean_pool",
        figure="AUC",
        ours_U=ours,
        other_U=other,
        best_U=best(world),
    )
