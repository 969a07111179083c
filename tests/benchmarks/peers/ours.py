"""Our judges as rows of the comparison: which there are, what may be tried for them, and what a run depends on."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from couturier.components.interest.judge import JUDGES

from .runner import Model

NAMES = (
    "multimodal",
    "sasrec",
    "din",
    "tin",
    "sdim",
    "dare",
    "muse",
    "dmf",
    "aw_moe",
    "hcn",
    "mqsa_ted",
    "hypercuboid",
)
_ADAPTER = ("ours_peer.py", "our_examples.py")
_SHARED = ("base.py", "items.py", "layers.py", "log_examples.py", "loop.py", "sampling.py", "types.py")
_TOPK: dict[str, Any] = {
    "steps": 1200,
    "eval_every": 75,
    "patience": 6,
    "batch": 128,
    "history": 50,
    "negatives": 16,
    "negative_kind": "uniform",
    "learning_rate": 3e-3,
    "ids": 64,
}
_SEQUENCE: dict[str, Any] = {**_TOPK, "steps": 800, "eval_every": 50, "batch": 64, "negatives": 1}
_CLICK: dict[str, Any] = {
    "steps": 800,
    "eval_every": 80,
    "patience": 4,
    "batch": 128,
    "history": 50,
    "learning_rate": 3e-3,
    "ids": 16,
}


def model(name: str, form: str, *, repeats: bool = False) -> Model:
    """A judge with the settings that may be tried for it on a form, the default first.

    Where people take things again, judges that learn from candidates are shown favourites.
    """
    kind = form.partition("-")[0]
    if kind == "ctr":
        first = {**_CLICK, "favourites": repeats and not JUDGES[name].every_position}
        grid = (first, {**first, "learning_rate": 1e-3}, {**first, "weight_decay": 0.3}, {**first, "history": 100})
        quick = {**first, "steps": 160, "eval_every": 80}
    else:
        every = JUDGES[name].every_position
        first = _SEQUENCE if every else _TOPK
        if repeats and not every:
            # Uniform negatives, as elsewhere: against popular ones a score is a chance over popularity.
            first = {**first, "favourites": True, "positives": 4, "negatives": 32}
        # A sequence judge reads no further than its own length, whatever it is shown.
        longer = {**first, "history": 100, **({"judge": {"length": 100}} if every else {})}
        grid = (first, longer, {**first, "learning_rate": 1e-3}, {**first, "weight_decay": 0.3})
        quick = {key: value for key, value in first.items() if key != "patience"}
        quick |= {"steps": 200, "eval_every": 200, "epochs": 200}
    return Model(peer="ours", name=name, grid=grid, quick=quick, source=source_digest(name))


def quick_form(name: str, form: str) -> bool:
    """Whether a quick run measures a judge on a form: each on one, sequence judges by ranking, the others by clicks."""
    return JUDGES[name].every_position == form.startswith("topk")


def known(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` that the package has."""
    return tuple(name for name in names if name in JUDGES)


def source_digest(name: str) -> str:
    """A hash of the code that a judge's figures depend on, so that the cache forgets them when it changes.

    Kernels are left out: they are faster ways to the same numbers.
    """
    here = Path(__file__).resolve().parent
    interest = here.parents[2] / "components" / "interest"
    module = sys.modules[JUDGES[name].__module__].__file__
    digest = hashlib.sha256(Path(module or "").read_bytes())
    for path in (*(here / f for f in _ADAPTER), *(interest / f for f in _SHARED)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]
