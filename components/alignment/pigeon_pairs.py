"""Pictures of every mask ratio, how like the history and the reference they are, and pairs made of them.

    window ─▶ one picture a ratio ─▶ similarity to the history, to the reference ─▶ (best, worst) of those that pass

Pigeon's second stage (generation.md 2.6): of eleven pictures, the one most like the history is preferred to the least.
Alone, that teaches to forget the reference, which Pigeon is reported to do ("guidance collapse"), so the preferred one
must also be a whole picture and still like the reference, by a floor (ours), and a pair that hardly differs is left
out (ours). Likeness is the cosine of the judge's features, less the catalogue's mean, in CLIP's place.

Legend: U users, n pictures a user (one a ratio), L codes a picture, K favourites, D features, I items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from couturier.components.alignment.rewards import PictureBook
from couturier.components.generator.pigeon import PigeonGenerator

RATIOS = tuple(tenth / 10 for tenth in range(11))
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """One picture of each ratio for each window.

    codes_UnL; history_Un: mean similarity to the history's pictures; reference_Un: similarity to the reference;
    psnr_Un: decibels to the nearest catalogue tile; nearest_Un: which tile that is.
    """

    codes_UnL: Tensor
    history_Un: Tensor
    reference_Un: Tensor
    psnr_Un: Tensor
    nearest_Un: Tensor

    def best(self) -> Tensor:
        """The published final choice among ratios ``[U]``: half likeness to the reference, half to the history. It
        selects on what is then measured, so figures at a fixed ratio belong beside it."""
        return (0.5 * self.reference_Un + 0.5 * self.history_Un).argmax(1)


@torch.no_grad()
def candidates(
    policy: PigeonGenerator,
    book: PictureBook,
    favourites_UK: np.ndarray,
    references_U: Tensor,
    seeds: list[int],
    *,
    unknown: bool = False,
    ratios: tuple[float, ...] = RATIOS,
) -> Candidates:
    """Draw and look. All ratios of a window share its random numbers.

    Args:
        unknown: draw as for somebody without a history; pictures are still compared with the real one.
    """
    shown_UK = np.full_like(favourites_UK, -1) if unknown else favourites_UK
    parts = []
    for start in range(0, len(shown_UK), _BATCH):
        some = slice(start, start + _BATCH)
        drawn = [
            policy.sample(
                shown_UK[some], 1, seeds=seeds[some], references_UR=references_U[some, None], ratio=ratio, spread=False
            )
            for ratio in ratios
        ]
        parts.append(torch.cat(drawn, 1))
    return look(book, torch.cat(parts), favourites_UK, references_U, policy.codes_IL)


def look(
    book: PictureBook, codes_UnL: Tensor, favourites_UK: np.ndarray, references_U: Tensor, codes_IL: Tensor
) -> Candidates:
    """What is to be known about drawn pictures."""
    tiles_ID = book.features[book.look(codes_IL)]
    mean_D = tiles_ID.mean(0)
    tiles_ID = F.normalize(tiles_ID - mean_D, dim=-1)
    rows_Un = book.look(codes_UnL.flatten(0, 1)).view(codes_UnL.shape[:2])
    pictures_UnD = F.normalize(book.features[rows_Un] - mean_D, dim=-1)
    items_UK = torch.from_numpy(favourites_UK.astype(np.int64))
    real_U1K = (items_UK >= 0)[:, None]
    to_each_UnK = pictures_UnD @ tiles_ID[items_UK.clamp_min(0)].transpose(1, 2)
    return Candidates(
        codes_UnL=codes_UnL,
        history_Un=(to_each_UnK * real_U1K).sum(-1) / real_U1K.sum(-1).clamp_min(1),
        reference_Un=(pictures_UnD * tiles_ID[references_U][:, None]).sum(-1),
        psnr_Un=book.psnr[rows_Un],
        nearest_Un=book.nearest[rows_Un],
    )


def choose(found: Candidates, *, floor: float, margin: float, valid_db: float) -> tuple[Tensor, Tensor]:
    """Places ``[U, 2]`` of the preferred and the rejected picture, and which windows have such a pair, bool ``[U]``.

    Args:
        floor: least similarity of the preferred picture to the reference.
        margin: least difference of the two pictures' similarity to the history.
        valid_db: least decibels of the preferred picture to a real tile.
    """
    passes_Un = (found.reference_Un >= floor) & (found.psnr_Un >= valid_db)
    best = found.history_Un.masked_fill(~passes_Un, -2.0).max(1)
    worst = found.history_Un.min(1)
    fits_U = passes_Un.any(1) & (best.values - worst.values >= margin)
    return torch.stack([best.indices, worst.indices], 1), fits_U


def figures(found: Candidates, basket_UI: Tensor, ratio: float) -> Mapping[str, float]:
    """Likeness and next-basket precision at each ratio, at the configured one, and of the best of all eleven.

    Both kinds belong together: the best of eleven is chosen by what it is then measured with.
    """
    hit_Un = basket_UI.gather(1, found.nearest_Un).float()
    values = {"history": found.history_Un, "reference": found.reference_Un, "basket": hit_Un}
    best_U1 = found.best()[:, None]
    fixed = min(range(len(RATIOS)), key=lambda place: abs(RATIOS[place] - ratio))
    out: dict[str, float] = {}
    for name, value_Un in values.items():
        out |= {f"pigeon_{name}_at_{at}": float(column) for at, column in zip(RATIOS, value_Un.mean(0), strict=True)}
        out[f"pigeon_{name}_fixed"] = float(value_Un[:, fixed].mean())
        out[f"pigeon_{name}_best_of_11"] = float(value_Un.gather(1, best_U1).mean())
    return out
