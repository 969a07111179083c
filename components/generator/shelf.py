"""Which catalogue items a person is offered as reference pictures, where nobody says.

Alignment knows over the whole catalogue what each person's pictures should show
(:func:`couturier.components.alignment.distil.wanted`), but from the judge and from how often and how lately somebody
took what, which a generator is not told when it draws. The shelf is a small likeness of that distribution that needs
the favourites alone: one bilinear form over item features for what is new, one weight a place for what is old.
All of it is ours; Pigeon's references come with its data.

Legend: U users, K favourites, I items, F item features, R references a user.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class Shelf(nn.Module):
    """A distribution over items for each history.

    Args:
        features_IF: what items are like; standardised here.
        base_I: log odds of each item for somebody not known at all.
        places: K, favourites that are looked at, the first ones.
        copies: probability that items of the history get together.

    Example:
        >>> shelf = Shelf(torch.eye(3), torch.zeros(3), places=2, copies=0.4)
        >>> shelf(torch.tensor([[2, -1]])).exp()
        tensor([[0.3000, 0.3000, 0.4000]], grad_fn=<ExpBackward0>)
    """

    features_IF: Tensor

    def __init__(self, features_IF: Tensor, base_I: Tensor, *, places: int, copies: float) -> None:
        super().__init__()
        self.places, self.copies = places, copies
        scaled_IF = (features_IF - features_IF.mean(0)) / features_IF.std(0).clamp_min(1e-6)
        self.register_buffer("features_IF", scaled_IF / scaled_IF.shape[1] ** 0.5, persistent=False)
        self.base_I = nn.Parameter(base_I.clone())
        self.form_FF = nn.Parameter(torch.zeros(features_IF.shape[1], features_IF.shape[1]))
        self.new_K, self.old_K = nn.Parameter(torch.zeros(places)), nn.Parameter(torch.zeros(places))

    def forward(self, favourites_UK: Tensor) -> Tensor:
        """Log-probabilities ``[U, I]`` from item indices, -1 for none."""
        favourites_UK = favourites_UK[:, : self.places]
        k, items = favourites_UK.shape[1], len(self.base_I)
        none_UK = favourites_UK < 0
        shown_UK = favourites_UK.clamp_min(0)
        nothing = torch.finfo(self.base_I.dtype).min
        weight_UK = self.new_K[:k].expand(shown_UK.shape).masked_fill(none_UK, nothing).softmax(-1)
        person_UF = (weight_UK.masked_fill(none_UK, 0)[..., None] * self.features_IF[shown_UK]).sum(1)
        new_UI = self.base_I + person_UF @ self.form_FF @ self.features_IF.T
        owned_UI = torch.zeros(len(shown_UK), items).scatter_add_(1, shown_UK, (~none_UK).float()) > 0
        new_UI = new_UI.masked_fill(owned_UI, nothing).softmax(-1)
        again_UK = self.old_K[:k].expand(shown_UK.shape).masked_fill(none_UK, nothing).softmax(-1)
        old_UI = torch.zeros(len(shown_UK), items).scatter_add(1, shown_UK, again_UK.masked_fill(none_UK, 0))
        copies_U1 = self.copies * owned_UI.any(1, keepdim=True).float()
        return (copies_U1 * old_UI + (1 - copies_U1) * new_UI).clamp_min(1e-12).log()

    def fit(
        self, favourites_WK: Tensor, wanted_WI: Tensor, *, steps: int, batch: int, lr: float, random: torch.Generator
    ) -> float:
        """Make it like what windows want, by cross-entropy.

        Returns:
            The divergence from the wanted distribution to it at the last step, in nats.
        """
        optimiser, gap = torch.optim.Adam(self.parameters(), lr=lr), 0.0
        self.requires_grad_(True)
        for step in range(steps):
            rows = torch.randint(len(favourites_WK), (batch,), generator=random)
            loss = -(wanted_WI[rows] * self(favourites_WK[rows])).sum(-1).mean()
            optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            gap = float(loss.detach()) - float(torch.special.entr(wanted_WI[rows]).sum(-1).mean())
        self.requires_grad_(False)
        return gap

    @torch.no_grad()
    def offer(self, favourites_UK: np.ndarray | Tensor, count: int, seeds: list[int]) -> Tensor:
        """``count`` items a user ``[U, R]``, at evenly spaced points of the distribution: an item of probability p
        comes up count * p times, rounded down or up (systematic sampling, Madow 1949).

        Args:
            seeds: one a user, where the points begin; what a user gets does not depend on the others.
        """
        histories_UK = torch.from_numpy(np.asarray(favourites_UK).astype(np.int64))
        cumulative_UI = self(histories_UK).double().exp().cumsum(-1)
        begin_U = torch.tensor([torch.rand((), generator=torch.Generator().manual_seed(seed)).item() for seed in seeds])
        points_UR = (begin_U.double()[:, None] + torch.arange(count)) / count * cumulative_UI[:, -1:]
        return torch.searchsorted(cumulative_UI, points_UR, right=True).clamp_max(cumulative_UI.shape[1] - 1)
