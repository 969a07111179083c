"""Every planted world over several seeds: does each mechanism win where its paper says it does, and by how much.

    OMP_NUM_THREADS=1 python tests/benchmarks/worlds.py --seeds 3 --out tests/benchmarks/results

A row is one world: the judge its paper is about, the judge beside it on the same log with the same budget, the best
possible score where it is known, and the difference with its 95 % interval over users (of all seeds together).
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

from couturier.kernels.timing import provenance

ROOT = Path(__file__).resolve().parents[2]
WORLDS = ROOT / "tests" / "interest" / "worlds"


def names() -> list[str]:
    """The worlds there are."""
    return sorted(path.stem for path in WORLDS.glob("*.py") if path.stem not in ("base", "__init__"))


def run(name: str, seeds: int) -> dict[str, Any]:
    """One world over ``seeds`` seeds."""
    sys.path.insert(0, str(ROOT))
    world = importlib.import_module(f"tests.interest.worlds.{name}")
    found, began = [], time.perf_counter()
    for seed in range(seeds):
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
    return {
        "claim": whole.claim,
        "figure": whole.figure,
        "ours": [whole.ours, float(whole.ours_U.mean())],
        "other": [whole.other, float(whole.other_U.mean())],
        "best": float(np.concatenate(best).mean()) if len(best) == len(found) else None,
        "difference": [mean, low, high],
        "by_seed": [one.difference()[0] for one in found],
        "users": len(whole.ours_U),
        "s": round(time.perf_counter() - began, 1),
    }


def markdown(rows: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table, with when and where it was measured."""
    lines = [
        "# Planted worlds",
        "",
        ", ".join(f"{key} {value}" for key, value in facts.items()),
        "",
        "| world | claim | figure | ours | beside it | best possible | difference, 95 % over users | by seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        mean, low, high = row["difference"]
        best = "" if row["best"] is None else f"{row['best']:.3f}"
        lines.append(
            f"| {name} | {row['claim']} | {row['figure']} | {row['ours'][0]} {row['ours'][1]:.3f} "
            f"| {row['other'][0]} {row['other'][1]:.3f} | {best} | {mean:+.4f} [{low:+.4f}, {high:+.4f}] "
            f"| {', '.join(f'{value:+.3f}' for value in row['by_seed'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="all", help="names with commas, or all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for worlds.md and worlds.json")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    asked = parser.parse_args()
    chosen = names() if asked.worlds == "all" else asked.worlds.split(",")
    rows = {name: run(name, asked.seeds) for name in chosen}
    facts = provenance() | {"seeds": asked.seeds}
    text = markdown(rows, facts)
    sys.stdout.write(text)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "worlds.md").write_text(text, encoding="utf-8")
        (asked.out / "worlds.json").write_text(json.dumps({**facts, "worlds": rows}, indent=1), encoding="utf-8")
    if asked.json:
        sys.stdout.write(json.dumps({**facts, "worlds": rows}) + "\n")


if __name__ == "__main__":
    main()
