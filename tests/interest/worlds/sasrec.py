"""A world where order is everything: each item has one successor, and people walk along the cycles.

All items are taken equally often, so what is not read in order says nothing. A walker leaves the cycle with
chance ``1 - STAY`` for a random item; the best score ranks the successor first. Kang and McAuley 2018 (arXiv
1808.09781) against a judge that attends to the same history without its order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from couturier.components.interest.held_out import HeldOut, Ranking
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.din import DinConfig
from couturier.components.interest.judges.sasrec import SasrecConfig
from couturier.components.interest.log import Log
from couturier.components.interest.log_fit import LogFit, LogFitConfig, fit_log

from .base import Comparison, planted_log

ITEMS, USERS, LENGTH, STAY = 40, 300, 16, 0.9


def successors(seed: int) -> np.ndarray:
    """The one item that follows each item, over one random cycle."""
    cycle = np.random.default_rng(seed).permutation(ITEMS)
    successor_I = np.empty(ITEMS, dtype=np.int64)
    successor_I[cycle] = np.roll(cycle, -1)
    return successor_I


def walks(seed: int, *, users: int = USERS, stay: float = STAY, shuffled: bool = False) -> list[list[int]]:
    """Walks of ``LENGTH`` items over the cycle; ``shuffled`` ones have lost their order."""
    random, successor_I = np.random.default_rng([seed, 1]), successors(seed)
    out = []
    for _ in range(users):
        walk = [int(random.integers(ITEMS))]
        while len(walk) < LENGTH:
            walk.append(int(successor_I[walk[-1]]) if random.random() < stay else int(random.integers(ITEMS)))
        out.append(random.permutation(walk).tolist() if shuffled else walk)
    return out


def fitted(log: Log, model: str, *, seed: int, steps: int) -> LogFit:
    """A judge of one kind, by identities alone."""
    config = LogFitConfig(
        seed=seed,
        model=model,
        steps=steps,
        batch=64,
        history=LENGTH,
        negatives=4,
        negative_kind="uniform",
        eval_every=max(1, steps // 4),
        learning_rate=1e-2,
        skip_seen=False,
        features=FeatureConfig(words=0, ids=32),
        sasrec=SasrecConfig(width=32, blocks=1, length=LENGTH, dropout=0.0),
        din=DinConfig(width=32),
    )
    return fit_log(log, Content.of_vectors(torch.zeros(ITEMS, 1)), config)


def ranked(log: Log, fit: LogFit) -> Ranking:
    """What was taken last, among the whole catalogue."""
    return HeldOut(log, "test", history=LENGTH).rank(fit.judge, skip_seen=False)


def compare(seed: int, folder: Path) -> Comparison:
    """SASRec against DIN on noisy walks: NDCG@10 of the next item. DIN, which learns from one place a step, has twice
    the steps."""
    taken = walks(seed)
    log = planted_log(folder, taken, ITEMS)
    ours, other = (
        ranked(log, fitted(log, model, seed=seed, steps=steps)) for model, steps in (("sasrec", 240), ("din", 480))
    )
    followed_U = np.array([walk[-1] == successors(seed)[walk[-2]] for walk in taken], dtype=np.float64)
    return Comparison(
        claim="SASRec reads order: the next item of a walk is found from the last one",
        ours="sasrec",
        other="din",
        figure="NDCG@10",
        ours_U=ours.ndcg(10),
        other_U=other.ndcg(10),
        best_U=followed_U,
    )
