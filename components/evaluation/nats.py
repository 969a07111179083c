"""How surprised a generator is by what people really took next, in nats a picture.

The same targets after the person's own history, after somebody else's, after none, and under popularity alone: what a
history is worth is the difference between the first two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from couturier.components.alignment.batches import picture_codes
from couturier.components.evaluation.protocol import Plan
from couturier.components.evaluation.statistics import bootstrap, paired_difference, user_means
from couturier.components.generator.types import Generator


@torch.no_grad()
def nats(
    generator: Generator,
    plan: Plan,
    codes_IL: Tensor,
    purchases_I: np.ndarray,
    *,
    targets: int,
    batch: int,
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Nats a picture of each window, mean over up to ``targets`` items of its next basket: ``true``, ``wrong``,
    ``unconditional`` and ``popularity`` (items by add-one smoothed training purchases), each ``[V]``."""
    items_Vt = np.stack([np.resize(plan.windows.basket_of(row), targets) for row in plan.rows_V])
    share_I = (purchases_I + 1) / (purchases_I + 1).sum()
    found: dict[str, list[Tensor]] = {"true": [], "wrong": [], "unconditional": []}
    for start in range(0, len(plan), batch):
        where = slice(start, start + batch)
        codes_UtL = picture_codes(codes_IL, items_Vt[where])
        own_UK = plan.windows.favourites_WK[plan.rows_V[where]]
        wrong_UK = plan.windows.favourites_WK[plan.wrong_V[where]]
        found["true"].append(generator.nats(own_UK, codes_UtL).mean(1))
        found["wrong"].append(generator.nats(wrong_UK, codes_UtL).mean(1))
        found["unconditional"].append(generator.nats(own_UK, codes_UtL, unconditional=True).mean(1))
        advance(len(codes_UtL))
    per_window = {name: torch.cat(parts).double().numpy() for name, parts in found.items()}
    return per_window | {"popularity": -np.log(share_I[items_Vt]).mean(1)}


def nats_table(per_window: dict[str, np.ndarray], plan: Plan, *, seed: int, draws: int) -> dict[str, list[float]]:
    """Means over users with intervals, and the differences that matter: ``[mean, low, high]`` each."""
    users = len(plan.windows.users)
    per_user = {name: user_means(values, plan.user_V, users) for name, values in per_window.items()}
    table = {name: bootstrap(values, seed=seed, draws=draws).as_list() for name, values in per_user.items()}
    for left in ("wrong", "unconditional", "popularity"):
        difference = paired_difference(per_user[left], per_user["true"], seed=seed, draws=draws)
        table[f"{left}_minus_true"] = difference.as_list()
    return table
