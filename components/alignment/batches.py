"""Training batches from windows: which windows, and which items of their next baskets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from couturier.components.data.formats import Windows


class WindowSampler:
    """Draws windows so that every user counts alike, and ``targets`` distinct items of each window's next basket.

    Baskets with fewer items repeat some. All randomness comes from ``generator``, whose state is the data position.
    """

    def __init__(self, windows: Windows, generator: torch.Generator, *, targets: int) -> None:
        self.windows, self.generator, self.targets = windows, generator, targets
        self._first_U = np.searchsorted(windows.user_W, np.arange(len(windows.users)), side="left")
        self._count_U = np.bincount(windows.user_W, minlength=len(windows.users))

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` window indices ``[B]`` and target items int64 ``[B, targets]``."""
        users = torch.randint(len(self._first_U), (count,), generator=self.generator).numpy()
        u = torch.rand(count, 1 + self.targets, generator=self.generator, dtype=torch.float64).numpy()
        rows = self._first_U[users] + (u[:, 0] * self._count_U[users]).astype(np.int64)
        start, stop = self.windows.basket_offsets[rows], self.windows.basket_offsets[rows + 1]
        size = stop - start
        # A random start and a fixed stride through the (shuffled) basket: distinct until the basket is used up.
        places = ((u[:, 1] * size).astype(np.int64)[:, None] + np.arange(self.targets)[None]) % size[:, None]
        return rows, self.windows.basket[start[:, None] + places].astype(np.int64)


def picture_codes(codes_IL: Tensor, items: np.ndarray) -> Tensor:
    """Codes of items: int64 ``[..., L]`` for item indices of any shape."""
    return codes_IL[torch.from_numpy(np.asarray(items, np.int64))]
