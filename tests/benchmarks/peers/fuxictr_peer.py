"""FuxiCTR's LongCTR models in their own environment: DIN, SDIM and TWIN on the click form of the split.

Runs as ``python -m peers.fuxictr_peer`` from ``tests/benchmarks``. Traps met, and what is done about them:

* every column must be an integer: a float label turns the indices into floats, and the loader fails;
* features of items need ``source: item``, or the models see no history; the feature map is written by hand, since the
  preprocessor would number the items anew;
* the label takes a column of its own, the history is read as the first ``seq_len`` items of the user's whole list;
* the checkpoint's folder must exist before ``fit``, and ``fit`` ends by loading the best epoch from it;
* SDIM and TWIN cut the newest ``short_seq_len`` from T + 1 items but the mask from T, so that a batch whose longest
  history is below ``short_seq_len`` - 1 fails: batches are large enough here to hold a long history;
* the loader forks a worker a pass by default; fits read in the process, speeds are measured both ways.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuxictr.features import FeatureMap  # type: ignore[import-not-found]
from fuxictr.pytorch.dataloaders import RankDataLoader  # type: ignore[import-not-found]
from fuxictr.pytorch.torch_utils import seed_everything  # type: ignore[import-not-found]

from .adapter_io import arguments, columns, timed, write_result, write_scores

DEFAULTS: dict[str, Any] = {
    "gpu": -1,
    "task": "binary_classification",
    "optimizer": "adam",
    "loss": "binary_crossentropy",
    "metrics": ["gAUC", "AUC", "logloss"],
    "monitor": "gAUC",
    "monitor_mode": "max",
    "group_id": "user_index",
    "early_stop_patience": 1,
    "embedding_dim": 16,
    "max_len": 50,
    "batch_size": 256,
    "epochs": 8,
    "learning_rate": 1e-3,
    "dnn_hidden_units": [128, 64],
    "net_dropout": 0.1,
    "verbose": 0,
    "num_workers": 0,
    "shuffle": True,
}
OWN: dict[str, dict[str, Any]] = {
    "din": {"attention_hidden_units": [64], "attention_hidden_activations": "Dice"},
    "sdim": {"num_hashes": 8, "hash_bits": 2, "l2_norm": True, "attention_dim": 32, "num_heads": 1},
    "twin": {"topk": 20, "attention_dim": 32, "num_heads": 1},
}


def longctr() -> Path:
    """Where the wheel keeps its LongCTR models, which import each other as top-level modules."""
    spec = find_spec("model_zoo")
    assert spec is not None and spec.submodule_search_locations, "fuxictr's wheel brings no model_zoo"
    return Path(next(iter(spec.submodule_search_locations))) / "LongCTR"


def write_tables(split: Path, variant: str, folder: Path) -> dict[str, str]:
    """The split in LongCTR's layout; paths by the names of its settings."""
    paths = {}
    for stage in ("train", "valid", "test"):
        rows = columns(split / f"ctr-{variant}-{stage}.parquet")
        names = {"user_index": "user", "item_index": "item", "seq_len": "seq_len", "is_click": "label"}
        table = pa.table({new: rows[old].astype(np.int64) for new, old in names.items()})
        pq.write_table(table, folder / f"{stage}.parquet")
        paths[f"{stage}_data"] = str(folder / f"{stage}.parquet")
    events = columns(split / "events.parquet")
    bounds = np.flatnonzero(np.diff(events["user"])) + 1
    lists = [part.tolist() for part in np.split(events["item"], bounds)]
    users = np.arange(len(lists))
    pq.write_table(pa.table({"user_index": users, "full_item_seq": lists}), folder / "user_info.parquet")
    items = columns(split / "items.parquet")
    pad = np.zeros(1, dtype=np.int64)
    item_ids = np.concatenate([pad, items["item"]])
    table = pa.table({"item_index": item_ids, "item_id": item_ids, "cate_id": np.concatenate([pad, items["category"]])})
    pq.write_table(table, folder / "item_info.parquet")
    return {**paths, **{name: str(folder / f"{name}.parquet") for name in ("user_info", "item_info")}}


def feature_map(split: Path, folder: Path, config: dict[str, Any]) -> Any:
    """The features: item id and category of the candidate and of the history; user and length only to find them."""
    meta = json.loads((split / "meta.json").read_text(encoding="utf-8"))
    item = {"type": "categorical", "source": "item", "padding_idx": 0}
    specs = {
        "user_index": {"type": "meta"},
        "item_index": {"type": "meta"},
        "seq_len": {"type": "meta"},
        "item_id": {**item, "vocab_size": meta["items"] + 1},
        "cate_id": {**item, "vocab_size": meta["categories"] + 1},
    }
    total = meta["items"] + meta["categories"] + 2
    written = {
        "dataset_id": "split",
        "labels": ["is_click"],
        "total_features": total,
        "input_length": len(specs),
        "num_fields": 2,
        "features": [{name: spec} for name, spec in specs.items()],
    }
    path = folder / "feature_map.json"
    path.write_text(json.dumps(written), encoding="utf-8")
    found = FeatureMap("split", str(folder))
    found.load(str(path), config)
    return found


def prepared(args: Any, variant: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A fresh model and the settings its loaders take."""
    sys.path.insert(0, str(longctr()))
    from longctr_dataloader import LongCTRDataLoader  # type: ignore[import-not-found]

    config = {**DEFAULTS, **OWN[args.model], **args.config}
    config |= write_tables(args.split, variant, folder)
    config |= {"model_root": str(folder), "model_id": args.model, "data_loader": LongCTRDataLoader}
    (folder / "split").mkdir(exist_ok=True)
    features = feature_map(args.split, folder, config)
    name = args.model.upper()
    module = __import__(f"model_zoo.LongCTR.{name}.{name}", fromlist=[name])
    return vars(module)[name](features, **config), config


class _Clock:
    """Counts the rows that a model trains on and the seconds that takes, without the passes over valid."""

    def __init__(self, model: Any) -> None:
        self.rows, self.seconds, self.epochs = 0, 0.0, 0
        self._step, self._eval, self._began = model.train_step, model.eval_step, 0.0
        self._model = model
        model.train_step, model.eval_step = self.step, self.evaluate

    def step(self, batch: Any) -> Any:
        self.rows += len(batch[2])
        return self._step(batch)

    def evaluate(self) -> None:
        """FuxiCTR evaluates inside the epoch; the clock stands still meanwhile."""
        began = time.perf_counter()
        self.epochs += 1
        self._eval()
        self.seconds -= time.perf_counter() - began


def run_ctr(args: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Train with early stopping on valid's gAUC, then score a stage with the best epoch."""
    model, config = prepared(args, args.form.removeprefix("ctr-"), folder)
    train, valid = RankDataLoader(model.feature_map, stage="train", **config)
    clock = _Clock(model)
    with timed(facts, "fit_s"):
        model.fit(train, validation_data=valid, **config)
    facts["epochs"], facts["rows_per_s"] = clock.epochs, clock.rows / (facts["fit_s"] + clock.seconds)
    test = RankDataLoader(model.feature_map, stage="test", **{**config, "test_data": config[f"{args.stage}_data"]})
    with timed(facts, "predict_s"):
        scores = model.predict(test)
    write_scores(args.out, scores)


def run_speed(args: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Training alone, loader included: rows a second over ``seconds`` after a warm-up."""
    model, config = prepared(args, args.form.removeprefix("speed-"), folder)
    train, _ = RankDataLoader(model.feature_map, stage="train", **config)
    model._max_gradient_norm, model._batch_index = 10.0, 0
    model.train()
    limit, rows, began, began_cpu = float(args.config.get("seconds", 10)), 0, 0.0, 0.0
    while not rows or time.perf_counter() - began < limit:
        for index, batch in enumerate(train):
            model.train_step(batch).item()
            if index == 3 and not began:
                began, began_cpu, rows = time.perf_counter(), time.process_time(), 0
                continue
            rows += len(batch[2])
            if began and time.perf_counter() - began >= limit:
                break
    facts["rows_per_s"] = rows / (time.perf_counter() - began)
    if not config["num_workers"]:  # a worker's seconds would be missing
        facts["rows_per_cpu_s"] = rows / (time.process_time() - began_cpu)
    facts["settings"] = {name: config[name] for name in ("embedding_dim", "max_len", "batch_size", "dnn_hidden_units")}


def main() -> None:
    """Fit and score, or time the training."""
    args = arguments()
    logging.disable(logging.INFO)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    seed_everything(seed=args.seed)
    facts: dict[str, Any] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(prefix="fuxictr-") as name:
        (run_speed if args.form.startswith("speed-") else run_ctr)(args, Path(name), facts)
    write_result(args.out, facts, ("fuxictr", "torch", "numpy", "pandas"))


if __name__ == "__main__":
    main()
