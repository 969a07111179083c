"""The reward: a named weighted sum of terms, each ``(pictures, history, target) -> [U, n]``, logged term by term.

Which pictures count as an item is decided in pixels (the nearest catalogue tile), what a person would like by the
judge. Evaluation uses another encoder than either, so that a reward that is fooled shows (generation.md 23.7).

Legend: U users, n pictures a user (a group), L codes a picture, I items, D judge features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from couturier.components.data.formats import Catalogue
from couturier.components.generator.codec import Codec, pictures
from couturier.components.interest.types import Judge

_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How much each term counts. Zero leaves a term out of the sum; it is logged all the same."""

    slate: float = 1.0
    """What a picture adds to the group's agreement with :func:`~couturier.components.alignment.distil.wanted`."""
    coverage: float = 0.2
    """Leave-one-out coverage of the next basket by the group: what a picture adds that no other of its group has."""
    judge: float = 0.0
    """The judge's standardised logit, in SD."""
    future: float = 0.0
    """Whether the picture is an item of the baskets after the next."""
    social: float = 0.0
    """How likely people are to come back to such a picture, in SD above others of its kind (Social Reward)."""
    copying: float = 5.0
    """Penalty on pictures out of the history, for the share of the group beyond ``copy_allowed``."""
    validity: float = 1.0
    """Penalty for pixels far from every real tile: mush that an encoder's cosine does not see."""
    dissimilarity: float = 1.5
    """Mean feature distance to the other pictures of the group."""
    copy_allowed: float = 0.42
    """Share of a group that may come from the history at no cost."""
    valid_db: float = 26.0
    """PSNR to the nearest real tile from which on a picture is flawless."""

    def of(self) -> dict[str, float]:
        """The weights by term name."""
        return {name: float(self.__dict__[name]) for name in TERMS}


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A batch of groups and what is known about each picture.

    nearest_Un: catalogue index of the nearest tile;  psnr_Un: decibels to it;  features_UnD: the judge's features.
    liking_Un: the judge's standardised logit;  wanted_UI: the distribution that a person's pictures should have.
    basket_UI, future_UI, history_UI: bool membership of items.
    social_Un: :meth:`~couturier.components.alignment.social.SocialReward.score`; None where its weight is 0.
    """

    nearest_Un: Tensor
    psnr_Un: Tensor
    features_UnD: Tensor
    liking_Un: Tensor
    wanted_UI: Tensor
    basket_UI: Tensor
    future_UI: Tensor
    history_UI: Tensor
    social_Un: Tensor | None = None


def coverage(rollout: Rollout, weights: Weights) -> Tensor:
    """1 where a picture is an item of the next basket that no other picture of its group shows, else 0.

    Coverage of a group is the number of basket items it shows; this is coverage(group) - coverage(group without i).
    """
    return (_is_in(rollout.basket_UI, rollout.nearest_Un) & (_same(rollout).sum(-1) == 1)).float()


def slate(rollout: Rollout, weights: Weights) -> Tensor:
    """What a picture adds to the agreement of its group with what is wanted of it.

    Agreement is sum_i min(pictures of item i, n * wanted_i); without one of c pictures of an item it is lower by
    n * wanted_i - (c - 1), at least 0 and at most 1. An item shown more often than it is wanted earns nothing more.
    """
    n = rollout.nearest_Un.shape[1]
    others_Un = _same(rollout).sum(-1) - 1
    return (n * rollout.wanted_UI.gather(1, rollout.nearest_Un) - others_Un).clamp(0, 1)


def judge(rollout: Rollout, weights: Weights) -> Tensor:
    """The judge's standardised logit, clipped at 3 SD so that one picture cannot outshout its group."""
    return rollout.liking_Un.clamp(-3, 3)


def future(rollout: Rollout, weights: Weights) -> Tensor:
    """1 where the picture is an item of one of the later baskets, shared among pictures of the same item."""
    return _is_in(rollout.future_UI, rollout.nearest_Un).float() / _same(rollout).sum(-1)


def social(rollout: Rollout, weights: Weights) -> Tensor:
    """What a community would come back to, clipped at 3 SD as the judge's liking is; 0 where nobody was asked."""
    return torch.zeros_like(rollout.liking_Un) if rollout.social_Un is None else rollout.social_Un.clamp(-3, 3)


def copying(rollout: Rollout, weights: Weights) -> Tensor:
    """Minus the share of the group out of the history beyond what is allowed, borne by the copies."""
    copied_Un = _is_in(rollout.history_UI, rollout.nearest_Un).float()
    excess_U1 = (copied_Un.mean(1, keepdim=True) - weights.copy_allowed).clamp_min(0)
    return -copied_Un * excess_U1 / max(1e-6, 1 - weights.copy_allowed)


def validity(rollout: Rollout, weights: Weights) -> Tensor:
    """0 for a flawless tile, falling to -1 at 10 dB below ``valid_db``."""
    return -((weights.valid_db - rollout.psnr_Un) / 10).clamp(0, 1)


def dissimilarity(rollout: Rollout, weights: Weights) -> Tensor:
    """Mean of (1 - cosine) / 2 to the other pictures of the group; 0 for a group of one."""
    f = F.normalize(rollout.features_UnD, dim=-1)
    n = f.shape[1]
    if n == 1:
        return f.new_zeros(f.shape[:2])
    distance_Unn = (1 - f @ f.transpose(1, 2)) / 2
    return distance_Unn.sum(-1) / (n - 1)


TERMS: dict[str, Callable[[Rollout, Weights], Tensor]] = {
    "slate": slate,
    "coverage": coverage,
    "judge": judge,
    "future": future,
    "social": social,
    "copying": copying,
    "validity": validity,
    "dissimilarity": dissimilarity,
}


def score(rollout: Rollout, weights: Weights) -> tuple[Tensor, dict[str, Tensor]]:
    """``(total [U, n], {term: [U, n]})``; the total is the weighted sum."""
    terms = {name: term(rollout, weights) for name, term in TERMS.items()}
    of = weights.of()
    return sum(
        (of[name] * value for name, value in terms.items()),
        torch.zeros_like(rollout.liking_Un),
    ), terms


def advantages(reward_Un: Tensor, *, by_std: bool = True) -> Tensor:
    """Group-relative advantage: centred on the group's mean, divided by its standard deviation + 1e-4 (1.6.3)."""
    centred = reward_Un - reward_Un.mean(1, keepdim=True)
    return centred / (reward_Un.std(1, keepdim=True, correction=0) + 1e-4) if by_std else centred


def membership(values: list[np.ndarray], items: int) -> Tensor:
    """Lists of item indices → bool ``[U, items]``; -1 is nobody."""
    found = torch.zeros(len(values), items, dtype=torch.bool)
    for row, members in zip(found, values, strict=True):
        row[torch.from_numpy(np.asarray(members[members >= 0], np.int64))] = True
    return found


class PictureBook:
    """What is known about every code sequence seen so far: nearest item, decibels to it, the judge's features.

    A trained generator draws the same tiles again and again; each is decoded and looked at once. Pictures are decoded
    in chunks of one fixed size, so the bits do not depend on which others were new at the time.
    """

    def __init__(self, codec: Codec, judge: Judge, catalogue: Catalogue) -> None:
        self.codec, self.judge = codec, judge
        tiles = pictures(catalogue, codec.picture_size)
        self.tiles_IP = tiles.flatten(1)
        self._square_I = self.tiles_IP.square().sum(1)
        self._row: dict[bytes, int] = {}
        self.nearest = torch.empty(0, dtype=torch.long)
        self.psnr = torch.empty(0)
        self.features = torch.empty(0, judge.width)

    def look(self, codes_NL: Tensor) -> Tensor:
        """Row of each code sequence ``[N]`` in ``nearest``, ``psnr`` and ``features``."""
        keys = [row.tobytes() for row in codes_NL.numpy()]
        fresh = list(dict.fromkeys(i for i in keys if i not in self._row))
        for start in range(0, len(fresh), _CHUNK):
            self._add(fresh[start : start + _CHUNK])
        return torch.tensor([self._row[key] for key in keys])

    @torch.no_grad()
    def _add(self, keys: list[bytes]) -> None:
        codes = torch.from_numpy(np.stack([np.frombuffer(key, np.int64) for key in keys]))
        padded = torch.cat([codes, codes[:1].expand(_CHUNK - len(keys), -1)])
        rgb = self.codec.decode(padded)
        flat = rgb.flatten(1)
        distance = flat.square().sum(1, keepdim=True) + self._square_I - 2 * flat @ self.tiles_IP.T
        squared, nearest = distance.min(1)
        psnr = -10 * (squared / flat.shape[1]).clamp_min(1e-10).log10()
        features = self.judge.embed_pictures(rgb)
        count = len(keys)
        for key in keys:
            self._row[key] = len(self._row)
        self.nearest = torch.cat([self.nearest, nearest[:count]])
        self.psnr = torch.cat([self.psnr, psnr[:count]])
        self.features = torch.cat([self.features, features[:count]])


def _same(rollout: Rollout) -> Tensor:
    """bool ``[U, n, n]``: the two pictures show the same item."""
    return rollout.nearest_Un[:, :, None] == rollout.nearest_Un[:, None]


def _is_in(members_UI: Tensor, nearest_Un: Tensor) -> Tensor:
    return members_UI.gather(1, nearest_Un)
