"""The same world with long histories and now and then a thing out of habit: a table of sums is enough.

Cao et al. 2022 (arXiv 2205.10249) claim what target attention over the whole history finds, at a cost that does not
grow with it; so the interval of the difference should lie around zero, not above it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .base import Comparison, planted_log
from .din import ITEMS, auc, best, habits, settings

LENGTH, FAITHFUL = 200, 0.7


def compare(seed: int, folder: Path) -> Comparison:
    """SDIM against DIN that reads all 200 behaviours: AUC of the last thing taken."""
    world = habits(seed, users=250, length=LENGTH, faithful=FAITHFUL)
    log = planted_log(folder, world.taken, ITEMS)
    base = settings(seed, history=LENGTH, steps=300, batch=32)
    ours, other = (auc(log, replace(base, model=model)) for model in ("sdim", "din"))
    return Comparison(
        claim="SDIM finds in its table what DIN finds in the whole of a long history",
        ours="sdim",
        other="din",
        figure="AUC",
        ours_U=ours,
        other_U=other,
        best_U=best(world),
    )
