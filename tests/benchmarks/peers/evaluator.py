"""One evaluator for every library: it reads top-k lists and scores, never a library's own figure.

Libraries disagree about NDCG's discount and about ties (LensKit's NDCG of the same list differs from RecTools'), so
only lists and scores cross the process boundary.

    Hit@10   1 if any wanted item stands among the first ten
    NDCG@10  sum of 1 / log2(rank + 1) over wanted items, over the best that could be (min(wanted, 10) in front)
    MRR@10   1 / rank of the first wanted item
    gAUC     mean over users of the chance that a taken item outranks another, ties half (arXiv 1706.06978); weighted by
             impressions, which are equal here
    AUC, logloss  over all rows; scores that are no probabilities get no logloss
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from couturier.components.errors import DataError
from couturier.components.evaluation.statistics import Interval, bootstrap, paired_difference
from couturier.components.interest.metrics import Trial, user_auc

K = 10
RANKING = ("hit@10", "ndcg@10", "mrr@10")
CLICKS = ("gauc", "auc", "logloss")


@dataclass(frozen=True)
class PerUser:
    """A metric for each user, by rising user number; ``users`` are the numbers."""

    users: np.ndarray
    values: dict[str, np.ndarray]


def rank_metrics(topk: pl.DataFrame, truth: pl.DataFrame, seen: pl.DataFrame | None = None) -> PerUser:
    """Hit, NDCG and MRR at ten of each user of ``truth``; a user without a list gets nothing.

    Args:
        topk: ``user, item, rank``, ranks from 1.
        truth: ``user, item`` to be found.
        seen: ``user, item`` that may not stand in a list; None allows everything.

    Raises:
        DataError: a rank below 1, an item or a rank twice in one list, or an item that was to be left out.

    Example:
        >>> topk = pl.DataFrame({"user": [0, 0], "item": [5, 7], "rank": [1, 2]})
        >>> found = rank_metrics(topk, pl.DataFrame({"user": [0], "item": [7]}))
        >>> [round(float(found.values[name][0]), 4) for name in RANKING]
        [1.0, 0.6309, 0.5]
    """
    if topk.height and int(topk["rank"].to_numpy().min()) < 1:
        raise DataError("a list has a rank below 1; the first item's rank is 1.")
    for keys in (["user", "item"], ["user", "rank"]):
        if topk.select(keys).is_duplicated().any():
            raise DataError(f"a list holds the same {keys[1]} twice; each item and each rank may stand once.")
    if seen is not None and topk.join(seen, on=["user", "item"], how="semi").height:
        raise DataError("a list holds an item that the person had before; this task leaves such items out.")
    users = np.unique(truth["user"].to_numpy())
    hits = topk.filter(pl.col("rank") <= K).join(truth.unique(), on=["user", "item"], how="semi")
    owner = np.searchsorted(users, hits["user"].to_numpy())
    rank = hits["rank"].to_numpy().astype(float)
    wanted = np.bincount(np.searchsorted(users, truth.unique()["user"].to_numpy()), minlength=len(users))
    ideal = (1 / np.log2(np.arange(2, K + 2))).cumsum()[np.minimum(wanted, K) - 1]
    first = np.full(len(users), np.inf)
    np.minimum.at(first, owner, rank)
    gain = np.bincount(owner, weights=1 / np.log2(rank + 1), minlength=len(users))
    return PerUser(users, {"hit@10": np.isfinite(first).astype(float), "ndcg@10": gain / ideal, "mrr@10": 1 / first})


def click_metrics(scores: np.ndarray, rows: pl.DataFrame) -> tuple[PerUser, dict[str, float]]:
    """gAUC's terms by user, and the figures that belong to no user: ``auc`` and, for probabilities, ``logloss``.

    Args:
        scores: one for each row of ``rows``, in its order.
        rows: ``user, label`` of the split's ``ctr-<variant>-<stage>``.

    Raises:
        DataError: a wrong number of scores, or one that is no number.
    """
    if len(scores) != rows.height:
        raise DataError(f"{len(scores)} scores came for {rows.height} rows; each row of the split needs its score.")
    user, label = rows["user"].to_numpy(), rows["label"].to_numpy().astype(bool)
    trial = Trial(items_WC=np.zeros((len(scores), 1), dtype=np.int64), taken_WC=label[:, None])
    by_user = user_auc(np.asarray(scores)[:, None], trial, user)
    whole = user_auc(np.asarray(scores)[:, None], trial, np.zeros(len(scores), dtype=np.int64))
    figures = {"auc": float(whole.auc_U[0])}
    if scores.min() >= 0 and scores.max() <= 1:
        clipped = np.clip(scores, 1e-7, 1 - 1e-7)
        figures["logloss"] = float(-np.where(label, np.log(clipped), np.log1p(-clipped)).mean())
    return PerUser(by_user.users, {"gauc": by_user.auc_U}), figures


def mean_over_seeds(runs: list[PerUser]) -> PerUser:
    """The mean of each user's figures over seeds.

    Raises:
        DataError: no run, or runs over different users.
    """
    if not runs or any(not np.array_equal(run.users, runs[0].users) for run in runs):
        raise DataError("seeds of one model were measured on different users, so they cannot be averaged.")
    return PerUser(
        runs[0].users, {name: np.mean([run.values[name] for run in runs], axis=0) for name in runs[0].values}
    )


def intervals(run: PerUser, *, seed: int = 0) -> dict[str, Interval]:
    """Mean and 95 % bootstrap interval over users, by metric."""
    return {name: bootstrap(values, seed=seed) for name, values in run.values.items()}


def difference(ours: PerUser, theirs: PerUser, metric: str, *, seed: int = 0) -> Interval:
    """Mean over users of ours minus theirs, paired, with its interval: a gain where the lower end is above zero.

    Raises:
        DataError: the two were measured on different users.
    """
    if not np.array_equal(ours.users, theirs.users):
        raise DataError("the two sides were measured on different users; give both the same split.")
    return paired_difference(ours.values[metric], theirs.values[metric], seed=seed)
