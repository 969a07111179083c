"""RecTools in its own environment: SASRec and gSASRec with early stopping, EASE, and popularity.

Runs as ``python -m peers.rectools_peer`` from ``tests/benchmarks``. Traps met, and what is done about them:

* the column Weight multiplies SASRec's loss, so ratings there would weigh positions: it is 1 for all;
* datetimes that tie are ordered by row, so the position in the split stands in for the time;
* items that no training window holds are unknown to SASRec and cannot be recommended;
* ``epochs`` is 3 by default and nothing stops early: training goes on in rounds through ``fit_partial`` until NDCG@10
  on valid has not risen for ``patience`` rounds, and the test model is then trained that many epochs on train + valid.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as lightning  # type: ignore[import-not-found]
import torch
from rectools import Columns  # type: ignore[import-not-found]
from rectools.dataset import Dataset  # type: ignore[import-not-found]
from rectools.models import EASEModel, PopularModel, SASRecModel  # type: ignore[import-not-found]

from .adapter_io import K, arguments, fit_events, masked, ndcg, timed, truth, write_result, write_topk

TRANSFORMER = {
    "n_blocks": 2,
    "n_heads": 2,
    "n_factors": 64,
    "dropout_rate": 0.2,
    "session_max_len": 50,
    "lr": 1e-3,
    "batch_size": 128,
}


def frame(events: dict[str, Any]) -> pd.DataFrame:
    """RecTools' four columns; the position in the user's history stands in for the time."""
    return pd.DataFrame(
        {
            Columns.User: events["user"],
            Columns.Item: events["item"],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(events["position"], unit="s"),
        }
    )


def build(model: str, config: dict[str, Any]) -> Any:
    """A RecTools model by our name for it."""
    settings = {name: value for name, value in config.items() if name not in ("epochs", "patience", "round", "limit_s")}
    if model == "pop":
        return PopularModel()
    if model == "ease":
        return EASEModel(regularization=settings["regularization"])
    losses: dict[str, dict[str, Any]] = {
        "sasrec": {"loss": "softmax"},
        "gsasrec": {"loss": "gBCE", "n_negatives": 256, "gbce_t": 0.75},
    }
    return SASRecModel(**{**TRANSFORMER, **losses[model], **settings}, epochs=1, deterministic=True)


def recommend(model: Any, data: Any, users: list[int], mask: bool) -> pd.DataFrame:
    return model.recommend(users=users, dataset=data, k=K, filter_viewed=mask, on_unsupported_targets="warn")


def train_in_rounds(
    model: Any, data: Any, config: dict[str, Any], validate: Any, facts: dict[str, Any]
) -> pd.DataFrame | None:
    """Rounds of ``round`` epochs until valid stops rising; returns the best round's recommendations.

    Without ``validate`` it trains exactly ``epochs`` epochs. ``best_epochs`` and the curve go to ``facts``. A search
    for the best epoch ends after ``limit_s`` processor seconds of training, which ``facts`` then tells.
    """
    size, best, curve = config.get("round", 5), -1.0, []
    done, kept, since = 0, None, 0
    while done < config["epochs"] and since < config.get("patience", 4):
        step = min(size, config["epochs"] - done)
        with timed(facts, "fit_s"):
            model.fit_partial(data, min_epochs=step, max_epochs=step)
        done += step
        if validate is None:
            continue
        value, found = validate(model)
        curve.append([done, value])
        since += 1
        if value > best:
            best, kept, since, facts["best_epochs"] = value, copy.copy(found), 0, done
        if facts["cpu_fit_s"] > config.get("limit_s", math.inf):
            facts["stopped_by_limit"] = True
            break
    facts["epochs"], facts["curve"] = done, curve
    return kept


def run_topk(args: Any, facts: dict[str, Any]) -> None:
    task = args.form.removeprefix("topk-")
    data = Dataset.construct(frame(fit_events(args.split, task, args.stage)))
    wanted, mask = truth(args.split, task, args.stage), masked(args.split, task)
    users = sorted(wanted)
    model = build(args.model, args.config)
    found = None
    if isinstance(model, SASRecModel):

        def validate(fitted: Any) -> tuple[float, pd.DataFrame]:
            rows = recommend(fitted, data, users, mask)
            users_, items, ranks = (rows[name].to_numpy() for name in (Columns.User, Columns.Item, Columns.Rank))
            return ndcg(users_, items, ranks, wanted), rows

        stops_early = args.stage == "valid"
        found = train_in_rounds(model, data, args.config, validate if stops_early else None, facts)
    else:
        with timed(facts, "fit_s"):
            model.fit(data)
    if found is None:
        with timed(facts, "predict_s"):
            found = recommend(model, data, users, mask)
    write_topk(args.out, *(found[name].to_numpy() for name in (Columns.User, Columns.Item, Columns.Rank)))


def run_speed(args: Any, facts: dict[str, Any]) -> None:
    """Training alone: epochs a second after one to warm up, as sequences and as target positions a second."""
    events = fit_events(args.split, args.form.removeprefix("speed-"), "test")
    data = Dataset.construct(frame(events))
    settings = {name: value for name, value in args.config.items() if name != "seconds"}
    model = build(args.model, settings)
    model.fit_partial(data, min_epochs=1, max_epochs=1)
    lengths = np.minimum(np.bincount(events["user"]), model.session_max_len + 1)
    epochs, began, began_cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < args.config.get("seconds", 10):
        model.fit_partial(data, min_epochs=3, max_epochs=3)
        epochs += 3
    spent, spent_cpu = time.perf_counter() - began, time.process_time() - began_cpu
    positions = epochs * int((lengths[lengths > 1] - 1).sum())
    facts["sequences_per_s"] = epochs * int((lengths > 1).sum()) / spent
    facts["positions_per_s"], facts["positions_per_cpu_s"] = positions / spent, positions / spent_cpu
    facts["loss"] = float(model.fit_trainer.callback_metrics["train_loss"])
    facts["settings"] = {**TRANSFORMER, **settings}


def main() -> None:
    """Fit and recommend, or time the training."""
    args = arguments()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    lightning.seed_everything(args.seed, verbose=False)
    facts: dict[str, Any] = {"threads": torch.get_num_threads()}
    (run_speed if args.form.startswith("speed-") else run_topk)(args, facts)
    write_result(args.out, facts, ("rectools", "torch", "pytorch-lightning", "numpy"))


if __name__ == "__main__":
    main()
