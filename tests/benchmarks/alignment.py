"""The generating half beside its peers, and every way to align it beside the others.

    python tests/benchmarks/alignment.py --quick --json
    python tests/benchmarks/alignment.py --workspace .couturier --methods base,grpo --out tests/benchmarks/results

``--quick`` measures two ratios, both sides in this run, in turns: the sampler's tokens a second over those of
transformers' ``generate`` for one tiny Janus (guided, so that both sides run two rows a sample; beside it without
guidance, where ``generate`` cannot but run both), and a GRPO step over one of TRL's GRPOTrainer for one small Llama. It
needs no workspace; where TRL's environment is not there and cannot be made, that ratio is left out with the reason.
Without ``--quick`` the methods are compared in a finished workspace.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from couturier.kernels.timing import provenance  # noqa: E402
from tests.benchmarks.alignment_peers import grpo_step, methods, sampling  # noqa: E402
from tests.benchmarks.peers.environments import PeerUnavailable  # noqa: E402


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the two ratios of speed, under ten minutes")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the quick run")
    parser.add_argument("--rounds", type=int, default=9, help="of the sampler, in turns with generate")
    parser.add_argument("--steps", type=int, default=40, help="of GRPO, on both sides; a multiple of ten")
    parser.add_argument("--seeds", type=int, default=3, help="of the reward curves, and of every method")
    parser.add_argument("--no-install", action="store_true", help="use TRL's environment only if it exists")
    parser.add_argument("--workspace", type=Path, default=ROOT / ".couturier", help="finished, for the methods")
    parser.add_argument("--methods", default="all", help=f"with commas between, or all: {','.join(methods.known())}")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], metavar="[METHOD:]NAME=VALUE", dest="settings")
    parser.add_argument("--out", type=Path, help="write the table, the figures and the plot into this folder")
    return parser.parse_args(words)


def quick(given: argparse.Namespace) -> dict[str, Any]:
    """Both ratios, and what stands behind them."""
    answer: dict[str, Any] = {"ratios": {}, "left_out": {}}
    found = sampling.ratio(seed=given.seed, rounds=given.rounds, cores=given.threads)
    answer["ratios"] |= {
        "sampler_vs_generate": found["ratio"],
        "sampler_vs_generate_guidance_1": found["ratio_guidance_1"],
    }
    answer["sampler"] = found
    _say(f"sampler {found['ours']:,.0f} tokens/s, generate {found['other']:,.0f}: {found['ratio']:.2f} times")
    _say(f"  at guidance 1: {found['ratio_guidance_1']:.2f} times; greedy codes equal: {found['greedy_equal']}")
    seeds = tuple(range(given.seed, given.seed + given.seeds))
    try:
        found = grpo_step.ratio(_say, seeds=seeds, steps=given.steps, cores=given.threads, install=not given.no_install)
    except PeerUnavailable as error:
        answer["left_out"]["grpo_step_vs_trl"] = str(error)
        _say(f"left out: grpo_step_vs_trl: {error}")
        return answer
    answer["ratios"]["grpo_step_vs_trl"] = found["ratio"]
    answer["grpo"] = found
    _say(f"GRPO step {found['ours']:.3f} s, TRL {found['other']:.3f} s: {found['ratio']:.2f} times")
    _say(f"  rewards by tenths: ours {found['rewards_ours']}, TRL {found['rewards_other']}")
    return answer


def compared(given: argparse.Namespace) -> dict[str, Any]:
    """The methods in a workspace."""
    names = methods.known() if given.methods == "all" else tuple(given.methods.split(","))
    asked = methods.Asked(
        workspace=given.workspace.resolve(),
        methods=names,
        seeds=tuple(range(given.seeds)),
        recipe=given.recipe,
        settings=tuple(given.settings),
    )
    return methods.compare(asked, _say)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Measure, write, and end with one JSON line if asked."""
    given = arguments()
    began = time.perf_counter()
    facts: dict[str, Any] = {**provenance(), "seed": given.seed, "load": [round(x, 2) for x in os.getloadavg()]}
    found = quick(given) if given.quick else compared(given)
    facts["wall_s"] = round(time.perf_counter() - began, 1)
    if not given.quick:
        _say(methods.markdown(found, facts))
    if given.out and given.quick:
        given.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(facts | found, indent=1, sort_keys=True) + "\n"
        (given.out / "alignment_quick.json").write_text(text, encoding="utf-8")
    elif given.out:
        for place in methods.write(found, facts, given.out):
            _say(f"written: {place.name}")
    if given.json:
        _say(json.dumps(facts | found, sort_keys=True))


if __name__ == "__main__":
    main()
