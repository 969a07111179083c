"""Does a judge read the history? GAUC on people it has not met, at later times, beside what must not do as well."""

from __future__ import annotations

import math

import numpy as np
import torch

from couturier.components.data.formats import Windows
from couturier.components.errors import DataError
from couturier.components.interest.judge import history_batch
from couturier.components.interest.metrics import Popularity, Trial, interval, trial, user_auc, wrong_users
from couturier.components.interest.types import Judge
from couturier.components.runtime import seeded_numpy

_CHUNK = 256  # windows scored at a time


@torch.no_grad()
def scores_of(
    judge: Judge, windows: Windows, of: Trial, *, history_of_W: np.ndarray | None = None, words: bool = False
) -> np.ndarray:
    """Logits ``[W, C]`` of a trial's candidates.

    Args:
        history_of_W: the window whose history stands in for each window's (the wrong-user control).
        words: whether candidates come with their words; histories always do.
    """
    rows_W = np.arange(len(windows)) if history_of_W is None else history_of_W
    history_ID, candidates_ID = judge.embed_items(), judge.embed_items(words=words)
    parts = [np.zeros((0, of.items_WC.shape[1]), dtype=np.float32)]
    for start in range(0, len(rows_W), _CHUNK):
        state = judge.encode(history_batch(windows, rows_W[start : start + _CHUNK], history_ID))
        items_UC = torch.from_numpy(of.items_WC[start : start + _CHUNK].clip(min=0))
        parts.append(judge.score(state, candidates_ID[items_UC]).numpy())
    return np.concatenate(parts)


def prove(
    judge: Judge, windows: Windows, popularity: Popularity, *, negatives_a_window: int, seed: int
) -> dict[str, float | int]:
    """GAUC with 95 % intervals over users, of candidates seen without words unless the name says otherwise.

    ``gauc``; ``gauc_wrong_user``, the same candidates with another user's history; ``difference``, the paired gap
    between the two; ``gauc_popularity``, by what the negatives were drawn by; ``gauc_new``, of candidates that the
    history does not hold; ``gauc_with_words``. Each has ``_low`` and ``_high``.

    Raises:
        DataError: no test window has a basket.
    """
    if not len(windows.basket):
        raise DataError("no test window has a basket, so nobody can say what the judge is worth; add later events.")
    shown = seeded_numpy(seed, "judge", "trial", "test")
    of = trial(windows, popularity, len(popularity.share_I), negatives_a_window, shown)
    lent_W = wrong_users(windows.user_W, seeded_numpy(seed, "judge", "wrong users"))
    scores_WC = scores_of(judge, windows, of)
    history_WK = np.concatenate([windows.favourites_WK, windows.recent_WK], axis=1)
    known_WC = (of.items_WC[:, :, None] == history_WK[:, None]).any(-1)
    right = user_auc(scores_WC, of, windows.user_W)
    wrong = user_auc(scores_of(judge, windows, of, history_of_W=lent_W), of, windows.user_W)
    rows = {
        "gauc": right,
        "gauc_wrong_user": wrong,
        "gauc_popularity": user_auc(popularity.share_I[of.items_WC.clip(min=0)], of, windows.user_W),
        "gauc_new": user_auc(scores_WC, of, windows.user_W, keep_WC=~known_WC),
        "gauc_with_words": user_auc(scores_of(judge, windows, of, words=True), of, windows.user_W),
    }
    values = {name: (row.auc_U, row.impressions_U) for name, row in rows.items()}
    values["difference"] = (right.auc_U - wrong.auc_U, right.impressions_U)
    out: dict[str, float | int] = {}
    for name, (value_U, weight_U) in values.items():
        found = interval(value_U, weight_U, seeded_numpy(seed, "judge", "bootstrap"))
        out |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    out = {name: round(value, 5) for name, value in out.items() if not math.isnan(value)}
    return out | {"users": len(right.users), "windows": len(windows)}
