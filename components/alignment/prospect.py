"""How likely each catalogue item is in a person's next basket: the judge, calibrated on what training people took.

The judge compares an item with others that sell as well; whether somebody buys this favourite *again*, and how much
popularity still adds, it does not say. A logistic regression over its logit, the item's base rate and what the history
tells of a favourite (how much, how lately, which place) does: Platt's scaling (1999) with a few more columns. It is
fitted in seconds on windows of training users.

Legend: U windows, I items, C columns, K favourites, N sampled (window, item) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from couturier.components.alignment.rewards import membership
from couturier.components.data.formats import Windows
from couturier.components.interest.judge import history_batch
from couturier.components.interest.types import Judge
from couturier.components.runtime import seeded

COLUMNS = (
    "judge",
    "base",
    "favourite",
    "weight",
    "age",
    "place",
    "favourite judge",
    "favourite base",
    "favourites' weight",
)
_CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class ProspectConfig:
    """How the prospect is fitted."""

    windows: int = 1500
    """Training windows, drawn by seed."""
    others_share: float = 0.03
    """Share of the items that were neither favourites nor taken that are kept, with the inverse as their weight."""
    ridge: float = 1e-5


class Prospect:
    """Logits that an item is in the next basket of a window.

    Args:
        judge: a fitted judge.
        base_I: items' mean count a training basket.
    """

    def __init__(self, judge: Judge, base_I: Tensor) -> None:
        self.judge, self.base_I = judge, base_I
        self.item_features_ID = judge.embed_items()
        self.mean_C, self.scale_C = torch.zeros(len(COLUMNS)), torch.ones(len(COLUMNS))
        self.weight_C, self.bias = torch.zeros(len(COLUMNS)), torch.zeros(())

    @torch.no_grad()
    def logits(self, windows: Windows, rows: np.ndarray) -> Tensor:
        """``[U, I]`` for some windows."""
        return ((self.columns(windows, rows) - self.mean_C) / self.scale_C) @ self.weight_C + self.bias

    @torch.no_grad()
    def columns(self, windows: Windows, rows: np.ndarray) -> Tensor:
        """What the regression reads, ``[U, I, C]``; columns of a favourite are 0 for other items."""
        u, items = len(rows), len(self.base_I)
        state = self.judge.encode(history_batch(windows, rows, self.item_features_ID))
        judge_UI = self.judge.score(state, self.item_features_ID.expand(u, -1, -1))
        base_UI = self.base_I.log().expand(u, -1)
        favourites_UK = torch.from_numpy(windows.favourites_WK[rows].astype(np.int64))
        row, place = (favourites_UK >= 0).nonzero(as_tuple=True)
        at = (row, favourites_UK[row, place])
        weight_UK = torch.from_numpy(windows.weight_WK[rows]).float().clamp_min(1e-3)
        age_UK = torch.from_numpy(windows.age_days_WK[rows]).float().clamp_min(0)
        all_U = weight_UK.masked_fill(favourites_UK < 0, 0).sum(1).clamp_min(1e-3)

        def spread(values: Tensor) -> Tensor:
            out_UI = torch.zeros(u, items)
            out_UI[at] = values
            return out_UI

        favourite_UI = spread(torch.ones(len(row)))
        return torch.stack(
            [
                judge_UI,
                base_UI,
                favourite_UI,
                spread(weight_UK[row, place].log()),
                spread(age_UK[row, place].log1p()),
                spread((place + 1).float().log()),
                judge_UI * favourite_UI,
                base_UI * favourite_UI,
                spread(all_U.log()[row]),
            ],
            -1,
        )

    def fit(self, windows: Windows, config: ProspectConfig, *, seed: int) -> Prospect:
        """Fit on windows drawn by seed; returns itself."""
        random = seeded(seed, "prospect")
        rows = torch.randperm(len(windows), generator=random)[: config.windows].numpy()
        columns, taken, weights = [], [], []
        for start in range(0, len(rows), _CHUNK):
            some = rows[start : start + _CHUNK]
            x_UIC = self.columns(windows, some)
            taken_UI = membership([windows.basket_of(row) for row in some], len(self.base_I))
            telling_UI = taken_UI | (x_UIC[..., COLUMNS.index("favourite")] > 0)
            kept_UI = telling_UI | (torch.rand(taken_UI.shape, generator=random) < config.others_share)
            columns.append(x_UIC[kept_UI])
            taken.append(taken_UI[kept_UI].float())
            weights.append(torch.where(telling_UI, 1.0, 1 / config.others_share)[kept_UI])
        x_NC, y_N, w_N = torch.cat(columns), torch.cat(taken), torch.cat(weights)
        self.mean_C, self.scale_C = x_NC.mean(0), x_NC.std(0).clamp_min(1e-6)
        self._regress((x_NC - self.mean_C) / self.scale_C, y_N, w_N / w_N.mean(), config.ridge)
        return self

    def state(self) -> dict[str, Tensor]:
        """What was fitted."""
        return {
            "mean": self.mean_C,
            "scale": self.scale_C,
            "weight": self.weight_C,
            "bias": self.bias,
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        self.mean_C, self.scale_C = state["mean"], state["scale"]
        self.weight_C, self.bias = state["weight"], state["bias"]

    def _regress(self, x_NC: Tensor, y_N: Tensor, w_N: Tensor, ridge: float) -> None:
        b = torch.zeros(x_NC.shape[1] + 1, requires_grad=True)
        optimiser = torch.optim.LBFGS([b], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            nll = F.binary_cross_entropy_with_logits(x_NC @ b[:-1] + b[-1], y_N, weight=w_N)
            loss = nll + ridge * b[:-1].square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        self.weight_C, self.bias = b.detach()[:-1], b.detach()[-1]
