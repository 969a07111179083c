"""Every planted world over several seeds: does each mechanism win where its paper says it does, and by how much.

    OMP_NUM_THREADS=1 python tests/benchmarks/worlds.py --seeds 3 --out tests/benchmarks/results

A row is one world: the judge its paper is about, the judge beside it on the same log with the same budget, the best
possible score where it is known, and the difference with its 95 % intervals: over users (of all seeds together), and
over seeds (Student's t of their means), which also knows that a fit may go well or badly. Each world is written when
it is done, beside the worlds that are there already, so ``--worlds dare,hcn`` measures those two again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from couturier.kernels.timing import provenance

ROOT = Path(__file__).resolve().parents[2]
WORLDS = ROOT / "tests" / "interest" / "worlds"


def names() -> list[str]:
    """The worlds there are."""
    return sorted(path.stem for path in WORLDS.glob("*.py") if path.stem not in ("base", "__init__"))


def run(name: str, seeds: int, first: int = 0) -> dict[str, Any]:
    """One world over ``seeds`` seeds from ``first``."""
    sys.path.insert(0, str(ROOT))
    world = importlib.import_module(f"tests.interest.worlds.{name}")
    found, began = [], time.process_time()
    for seed in range(first, first + seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(world.compare(seed, Path(folder)))
        sys.stderr.write(f"  {name} seed {seed}: {found[-1].difference()[0]:+.4f}\n")
    best = [one.best_U for one in found if one.best_U is not None]
    whole = dataclasses.replace(
        found[0],
        ours_U=np.concatenate([one.ours_U for one in found]),
        other_U=np.concatenate([one.other_U for one in found]),
    )
    mean, low, high = whole.difference()
    by_seed = [one.difference()[0] for one in found]
    return {
        "claim": whole.claim,
        "figure": whole.figure,
        "ours": [whole.ours, float(whole.ours_U.mean())],
        "other": [whole.other, float(whole.other_U.mean())],
        "best": float(np.concatenate(best).mean()) if len(best) == len(found) else None,
        "difference": [mean, low, high],
        "difference_over_seeds": over_seeds(by_seed),
        "by_seed": by_seed,
        "first_seed": first,
        "users": len(whole.ours_U),
        "cpu_s": round(time.process_time() - began, 1),
    } | provenance()


def over_seeds(by_seed: list[float]) -> list[float] | None:
    """``[low, high]`` of the mean over seeds, Student's t; None for one seed."""
    if len(by_seed) < 2:
        return None
    half = float(t.ppf(0.975, len(by_seed) - 1) * np.std(by_seed, ddof=1) / len(by_seed) ** 0.5)
    return [float(np.mean(by_seed)) - half, float(np.mean(by_seed)) + half]


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table, with when and where each row was measured."""
    lines = [
        "# Planted worlds",
        "",
        "By `tests/benchmarks/worlds.py`; a world is `tests/interest/worlds/<name>.py`. Intervals are of 95 %.",
        "",
        "| world | claim | figure | ours | beside it | best possible | difference, over users | over seeds | by seed "
        "| CPU s | measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        mean, low, high = row["difference"]
        first = row.get("first_seed", 0)
        best = "" if row["best"] is None else f"{row['best']:.3f}"
        seeds, figure = row["difference_over_seeds"], row["figure"].replace("|", "\\|")
        lines.append(
            f"| {name} | {row['claim']} | {figure} | {row['ours'][0]} {row['ours'][1]:.3f} "
            f"| {row['other'][0]} {row['other'][1]:.3f} | {best} | {mean:+.4f} [{low:+.4f}, {high:+.4f}] "
            f"| {'' if seeds is None else f'[{seeds[0]:+.4f}, {seeds[1]:+.4f}]'} "
            f"| {first} to {first + len(row['by_seed']) - 1}: {', '.join(f'{value:+.3f}' for value in row['by_seed'])} "
            f"| {row['cpu_s']:.0f} "
            f"| {row['date']}, commit {row['commit']}, {row['machine']} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Ours minus the judge beside it, a line a world: the interval over users, and each seed as a dot."""
    from matplotlib.figure import Figure

    names = list(rows)[::-1]
    figure = Figure(figsize=(7, 1 + 0.4 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="0.6", linewidth=0.8)
    for place, name in enumerate(names):
        mean, low, high = rows[name]["difference"]
        axis.plot([low, high], [place, place], color="tab:blue", linewidth=3, alpha=0.5)
        axis.plot(rows[name]["by_seed"], [place] * len(rows[name]["by_seed"]), ".", color="0.3")
        axis.plot(mean, place, "o", color="tab:blue")
    axis.set_yticks(range(len(names)), [f"{name}: over {rows[name]['other'][0]}" for name in names], fontsize=8)
    axis.set_xscale("symlog", linthresh=0.02)
    axis.set_xlabel("difference of the world's figure (symmetric log beyond .02); bar: 95 % over users; dots: seeds")
    figure.savefig(path, dpi=120)


def write(rows: dict[str, dict[str, Any]], folder: Path) -> None:
    """``worlds.json``, ``worlds.md`` and ``worlds.png``."""
    (folder / "worlds.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (folder / "worlds.md").write_text(markdown(rows), encoding="utf-8")
    plot(rows, folder / "worlds.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="all", help="names with commas, or all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="seeds nobody looked at while a world was made")
    parser.add_argument("--out", type=Path, help="folder for worlds.md, worlds.json and worlds.png")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    asked = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
    for name in names() if asked.worlds == "all" else asked.worlds.split(","):
        row = run(name, asked.seeds, asked.first_seed)
        # Read again each time: another run may have written its worlds meanwhile.
        if asked.out and (asked.out / "worlds.json").exists():
            rows = json.loads((asked.out / "worlds.json").read_text(encoding="utf-8"))
        rows = dict(sorted((rows | {name: row}).items()))
        if asked.out:
            write(rows, asked.out)
    sys.stdout.write(markdown(rows))
    if asked.json:
        sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
