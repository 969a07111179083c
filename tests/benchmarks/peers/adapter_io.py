"""What every adapter process shares: its arguments, the split's tables, and the files it leaves.

Runs inside a peer's own environment, so it needs numpy and pyarrow and nothing of ours.

    arguments ─▶ adapter ─▶ topk.parquet (user, item, rank) or scores.parquet (score, a row of the split each)
                         └▶ result.json (fit_s, predict_s, peak_bytes, samples a second, versions)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

K = 10
ROLES = ("train", "valid", "test")


def arguments() -> argparse.Namespace:
    """``--split --form --stage --model --config --seed --out`` as the runner passes them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--form", required=True, help="topk-<task>, ctr-<variant> or speed-<task or variant>")
    parser.add_argument("--stage", choices=("valid", "test"), default="test")
    parser.add_argument("--model", required=True)
    parser.add_argument("--config", default="{}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    parsed.config = json.loads(parsed.config)
    return parsed


def columns(path: Path) -> dict[str, Any]:
    """A Parquet file as numpy columns."""
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def fit_events(split: Path, task: str, stage: str) -> dict[str, Any]:
    """What may be learned from at a stage: train for valid, train and valid for test. In each user's order."""
    events = columns(split / f"topk-{task}.parquet")
    keep = np.isin(events["role"], ROLES[: ROLES.index(stage)])
    return {name: values[keep] for name, values in events.items()}


def truth(split: Path, task: str, stage: str) -> dict[int, set[int]]:
    """The items to be found, by user."""
    events = columns(split / f"topk-{task}.parquet")
    found: dict[int, set[int]] = {}
    for user, item, role in zip(events["user"], events["item"], events["role"], strict=True):
        if role == stage:
            found.setdefault(int(user), set()).add(int(item))
    return found


def masked(split: Path, task: str) -> bool:
    """Whether seen items are left out of a task."""
    return bool(json.loads((split / "meta.json").read_text(encoding="utf-8"))["mask_seen"][task])


def ndcg(users: np.ndarray, items: np.ndarray, ranks: np.ndarray, wanted: dict[int, set[int]]) -> float:
    """NDCG@10 for early stopping inside an adapter. The table's figures come from the one evaluator, not from here."""
    gain = {user: 0.0 for user in wanted}
    for user, item, rank in zip(users.tolist(), items.tolist(), ranks.tolist(), strict=True):
        if rank <= K and item in wanted[user]:
            gain[user] += 1 / float(np.log2(rank + 1))
    ideal = 1 / np.log2(np.arange(2, K + 2))
    return float(np.mean([gain[user] / ideal[: len(items)].sum() for user, items in wanted.items()]))


@contextmanager
def timed(facts: dict[str, Any], name: str) -> Iterator[None]:
    """Add the seconds of a block to ``facts[name]``: of the wall, and of the processor as ``cpu_<name>``.

    On a machine that other work shares, only the processor's seconds say what a fit costs.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    yield
    facts[name] = facts.get(name, 0.0) + time.perf_counter() - began
    facts[f"cpu_{name}"] = facts.get(f"cpu_{name}", 0.0) + time.process_time() - began_cpu


def write_topk(out: Path, users: np.ndarray, items: np.ndarray, ranks: np.ndarray) -> None:
    out.mkdir(parents=True, exist_ok=True)
    arrays = {"user": users.astype(np.int64), "item": items.astype(np.int64), "rank": ranks.astype(np.int64)}
    pq.write_table(pa.table(arrays), out / "topk.parquet")


def write_scores(out: Path, scores: np.ndarray) -> None:
    """One score for each row of the split's ``ctr-<variant>-<stage>.parquet``, in that order."""
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"score": np.asarray(scores, dtype=np.float64)}), out / "scores.parquet")


def peak_bytes() -> int:
    """The most memory this process has held.

    ``ru_maxrss`` outlives exec, so that of a child is at least what its parent held; Linux's high-water mark is not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_result(out: Path, facts: dict[str, Any], packages: tuple[str, ...]) -> None:
    """``result.json``, written last: where it lies, the run is whole."""
    out.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in packages}
    text = json.dumps({**facts, "peak_bytes": peak_bytes(), "versions": versions}, indent=2, sort_keys=True)
    (out / "result.json").write_text(text + "\n", encoding="utf-8")
