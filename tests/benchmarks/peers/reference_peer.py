"""What needs no library, and what every library must beat.

``favourites``: what a person took most often, the newest first among equals. Where people take things again this is the
control to beat; it recommends nothing that a person has not had. ``popularity``, for the click form: how often an item
was taken in training, which popularity-matched negatives are to make worthless.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .adapter_io import K, arguments, columns, fit_events, timed, truth, write_result, write_scores, write_topk


def favourites(args: Any, facts: dict[str, Any]) -> None:
    """Ten favourites of everybody."""
    task = args.form.removeprefix("topk-")
    events, wanted = fit_events(args.split, task, args.stage), truth(args.split, task, args.stage)
    with timed(facts, "fit_s"):
        width = int(events["item"].max()) + 1
        newest_first = (events["user"] * width + events["item"])[::-1]
        keys, last, count = np.unique(newest_first, return_index=True, return_counts=True)
        order = np.lexsort((last, -count, keys // width))
        users, items = np.divmod(keys[order], width)
    with timed(facts, "predict_s"):
        begins = np.r_[True, np.diff(users) != 0]
        ranks = np.arange(len(users)) - np.flatnonzero(begins)[begins.cumsum() - 1] + 1
        kept = (ranks <= K) & np.isin(users, list(wanted))
    write_topk(args.out, users[kept], items[kept], ranks[kept])


def popularity(args: Any, facts: dict[str, Any]) -> None:
    """Each candidate's share of what was taken in training."""
    variant = args.form.removeprefix("ctr-")
    with timed(facts, "fit_s"):
        train = columns(args.split / f"ctr-{variant}-train.parquet")
        taken = train["item"][train["label"] == 1]
    with timed(facts, "predict_s"):
        rows = columns(args.split / f"ctr-{variant}-{args.stage}.parquet")["item"]
        scores = np.bincount(taken, minlength=int(rows.max()) + 1)[rows]
    write_scores(args.out, -1.0 - 1.0 / (1.0 + scores))  # no probabilities, so no logloss


def main() -> None:
    """Rank or score without having learned anything."""
    args, facts = arguments(), dict[str, Any]()
    {"favourites": favourites, "popularity": popularity}[args.model](args, facts)
    write_result(args.out, facts, ("numpy",))


if __name__ == "__main__":
    main()
