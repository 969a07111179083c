"""Several modalities of an item in one space: an encoder each, aligned by contrast, fused by weights that can be read.

    picture part(s) ─▶ encoder ─▶ z ┐                     ┌▶ weights over what is present (the explanation)
    words ───────────▶ encoder ─▶ z ┼▶ InfoNCE by pairs   │
    (audio, ...) ────▶ encoder ─▶ z ┘       └─────────────┴▶ weighted sum, unit length ─▶ e

The card of arXiv 2509.04751 fixes that modalities are aligned into one space and that their weights explain; the body
could not be had, so the form is ours: two layers an encoder, symmetric InfoNCE with a learned temperature (0.07 at
first), weights ``softmax(q . tanh(W z))`` over the modalities that are present.

Letters: X any leading axes, N items, M modalities, E width, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.errors import ConfigError
from couturier.components.interest.items import ItemFeatures
from couturier.components.interest.layers import mlp

WORDS = "words"
_COLDEST = 0.01


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Items in the shared space: ``item_XE`` of unit length (zeros if nothing is known), each modality's vector
    (zeros where absent), whether it is present, and its weight (the weights of what is present sum to one)."""

    item_XE: Tensor
    views_XME: Tensor
    present_XM: Tensor
    weight_XM: Tensor


class Modalities(nn.Module):
    """Encoders of the parts of an item's features and their fusion.

    Args:
        parts: ``(name, width)`` of the pieces of the picture part, in order; a piece that is all zeros is missing.
            Empty for one piece called ``picture``. Words follow by themselves where features have them.
        items: where the features come from.
        width: E.
        temperature: of the alignment loss at first.

    Raises:
        ConfigError: the pieces do not add up to the picture part, or a name is given twice.
    """

    def __init__(self, parts: Sequence[tuple[str, int]], items: ItemFeatures, width: int, temperature: float) -> None:
        super().__init__()
        pieces = list(parts) or [("picture", items.picture_width)]
        names = [name for name, _ in pieces] + ([WORDS] if items.config.words else [])
        if sum(size for _, size in pieces) != items.picture_width or len(set(names)) < len(names):
            raise ConfigError(
                f"modalities are {pieces}; their names must differ (and not be {WORDS!r}) and their widths must add up "
                f"to the width of the content vectors, {items.picture_width}."
            )
        self.names, self.width = tuple(names), width
        self._ends = torch.tensor([size for _, size in pieces]).cumsum(0).tolist()
        self._words = items.config.words
        sizes = [size for _, size in pieces] + ([items.config.words] if items.config.words else [])
        self.encoders = nn.ModuleList(mlp([size, width, width], lambda _: nn.GELU()) for size in sizes)
        self.looked = nn.Linear(width, width)
        self.asked = nn.Linear(width, 1, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    def place(self, name: str) -> int:
        """Which of the M modalities that is.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self.names:
            raise ConfigError(f"there is no modality {name!r}; this judge has {', '.join(self.names)}.")
        return self.names.index(name)

    def forward(self, features_XD: Tensor, *, without: int | None = None) -> Fused:
        """Fuse what is present; ``without`` leaves one modality out, as if it were missing."""
        parts = self._parts(features_XD)
        views, present = [], []
        for place, ((part, there), encoder) in enumerate(zip(parts, self.encoders, strict=True)):
            if place == without:
                there = torch.zeros_like(there)
            # A drawn picture has no words: what nobody has is not computed.
            shown = F.normalize(encoder(part), dim=-1) * there[..., None] if bool(there.any()) else None
            views.append(features_XD.new_zeros(*there.shape, self.width) if shown is None else shown)
            present.append(there)
        views_XME, present_XM = torch.stack(views, dim=-2), torch.stack(present, dim=-1)
        if len(self.names) == 1:
            weight_XM = present_XM.to(views_XME.dtype)
        else:
            asked_XM = self.asked(torch.tanh(self.looked(views_XME)))[..., 0]
            weight_XM = asked_XM.masked_fill(~present_XM, -1e9).softmax(-1) * present_XM
        fused_XE = F.normalize((weight_XM[..., None] * views_XME).sum(-2), dim=-1)
        return Fused(item_XE=fused_XE, views_XME=views_XME, present_XM=present_XM, weight_XM=weight_XM)

    def _parts(self, features_XD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each modality's slice, and whether it is there."""
        starts = [0, *self._ends[:-1]]
        slices = [features_XD[..., begin:end] for begin, end in zip(starts, self._ends, strict=True)]
        parts = [(piece, (piece != 0).any(-1)) for piece in slices]
        if self._words:
            end = self._ends[-1]
            parts.append((features_XD[..., end : end + self._words], features_XD[..., end + self._words] > 0))
        return parts

    def alignment(self, views_NME: Tensor, present_NM: Tensor) -> Tensor:
        """Symmetric InfoNCE, the mean over pairs of modalities, each over the items that have both; 0 for no pair."""
        losses = []
        temperature = self.log_temperature.exp().clamp_min(_COLDEST)
        for one in range(len(self.names)):
            for other in range(one + 1, len(self.names)):
                both = (present_NM[:, one] & present_NM[:, other]).nonzero()[:, 0]
                if len(both) < 2:
                    continue
                logits = views_NME[both, one] @ views_NME[both, other].T / temperature
                own = torch.arange(len(both), device=logits.device)
                losses.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
        return torch.stack(losses).mean() if losses else views_NME.new_zeros(())


@torch.no_grad()
def retrieval(views_NME: Tensor, one: int, other: int) -> float:
    """R@1: share of items whose own vector in modality ``other`` is the nearest to their vector in ``one``."""
    nearest_N = (views_NME[:, one] @ views_NME[:, other].T).argmax(1)
    return float((nearest_N == torch.arange(len(nearest_N), device=nearest_N.device)).float().mean())
