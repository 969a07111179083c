"""How likely each catalogue item is in a person's next basket: the judge, calibrated on what training people took.

The judge compares an item with others that sell as well; whether somebody buys this favourite *again*, and how much
popularity still adds, it does not say. A logistic regression over its logit, the item's base rate and what the history
tells of a favourite (how much, how lately, which place) does: Platt's scaling (1999) with a few more columns. It is
fitted in seconds on windows of training users.

With ``hidden`` above 0 a small network takes the regression's place and reads, besides, what is taken after what
(:mod:`~couturier.components.alignment.purchases`): it knows more of items that are new to a person, and takes longer.
The lift of an item pair is counted on one half of the training people for the other half's windows, so that no window
meets its own basket in its columns.

Legend: U windows, I items, C columns, K favourites, N sampled (window, item) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from couturier.components.alignment import purchases
from couturier.components.alignment.rewards import membership
from couturier.components.data.formats import Windows
from couturier.components.errors import ConfigError
from couturier.components.generator.tokenise import one_cycle
from couturier.components.interest.judge import history_batch
from couturier.components.interest.types import Judge
from couturier.components.runtime import global_seed, seeded

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
_NONE = torch.zeros(0)


@dataclass(frozen=True, kw_only=True)
class ProspectConfig:
    """How the prospect is fitted."""

    windows: int = 1500
    """Training windows, drawn by seed."""
    others_share: float = 0.03
    """Share of the items that were neither favourites nor taken that are kept, with the inverse as their weight."""
    ridge: float = 1e-5
    hidden: int = 0
    """Width of the network's two hidden layers; 0: logistic regression, without what is taken after what."""
    epochs: int = 6
    """Of the network, over the sampled pairs."""
    batch: int = 2048
    lr: float = 3e-3
    """At the top of a cosine."""

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("hidden", 0), ("epochs", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"rl.prospect.{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 0 < self.others_share <= 1:
            raise ConfigError(f"rl.prospect.others_share is {self.others_share}; it is a share, above 0 and at most 1.")


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
        self.network: nn.Sequential | None = None
        self.lift_II = torch.zeros(0, 0)

    @torch.no_grad()
    def logits(self, windows: Windows, rows: np.ndarray) -> Tensor:
        """``[U, I]`` for some windows."""
        if self.network is None:
            return ((self.columns(windows, rows) - self.mean_C) / self.scale_C) @ self.weight_C + self.bias
        x_UIC = self.all_columns(windows, rows, self.lift_II)
        return self.network((x_UIC - self.mean_C) / self.scale_C)[..., 0]

    def all_columns(self, windows: Windows, rows: np.ndarray, lift_II: Tensor) -> Tensor:
        """What the network reads: those of the regression, and what is taken after what."""
        return torch.cat([self.columns(windows, rows), purchases.columns(windows, rows, lift_II)], -1)

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
        if not config.hidden:
            self.network = None
            x_NC, y_N, w_N = self._pairs(windows, rows, config, random)
            self._scale_to(x_NC)
            self._regress((x_NC - self.mean_C) / self.scale_C, y_N, w_N / w_N.mean(), config.ridge)
            return self
        items = len(self.base_I)
        half_W = torch.rand(len(windows.users), generator=random).numpy()[windows.user_W] < 0.5
        found = []
        for half in (True, False):
            lift_II = purchases.lift(windows, np.flatnonzero(half_W == half), items)
            found.append(self._pairs(windows, rows[half_W[rows] != half], config, random, lift_II))
        x_NC, y_N, w_N = (torch.cat(parts) for parts in zip(*found, strict=True))
        self.lift_II = purchases.lift(windows, np.arange(len(windows)), items)
        self._scale_to(x_NC)
        self.network = network(x_NC.shape[1], config.hidden, seed=seed)
        self._learn((x_NC - self.mean_C) / self.scale_C, y_N, w_N / w_N.mean(), config, random)
        return self

    def _pairs(
        self,
        windows: Windows,
        rows: np.ndarray,
        config: ProspectConfig,
        random: torch.Generator,
        lift_II: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Columns ``[N, C]`` of pairs of a window and an item, whether it was taken, and what each pair stands for."""
        columns, taken, weights = [], [], []
        for start in range(0, len(rows), _CHUNK):
            some = rows[start : start + _CHUNK]
            x_UIC = self.columns(windows, some) if lift_II is None else self.all_columns(windows, some, lift_II)
            taken_UI = membership([windows.basket_of(row) for row in some], len(self.base_I))
            telling_UI = taken_UI | (x_UIC[..., COLUMNS.index("favourite")] > 0)
            kept_UI = telling_UI | (torch.rand(taken_UI.shape, generator=random) < config.others_share)
            columns.append(x_UIC[kept_UI])
            taken.append(taken_UI[kept_UI].float())
            weights.append(torch.where(telling_UI, 1.0, 1 / config.others_share)[kept_UI])
        count = len(COLUMNS) + (0 if lift_II is None else len(purchases.COLUMNS))
        return torch.cat([torch.zeros(0, count), *columns]), torch.cat(taken or [_NONE]), torch.cat(weights or [_NONE])

    def _scale_to(self, x_NC: Tensor) -> None:
        self.mean_C, self.scale_C = x_NC.mean(0), x_NC.std(0).clamp_min(1e-6)

    def _learn(self, x_NC: Tensor, y_N: Tensor, w_N: Tensor, config: ProspectConfig, random: torch.Generator) -> None:
        assert self.network is not None
        optimiser = torch.optim.AdamW(self.network.parameters(), lr=config.lr, weight_decay=1e-4)
        batches = [
            part
            for _ in range(config.epochs)
            for part in torch.randperm(len(x_NC), generator=random).split(config.batch)
        ]
        for at, part in enumerate(batches):
            for group in optimiser.param_groups:
                group["lr"] = config.lr * one_cycle(at, len(batches))
            logits_N = self.network(x_NC[part])[:, 0]
            loss = F.binary_cross_entropy_with_logits(logits_N, y_N[part], weight=w_N[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    def state(self) -> dict[str, Tensor]:
        """What was fitted."""
        state = {"mean": self.mean_C, "scale": self.scale_C, "weight": self.weight_C, "bias": self.bias}
        if self.network is not None:
            state |= {f"network.{name}": value for name, value in self.network.state_dict().items()}
            state["lift"] = self.lift_II
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        self.mean_C, self.scale_C = state["mean"], state["scale"]
        self.weight_C, self.bias = state["weight"], state["bias"]
        parts = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
        self.network = None
        if parts:
            self.network = network(len(self.mean_C), len(parts["0.bias"]), seed=0)
            self.network.load_state_dict(parts)
            self.lift_II = state["lift"]

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


def network(columns: int, hidden: int, *, seed: int) -> nn.Sequential:
    """Columns ``[..., C]`` → a logit ``[..., 1]``."""
    with global_seed(seed, "prospect network"):
        return nn.Sequential(
            nn.Linear(columns, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )
