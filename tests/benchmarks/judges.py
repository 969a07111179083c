"""The comparison: our judges beside the libraries that people would pick instead.

    data set ─▶ split, negatives ─┬▶ RecTools, implicit, FuxiCTR, each in its own environment ─┐
                (one for all)     └▶ our judges ───────────────────────────────────────────────┴▶ evaluator ─▶ table

    python tests/benchmarks/judges.py --quick --json
    python tests/benchmarks/judges.py --data ml-100k --budget 4 --seeds 3 --out tests/benchmarks/results

A peer that cannot be installed is left out with its reason; what the cache holds is not fitted again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.peers import environments, evaluator, ours, report, runner, sources, speed  # noqa: E402
from tests.benchmarks.peers.split import VARIANTS, Config, Split, write_split  # noqa: E402

DATA = ("ml-100k", "complete-journey")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="ML-100K, one setting, one seed, few epochs: under ten minutes"
    )
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    parser.add_argument("--data", choices=(*DATA, "both"), default="both")
    parser.add_argument("--judges", default="all", help="names with commas between, all or none")
    parser.add_argument("--peers", default="all", help="rectools, implicit, fuxictr, all or none")
    parser.add_argument("--models", default="all", help="models of the peers, such as als,sasrec,din")
    parser.add_argument("--forms", default="all", help="topk-new, topk-basket, ctr-uniform, ctr-popular or all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=4, help="settings tried on valid, for peers and ours alike")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=3600.0, help="wall seconds that one fit may take")
    parser.add_argument("--no-install", action="store_true", help="use only environments that exist")
    parser.add_argument("--cached", action="store_true", help="fit nothing: show what the cache holds")
    parser.add_argument("--no-speed", action="store_true", help="leave the training speeds out")
    parser.add_argument("--out", type=Path, help="write the table and the plot into this folder")
    return parser.parse_args(words)


def chosen(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a comma list; ``all`` and ``none`` are understood."""
    if text in ("all", "none"):
        return known if text == "all" else ()
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"{unknown[0]!r} is unknown; choose from {', '.join(known)}, all or none.")
    return names


def plan_of(options: argparse.Namespace) -> runner.Plan:
    if options.quick:
        return runner.Plan(
            budget=1,
            seeds=(0,),
            threads=options.threads,
            limit_s=600,
            install=not options.no_install,
            quick=True,
        )
    return runner.Plan(
        budget=options.budget,
        seeds=tuple(range(options.seeds)),
        threads=options.threads,
        limit_s=options.limit,
        install=not options.no_install,
        cached=options.cached,
    )


def forms_of(split: Split, options: argparse.Namespace) -> list[str]:
    """The forms to run: the quick run keeps one ranking task and one click variant of each data set."""
    forms = [f"topk-{task}" for task in split.tasks] + [f"ctr-{variant}" for variant in VARIANTS]
    if options.forms != "all":
        return [form for form in forms if form in options.forms.split(",")]
    return [f"topk-{split.tasks[0]}", "ctr-popular"] if options.quick else forms


def compare(split: Split, options: argparse.Namespace, say: runner.Say) -> list[runner.Row]:
    """All rows of one data set."""
    plan, cache = plan_of(options), environments.cache_folder()
    peers = chosen(options.peers, environments.PEERS)
    judges = chosen(options.judges, (*ours.NAMES, "attention") if options.judges != "all" else ours.NAMES)
    found = []
    for form in forms_of(split, options):
        say(f"{split.name} {form}")
        models = runner.TOPK if form.startswith("topk") else runner.CLICK
        control = {"topk-basket": (runner.FAVOURITES,), "topk-new": ()}.get(form, (runner.POPULARITY,))
        wanted = control + tuple(
            model
            for model in models
            if model.peer in peers
            and (model.name in options.models.split(",") or options.models == "all")
            and not (options.quick and model.slow)
        )
        wanted += tuple(
            ours.model(name, form, repeats="basket" in split.tasks)
            for name in ours.known(judges)
            if not options.quick or ours.quick_form(name, form)
        )
        rows = runner.rows(runner.Runner(split, cache, plan, say), wanted, form, say)
        for row in rows:
            row.form = f"{split.name}/{form}"
        found += rows
    return found


def _out(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Compare, print the tables, write them, and end with one JSON line."""
    options = arguments()
    began = time.perf_counter()

    def say(text: str) -> None:
        _out(f"[{time.perf_counter() - began:6.0f} s] {text}")

    cache = environments.cache_folder()
    names = DATA if options.data == "both" else (options.data,)
    names = names[:1] if options.quick else names
    splits = [write_split(sources.load(name, cache), Config(), cache / "splits") for name in names]
    rows = [row for split in splits for row in compare(split, options, say)]
    ratios: dict[str, Any] = {} if options.no_speed else speed.ratios(splits[0], plan_of(options), cache, say)
    facts = report.facts(options, splits, time.perf_counter() - began)
    _out(report.tables(rows, ratios, facts))
    if options.out:
        for path in report.write(rows, ratios, facts, options.out):
            say(f"written: {path.name}")
    if options.json:
        answer = {
            "judges": [name for name in ours.NAMES if any(row.title == f"ours/{name}" for row in rows)],
            "ratios": {name: one["ratio"] for name, one in ratios.items()},
            "quality": report.quality(rows),
            "wall_s": round(time.perf_counter() - began, 1),
            "evaluated_by": evaluator.__name__.rpartition(".")[2],
        }
        _out(json.dumps(answer, sort_keys=True))


if __name__ == "__main__":
    main()
