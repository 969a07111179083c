"""What is measured of the pictures a window was given (generation.md 23).

All of it sees pictures through the evaluation encoder, except ``validity`` and ``mush`` (pixels) and ``judge``.

====================== ==========================================================================================
basket_precision       share of pictures whose nearest real item is in the true next basket
basket_precision_new   pictures that hit and are not in the history, over pictures not in the history (0 when none)
distinct_hits          different items of the next basket that are shown, over the pictures: a repeat counts once
hit@k, ndcg@k          the whole catalogue ranked by its greatest similarity to any of the pictures; relevant are the
                       items of the next basket (hit: any of them among the first k)
hr_target              one drawn item of the next basket is the nearest item of some picture
sim_next, sim_history  mean over pictures of the cosine to the most similar item of the next basket, of the history
diversity              mean of 1 - cosine between two pictures of the window
between_user           mean of 1 - cosine to the pictures of other users
distinct               different nearest items, as a share of the pictures
novelty, copied        share of pictures whose nearest item is not, is in the history
validity, mush         share of pictures within 23 dB of a real tile; share beyond 18 dB of every one
judge                  mean standardised logit of the judge, in SD
<attribute>            share of pictures whose attribute, as read off them, occurs in the next basket
====================== ==========================================================================================

Legend: V windows, n pictures a window, I items, D features, R rows of the finder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from couturier.components.data.formats import Catalogue
from couturier.components.evaluation.encoder import AttributeReader, Encoder, ItemFinder, attribute_classes

CUTS = (10, 20, 50)
VALID_DB, MUSH_DB = 23.0, 18.0
_CHUNK = 128


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the windows really were: the next basket, the history as the generator saw it, and whose they are.

    ``target_V`` is one item of each next basket, drawn before anything was generated.
    """

    basket_VI: Tensor
    history_VI: Tensor
    target_V: Tensor
    user_V: Tensor

    def __len__(self) -> int:
        return len(self.target_V)

    def part(self, where: slice | Tensor) -> Truth:
        """Some of the windows."""
        return Truth(**{name: value[where] for name, value in vars(self).items()})


class Ruler:
    """Measures rows of pictures against the truth of their windows.

    Args:
        reader: reads attributes off pictures.
    """

    def __init__(self, finder: ItemFinder, reader: AttributeReader, catalogue: Catalogue) -> None:
        self.finder, self.reader = finder, reader
        self.classes_I = attribute_classes(catalogue)

    def measure(self, rows_Vn: Tensor, truth: Truth, liking_Vn: Tensor) -> dict[str, np.ndarray]:
        """Every per-window metric, float64 ``[V]``.

        Args:
            rows_Vn: the finder's row of each picture.
            liking_Vn: the judge's standardised logits.
        """
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(truth), _CHUNK):
            where = slice(start, start + _CHUNK)
            parts.append(self._measure(rows_Vn[where], truth.part(where)))
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        found["judge"] = liking_Vn.mean(1)
        found["between_user"] = between_users(self.finder.features_RD[rows_Vn], truth.user_V)
        return {name: value.double().numpy() for name, value in found.items()}

    def _measure(self, rows_Vn: Tensor, truth: Truth) -> dict[str, Tensor]:
        # The same pictures come up again and again: each is compared with the catalogue once.
        unique_M, where_Vn = rows_Vn.unique(return_inverse=True)
        f_MD = self.finder.features_RD[unique_M]
        f_VnD, similar_VnI = f_MD[where_Vn], (f_MD @ self.finder.tiles_ID.T)[where_Vn]
        nearest_Vn = self.finder.nearest_R[rows_Vn]
        psnr_Vn = self.finder.psnr_R[rows_Vn]
        hit_Vn = truth.basket_VI.gather(1, nearest_Vn).double()
        new_Vn = 1 - truth.history_VI.gather(1, nearest_Vn).double()
        found = {
            "basket_precision": hit_Vn.mean(1),
            "basket_precision_new": (hit_Vn * new_Vn).sum(1) / new_Vn.sum(1).clamp_min(1),
            "distinct_hits": _shown(nearest_Vn, truth.basket_VI) / nearest_Vn.shape[1],
            **retrieval(similar_VnI.amax(1), truth.basket_VI),
            "hr_target": (nearest_Vn == truth.target_V[:, None]).any(1).float(),
            "sim_next": _to_nearest(similar_VnI, truth.basket_VI),
            "sim_history": _to_nearest(similar_VnI, truth.history_VI),
            "diversity": within(f_VnD),
            "distinct": _distinct(nearest_Vn),
            "novelty": new_Vn.mean(1),
            "copied": 1 - new_Vn.mean(1),
            "validity": (psnr_Vn >= VALID_DB).double().mean(1),
            "mush": (psnr_Vn < MUSH_DB).double().mean(1),
        }
        for name, read_M in self.reader.read(f_MD).items():
            found[name] = self._agrees(name, read_M[where_Vn], truth.basket_VI)
        return found

    def _agrees(self, name: str, read_Vn: Tensor, basket_VI: Tensor) -> Tensor:
        classes_I = self.classes_I[name]
        known = classes_I >= 0
        width = max(1, int(classes_I.max()) + 1, int(read_Vn.max()) + 1)
        wanted_VC = torch.zeros(len(read_Vn), width)
        wanted_VC.index_add_(1, classes_I[known], basket_VI[:, known].float())
        return (wanted_VC.gather(1, read_Vn) > 0).double().mean(1)

    def whole_row(self, rows_Vn: Tensor, real_items: np.ndarray) -> dict[str, float]:
        """Figures of all pictures together: ``coverage`` (share of the catalogue shown) and ``frechet`` (distance to
        the real next items ``real_items``, one index for each of any number of real pictures)."""
        drawn, real = self.finder.features_RD[rows_Vn.flatten()], self.finder.tiles_ID[torch.from_numpy(real_items)]
        shown = self.finder.nearest_R[rows_Vn].unique()
        return {
            "coverage": len(shown) / self.finder.items,
            "frechet": frechet(Encoder.overall(drawn), Encoder.overall(real)),
        }


def retrieval(score_VI: Tensor, relevant_VI: Tensor) -> dict[str, Tensor]:
    """``hit@k`` and ``ndcg@k`` of ranking all items by a score, for every k of :data:`CUTS`.

    DCG with binary gains and discount 1 / log2(rank + 1) (Järvelin and Kekäläinen 2002), over its ideal.
    """
    deepest = min(max(CUTS), score_VI.shape[1])
    top_Vk = score_VI.topk(deepest, dim=1).indices
    gain_Vk = relevant_VI.gather(1, top_Vk).float()
    discount_k = 1 / torch.log2(torch.arange(deepest) + 2.0)
    ideal_k = discount_k.cumsum(0)
    count_V = relevant_VI.sum(1)
    found = {}
    for cut in CUTS:
        k = min(cut, deepest)
        ideal_V = ideal_k[count_V.clamp(1, k) - 1]
        found[f"hit@{cut}"] = gain_Vk[:, :k].amax(1)
        found[f"ndcg@{cut}"] = (gain_Vk[:, :k] * discount_k[:k]).sum(1) / ideal_V
    return found


def within(f_VnD: Tensor) -> Tensor:
    """Mean of 1 - cosine over pairs of pictures of one window, ``[V]``; 0 for a single picture. Unit-norm features."""
    n = f_VnD.shape[1]
    if n == 1:
        return f_VnD.new_zeros(len(f_VnD))
    # |sum f|^2 = n + 2 * (sum over pairs of cosines)
    return 1 - (f_VnD.sum(1).square().sum(-1) - n) / (n * (n - 1))


def between_users(f_VnD: Tensor, user_V: Tensor) -> Tensor:
    """Mean of 1 - cosine between a window's pictures and those of all other users, ``[V]``; NaN for a single user."""
    n = f_VnD.shape[1]
    users, index_V = user_V.unique(return_inverse=True)
    sum_VD = f_VnD.sum(1)
    sum_UD = torch.zeros(len(users), sum_VD.shape[1]).index_add_(0, index_V, sum_VD)
    count_U = torch.bincount(index_V, minlength=len(users)) * n
    others_VD = sum_VD.sum(0) - sum_UD[index_V]
    others_V = (count_U.sum() - count_U[index_V]).float()
    return 1 - (sum_VD / n * others_VD).sum(-1) / others_V


def frechet(a_ND: Tensor, b_MD: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features (Dowson and Landau 1982), covariances shrunk.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2). It depends on this encoder and on the number of pictures:
    compare it between rows of one table only.
    """
    mean_a, cov_a = _gaussian(a_ND)
    mean_b, cov_b = _gaussian(b_MD)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def _gaussian(x_ND: Tensor, shrinkage: float = 0.01) -> tuple[Tensor, Tensor]:
    """Mean and covariance, drawn a little to a multiple of the identity, so that few pictures do not make it flat."""
    x = x_ND.double()
    centred = x - x.mean(0)
    cov = centred.T @ centred / max(1, len(x) - 1)
    level = cov.trace() / len(cov)
    return x.mean(0), (1 - shrinkage) * cov + shrinkage * level * torch.eye(len(cov), dtype=torch.float64)


def _to_nearest(similar_VnI: Tensor, members_VI: Tensor) -> Tensor:
    """Mean over pictures of the cosine to the most similar member; 0 where there is none."""
    best_Vn = similar_VnI.masked_fill(~members_VI[:, None], -1.0).amax(-1)
    return torch.where(members_VI.any(1), best_Vn.mean(1), 0.0)


def _shown(nearest_Vn: Tensor, members_VI: Tensor) -> Tensor:
    """How many different members the pictures show, ``[V]``."""
    shown_VI = torch.zeros_like(members_VI).scatter_(1, nearest_Vn, value=True)
    return (shown_VI & members_VI).sum(1).double()


def _distinct(nearest_Vn: Tensor) -> Tensor:
    """Different values in each row, over its length."""
    ordered = nearest_Vn.sort(1).values
    return (1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)) / nearest_Vn.shape[1]
