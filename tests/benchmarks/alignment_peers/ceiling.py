"""How far a generator could get that drew exactly the items that are wanted of it, without one mistake.

    judge, calibrated on training people ─▶ for each test window, its surest items: c known to the person, the rest new
    copying ──────────────────────────────▶ c favourites in their order, the rest by what sells

Both show ten different real items, equally many of them new. What lies between the two is all that knowing the person
through this judge adds to knowing what they had; a generator that imitates it can only have less.

Legend: V windows, I items, K favourites.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from couturier.components.alignment.prospect import Prospect, ProspectConfig
from couturier.components.alignment.rewards import membership
from couturier.components.data.formats import Catalogue, Windows
from couturier.components.evaluation.protocol import Plan
from couturier.components.evaluation.statistics import bootstrap, paired_difference, user_means
from couturier.components.interest.judge import load_judge
from couturier.components.lineage.stages import ArtifactStore

PICTURES = 10
COPIES = (0, 1, 2, 3, 4, 5, 6)
_CHUNK = 32


def ceiling(store: ArtifactStore, inputs: dict[str, str], config: ProspectConfig, *, seed: int) -> dict[str, Any]:
    """``{copies: {"wanted", "copying", "difference"}}``: basket precision, each with its interval over people."""
    sequences = store.open(inputs["sequences"]).path
    catalogue = Catalogue.load(sequences)
    train, test = Windows.load(sequences, "train"), Windows.load(sequences, "test")
    held_I = np.bincount(train.basket, minlength=len(catalogue)) + 0.5
    judge = load_judge(store.open(inputs["judge"]).path / "judge")
    prospect = Prospect(judge, torch.from_numpy(held_I / len(train)).float()).fit(train, config, seed=seed)
    plan = Plan.of(test, seed=seed, windows_per_user=2)
    rows, users = plan.rows_V, len(test.users)
    wanted_VI = torch.cat([prospect.logits(test, part) for part in np.array_split(rows, -(-len(rows) // _CHUNK))])
    known_VI = membership(list(plan.favourites_VK), len(catalogue))
    basket_VI = membership([test.basket_of(row) for row in rows], len(catalogue))
    purchases_I = torch.from_numpy(catalogue.items["purchases"].to_numpy().astype(np.float32))
    selling_VI = purchases_I.expand(len(rows), -1)
    order_VI = torch.zeros(len(rows), len(catalogue))
    place_VK = torch.arange(plan.favourites_VK.shape[1], 0, -1).float().expand(len(rows), -1)
    favourites_VK = torch.from_numpy(plan.favourites_VK.astype(np.int64))
    real_VK = favourites_VK >= 0
    order_VI.scatter_reduce_(1, favourites_VK.clamp_min(0), place_VK * real_VK, "amax")
    found: dict[str, Any] = {}
    for copies in COPIES:
        fresh = PICTURES - copies
        sides = {
            name: torch.cat([hits(known, known_VI, basket_VI, copies), hits(new, ~known_VI, basket_VI, fresh)], 1)
            for name, known, new in (("wanted", wanted_VI, wanted_VI), ("copying", order_VI, selling_VI))
        }
        means = {name: user_means(side.mean(1).numpy(), plan.user_V, users) for name, side in sides.items()}
        found[str(copies)] = {name: bootstrap(values, seed=seed).as_list() for name, values in means.items()}
        found[str(copies)]["difference"] = paired_difference(means["wanted"], means["copying"], seed=seed).as_list()
    return found


def hits(score_VI: Tensor, among_VI: Tensor, basket_VI: Tensor, count: int) -> Tensor:
    """Whether each of the ``count`` best items among some was taken, float ``[V, count]``; a window with fewer items to
    choose from misses with the rest.

    Example:
        >>> score, basket = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[True, False, True]])
        >>> hits(score, torch.tensor([[False, True, True]]), basket, 2)
        tensor([[0., 1.]])
    """
    best_Vn = score_VI.masked_fill(~among_VI, float("-inf")).topk(count, 1).indices
    return (basket_VI.gather(1, best_Vn) & among_VI.gather(1, best_Vn)).float()


def markdown(found: dict[str, Any]) -> list[str]:
    """Lines of a table."""
    lines = [
        "How far any generator could get: basket precision of ten different real items, so many of them known to the "
        "person, the surest by the calibrated judge; beside it favourites in their order and what sells.",
        "",
        "| known | wanted | copying | difference |",
        "|---:|---:|---:|---:|",
    ]
    for copies, cells in found.items():
        shown = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in (cells["wanted"], cells["copying"])]
        mean, low, high = cells["difference"]
        lines.append(f"| {copies} | {shown[0]} | {shown[1]} | {mean:+.4f} [{low:+.4f}, {high:+.4f}] |")
    return lines
