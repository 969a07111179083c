"""Cost and memory of a fit over a log that grows: one epoch from 100 thousand to 1.4 million real purchases.

    OMP_NUM_THREADS=1 python tests/benchmarks/fit_scaling.py --data data --json

Logs are whole households of The Complete Journey (``couturier ingest`` fills ``data``), in a random order, until there
are enough events; ``--drawn`` draws a log of as many events instead. Writing the log and fitting on it each run in a
process of their own, whose CPU time and peak memory are what is shown; the same judge, batch and shard size throughout.
The table and the plot go to ``tests/benchmarks/results``. A ratio per doubling of 2 is a cost in proportion to events.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judge import JUDGES
from couturier.components.interest.log import Log, write_log
from couturier.components.interest.log_examples import moments
from couturier.components.interest.log_fit import LogFitConfig, fit_log
from couturier.components.lineage.provenance import code_commit
from couturier.components.runtime import device_facts

SIZES = (100_000, 200_000, 400_000, 800_000, 1_400_000)
RESULTS = Path(__file__).resolve().parent / "results"
SHARD_ROWS, BUFFER, SEED = 8_192, 4, 0
ITEMS_FILE, EVENTS_FILE = "items.txt", "events.parquet"


def of_households(data: Path, folder: Path, size: int) -> None:
    """Events of whole households until there are ``size``."""
    events = pl.scan_parquet(data / EVENTS_FILE).select("user_id", "item_id", "timestamp", "kind", "value")
    users = events.group_by("user_id").len().sort("user_id").collect().sample(fraction=1.0, shuffle=True, seed=SEED)
    chosen = users.filter(pl.col("len").cum_sum() - pl.col("len") < size)["user_id"].implode()
    part = events.filter(pl.col("user_id").is_in(chosen)).collect()
    part.write_parquet(folder / EVENTS_FILE, row_group_size=1 << 17)
    items = pl.read_parquet(data / "items.parquet", columns=["item_id"])["item_id"]
    (folder / ITEMS_FILE).write_text("\n".join(items), encoding="utf-8")


def drawn(folder: Path, size: int, *, items: int = 1_500, each: int = 600) -> None:
    """A drawn log: users of ``each`` events, items by Zipf's law."""
    random = np.random.default_rng(SEED)
    chance_I = 1 / np.arange(1, items + 1)
    user_N = np.repeat(np.arange(math.ceil(size / each)), each)[:size]
    frame = pl.DataFrame(
        {
            "user_id": [f"u{user:06d}" for user in user_N],
            "item_id": [f"i{item:06d}" for item in random.choice(items, size, p=chance_I / chance_I.sum())],
            "timestamp": pl.Series(random.integers(0, 10**15, size)).cast(pl.Datetime("us", "UTC")),
            "kind": ["purchase"] * size,
            "value": np.zeros(size),
        }
    )
    frame.write_parquet(folder / EVENTS_FILE, row_group_size=1 << 17)
    (folder / ITEMS_FILE).write_text("\n".join(f"i{item:06d}" for item in range(items)), encoding="utf-8")


def phase(name: str, folder: Path, model: str) -> dict[str, Any]:
    """``write``, ``fit`` or ``start`` (a fit of one step), in this process: CPU seconds and peak memory."""
    began = time.process_time()
    facts: dict[str, Any]
    if name == "write":
        items = (folder / ITEMS_FILE).read_text(encoding="utf-8").split("\n")
        log = write_log(folder / EVENTS_FILE, items, folder / "log", rows_per_shard=SHARD_ROWS)
        facts = {"events": log.events, "users": log.users, "shards": log.shards}
    else:
        facts = _fit(Log(folder / "log"), model, most=1 if name == "start" else 10**9)
        began += facts.pop("preparing_s")
    spent = time.process_time() - began
    return {**facts, "cpu_s": spent, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """Largest resident memory of this process. Not ``ru_maxrss``: a child begins with its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def _fit(log: Log, model: str, *, most: int) -> dict[str, Any]:
    """One epoch, or ``most`` steps. Counting how many those are is no part of a fit and is not timed."""
    began = time.process_time()
    config = LogFitConfig(
        model=model,
        batch=64,
        history=50,
        pool=-1,
        negatives=4,
        buffer_shards=BUFFER,
        features=FeatureConfig(words=0, ids=32),
        valid_users=32,
        eval_every=10**9,
    )
    pieces = JUDGES[model].every_position
    examples = sum(
        len(moments(log.shard(index), holdout=config.holdout, history=config.history, pieces=pieces)[0])
        for index in range(log.shards)
    )
    vectors = torch.randn(log.items, 32, generator=torch.Generator().manual_seed(SEED))
    steps = min(most, max(1, examples // config.batch))
    preparing = time.process_time() - began
    settings = {**vars(config), "steps": steps, "checkpoint_every": 10**9}
    fit_log(log, Content.of_vectors(vectors), LogFitConfig(**settings))
    return {"examples": examples, "steps": steps, "preparing_s": preparing}


def measured(data: Path | None, model: str, sizes: tuple[int, ...], turns: int) -> tuple[float, list[dict[str, Any]]]:
    """CPU seconds that a fit of one step takes (starting up), and a row a size: the least seconds of all turns, since
    whatever else the host does only ever adds, and the most memory."""
    rows: list[dict[str, Any]] = [{} for _ in sizes]
    start = math.inf
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place, str(size)) for size in sizes]
        for folder, size in zip(folders, sizes, strict=True):
            folder.mkdir()
            of_households(data, folder, size) if data else drawn(folder, size)
        # Every size once before any comes again: a host that slows down for minutes slows all of them.
        for _ in range(turns):
            for folder, row in zip(folders, rows, strict=True):
                for name in ("write", "fit"):
                    _better(row, name, _run(name, folder, model))
                sys.stderr.write(f"{json.dumps(row)}\n")
            start = min(start, _run("start", folders[0], model)["cpu_s"])
    return start, rows


def _better(row: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """Put what a phase found into the row of its size, unless an earlier turn found better."""
    for key, pick in (("cpu_s", min), ("peak_mb", max)):
        value, place = found.pop(key), f"{name}_{key}"
        row[place] = pick(row.get(place, value), value)
    row |= found


def _run(name: str, folder: Path, model: str) -> dict[str, Any]:
    """A phase in a process of its own."""
    command = [sys.executable, __file__, "--phase", name, "--folder", str(folder), "--judge", model]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def per_doubling(rows: list[dict[str, Any]], figure: str, *, less: float = 0.0) -> list[float]:
    """``2 ** (log of the ratio of figures / log of the ratio of events)`` between neighbours, then from end to end."""
    pairs = [*zip(rows[:-1], rows[1:], strict=True), (rows[0], rows[-1])]
    return [
        2 ** (math.log((after[figure] - less) / (before[figure] - less)) / math.log(after["events"] / before["events"]))
        for before, after in pairs
    ]


def report(result: dict[str, Any], folder: Path) -> None:
    """``fit_scaling.md``, ``fit_scaling.json`` and ``fit_scaling.png``."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    rows, ratios = result["rows"], ["", *(f"{value:.2f}" for value in result["fit_per_doubling"][:-1])]
    lines = [
        "# Cost and memory of a fit over a growing log",
        "",
        f"{result['source']}; judge `{result['judge']}`, one epoch, batch 64, history 50, one thread. "
        f"{result['date']}, {result['machine']}, commit {result['commit'][:12]}. CPU seconds (the "
        f"least of {result['turns']} turns) and peak memory of a process of its own (the imports alone: "
        f"{result['idle_mb']:.0f} MB). "
        f"Ratios are of the fit less the {result['start_cpu_s']:.2f} s that a fit of one step takes to start up.",
        "",
        "| events | write the log, s | peak, MB | fit, s | per doubling | peak, MB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row, ratio in zip(rows, ratios, strict=True):
        lines.append(
            f"| {row['events']:,} | {row['write_cpu_s']:.2f} | {row['write_peak_mb']:.0f} | {row['fit_cpu_s']:.1f} "
            f"| {ratio} | {row['fit_peak_mb']:.0f} |"
        )
    lines += ["", f"From end to end a doubling of events costs {result['fit_per_doubling'][-1]:.2f} times as much.", ""]
    lines += ["Made by `tests/benchmarks/fit_scaling.py`.", ""]
    (folder / "fit_scaling.md").write_text("\n".join(lines), encoding="utf-8")
    (folder / "fit_scaling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    cost, memory = figure.subplots(1, 2)
    events = [row["events"] for row in rows]
    cost.loglog(events, [row["fit_cpu_s"] for row in rows], "o-", label="fit")
    cost.loglog(events, [row["write_cpu_s"] for row in rows], "s-", label="write the log")
    first = rows[0]["fit_cpu_s"]
    cost.loglog(events, [first * count / events[0] for count in events], "k:", label="in proportion")
    cost.set(xlabel="events", ylabel="CPU seconds", title="cost of one epoch")
    memory.semilogx(events, [row["fit_peak_mb"] for row in rows], "o-", label="fit")
    memory.semilogx(events, [row["write_peak_mb"] for row in rows], "s-", label="write the log")
    memory.axhline(result["idle_mb"], color="k", linestyle=":", label="imports alone")
    memory.set(xlabel="events", ylabel="MB", title="peak memory", ylim=(0, None))
    for axes in (cost, memory):
        axes.legend()
    figure.savefig(folder / "fit_scaling.png", dpi=110)


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with events.parquet and items.parquet")
    parser.add_argument("--drawn", action="store_true", help="a drawn log instead of data")
    parser.add_argument("--judge", default="mqsa_ted", choices=sorted(JUDGES))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--turns", type=int, default=3, help="how often each size is measured; the least counts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object in the last line")
    parser.add_argument("--phase", choices=["write", "fit", "start"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    idle = peak_mb()
    if given.phase:
        torch.set_num_threads(1)
        sys.stdout.write(json.dumps(phase(given.phase, given.folder, given.judge)) + "\n")
        return
    data = None if given.drawn else given.data
    start, rows = measured(data, given.judge, tuple(given.sizes), given.turns)
    facts = device_facts()
    result = {
        "source": "a drawn log" if given.drawn else "The Complete Journey, whole households",
        "judge": given.judge,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{facts['machine']}, {facts['cores']} cores, torch {facts['torch']}",
        "commit": code_commit(Path(__file__).resolve().parents[2]),
        "turns": given.turns,
        "idle_mb": idle,
        "start_cpu_s": start,
        "rows": rows,
        "fit_per_doubling": per_doubling(rows, "fit_cpu_s", less=start),
        "write_per_doubling": per_doubling(rows, "write_cpu_s"),
    }
    report(result, given.out)
    told = json.dumps(result) if given.json else (given.out / "fit_scaling.md").read_text(encoding="utf-8")
    sys.stdout.write(told + "\n")


if __name__ == "__main__":
    main()
