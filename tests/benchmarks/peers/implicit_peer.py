"""implicit in its own environment: ALS, BPR and item neighbours (TF-IDF or BM25).

Runs as ``python -m peers.implicit_peer`` from ``tests/benchmarks``. Traps met:

* item and user numbers are rows of a matrix, so item 0 (padding) is a column that is never filled;
* ``recommend`` fills up with items of score -inf where a person has seen nearly everything: those rows are dropped;
* several BLAS threads and implicit's own slow each other down, so BLAS gets one.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from .adapter_io import K, arguments, fit_events, masked, timed, truth, write_result, write_topk


def build(model: str, config: dict[str, Any], seed: int) -> Any:
    """An implicit model by our name for it."""
    from implicit.als import AlternatingLeastSquares  # type: ignore[import-not-found]
    from implicit.bpr import BayesianPersonalizedRanking  # type: ignore[import-not-found]
    from implicit.nearest_neighbours import BM25Recommender, TFIDFRecommender  # type: ignore[import-not-found]

    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    if model == "als":
        return AlternatingLeastSquares(**config, random_state=seed, num_threads=threads, use_gpu=False)
    if model == "bpr":
        return BayesianPersonalizedRanking(**config, random_state=seed, num_threads=threads, use_gpu=False)
    settings = {name: value for name, value in config.items() if name != "weighting"}
    kinds = {"tfidf": TFIDFRecommender, "bm25": BM25Recommender}
    return kinds[config["weighting"]](**settings, num_threads=threads)


def main() -> None:
    """Fit on what a stage allows, recommend ten items to everybody, and write both down."""
    args = arguments()
    logging.getLogger("implicit").setLevel(logging.ERROR)
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    task = args.form.removeprefix("topk-")
    events, wanted = fit_events(args.split, task, args.stage), truth(args.split, task, args.stage)
    shape = (int(events["user"].max()) + 1, int(events["item"].max()) + 1)
    taken = csr_matrix((np.ones(len(events["user"]), dtype=np.float32), (events["user"], events["item"])), shape=shape)
    taken.sum_duplicates()
    users = np.array(sorted(wanted))
    facts: dict[str, Any] = {}
    model = build(args.model, args.config, args.seed)
    with timed(facts, "fit_s"):
        model.fit(taken, show_progress=False)
    with timed(facts, "predict_s"):
        items, scores = model.recommend(
            users, taken[users], N=K, filter_already_liked_items=masked(args.split, task), filter_items=[0]
        )
    ranks = np.broadcast_to(np.arange(1, K + 1), items.shape)
    real = np.isfinite(scores) & (scores > np.finfo(np.float32).min / 2) & (items > 0)
    owners = np.broadcast_to(users[:, None], items.shape)
    write_topk(args.out, owners[real], items[real], ranks[real])
    write_result(args.out, facts, ("implicit", "numpy", "scipy"))


if __name__ == "__main__":
    main()
