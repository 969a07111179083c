"""Ratios of speed, both sides measured in this run, in turns, on the same cores.

``fit_vs_rectools_sasrec`` counts target positions a second (a sequence of 51 items has 50) and
``fit_vs_fuxictr_din`` rows a second (a candidate with its history), loader and optimiser included, at equal batch,
width and length; ``_cpu`` is the same a second of the processor, which other work on the machine does not change. The
kernels' ratios come from their own benchmarks beside this folder.

What a row is, is the same on both sides: a candidate, its label and the newest 50 behaviours before it. In the split a
positive and its negative have one history. FuxiCTR reads it once a row, padded to the longest of the batch; our batch
holds the two candidates of a person side by side and reads it once, without padding. That is the design of the judge,
not another task: loss, gradients and the batch statistics of Dice are those of all the rows. Where there is a C
compiler, DIN's attention unit is compiled (half a second, in the warm-up); ``COUTURIER_KERNELS=torch`` leaves it out.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from . import ours, runner
from .environments import PeerUnavailable
from .split import Split

TURNS = 3
_KERNELS = {"target_attention_vs_padded": "target_attention", "linear_attention_vs_naive": "linear_attention"}
_SASREC = {"n_blocks": 2, "n_heads": 1, "n_factors": 64, "session_max_len": 50, "batch_size": 128}
_OUR_SASREC = {
    "batch": 128,
    "history": 50,
    "negatives": 1,
    "ids": 64,
    "judge": {"width": 64, "blocks": 2, "heads": 1, "length": 50},
}
# Rows: 128 positives with a negative each. FuxiCTR's two tables of 16 side by side make our width of 32.
_DIN: dict[str, Any] = {"batch_size": 256, "max_len": 50, "embedding_dim": 16, "attention_hidden_units": [64]}
_DIN |= {"attention_hidden_activations": "Dice", "dnn_hidden_units": [128, 64]}
_OUR_DIN = {
    "batch": 128,
    "history": 50,
    "ids": 16,
    "judge": {"form": "din_paper", "width": 32, "unit": 64, "hidden": 128, "hidden_2": 64},
}


def ratios(split: Split, plan: runner.Plan, cache: Path, say: runner.Say) -> dict[str, Any]:
    """``{name: {ratio, ours, other, unit}}`` of what can be measured here."""
    found = {**_kernels(say)}
    task, run = split.tasks[-1], runner.Runner(split, cache, plan, say)
    fits = (
        ("fit_vs_rectools_sasrec", "sasrec", f"speed-{task}", "rectools", _SASREC, _OUR_SASREC, "positions"),
        ("fit_vs_fuxictr_din", "din", "speed-uniform", "fuxictr", _DIN, _OUR_DIN, "rows"),
    )
    for name, judge, form, peer, theirs, mine, what in fits:
        if not ours.known((judge,)):
            say(f"  left out: {name}: no judge {judge} yet")
            continue
        other = next(model for model in (*runner.TOPK, *runner.CLICK) if (model.peer, model.name) == (peer, judge))
        seconds = {"seconds": 4 if plan.quick else 10}
        turns = []
        try:
            for turn in range(1 if plan.quick else TURNS):
                mine_now = run.speed(ours.model(judge, form), form, {**mine, **seconds})
                other_now = run.speed(other, form, {**theirs, **seconds, **_loader(peer, turn)})
                turns.append((mine_now, other_now))
        except PeerUnavailable as error:
            say(f"  left out: {name}: {error}")
            continue
        for unit, suffix in ((f"{what}_per_s", ""), (f"{what}_per_cpu_s", "_cpu")):
            # The best of each side: other work on the machine only ever slows.
            fast, slow = (max(float(one[side].get(unit, 0.0)) for one in turns) for side in (0, 1))
            if fast and slow:
                words = unit.replace("_per_s", " a second").replace("_per_cpu_s", " a processor second")
                found[name + suffix] = {"ratio": fast / slow, "ours": fast, "other": slow, "unit": words}
                say(f"  {name}{suffix}: {fast:,.0f} against {slow:,.0f} {words}: {fast / slow:.2f}")
    return found


def _loader(peer: str, turn: int) -> dict[str, int]:
    """FuxiCTR reads in a process of its own by default and in the training process else; each gets its turns."""
    return {"num_workers": 1 - turn % 2} if peer == "fuxictr" else {}


def _kernels(say: runner.Say) -> dict[str, Any]:
    """The kernels' own benchmarks, where they are: each has ``ratio() -> {ratio, ours, other, unit}``."""
    found = {}
    for name, module in _KERNELS.items():
        place = Path(__file__).resolve().parents[1] / f"{module}.py"
        if not place.is_file():
            say(f"  left out: {name}: no tests/benchmarks/{module}.py")
            continue
        found[name] = importlib.import_module(f"tests.benchmarks.{module}").ratio()
        say(f"  {name}: {found[name]['ratio']:.2f}")
    return found
