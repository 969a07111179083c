"""What all judges share: the features of items, the doors that refuse bad input, a loss, explanations, a unit.

A judge adds a config, ``_encode`` (histories to a state) and ``_score`` (state and candidates to logits), and changes
``loss`` where its paper does. Everything a judge is asked goes through the public methods here, which check it.

Letters: U users, C candidates of a user, P taken ones among them, T history length, N rows, D features, S pool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.items import Content, FeatureConfig, ItemFeatures
from couturier.components.interest.transitions import Transitions
from couturier.components.interest.types import HistoryBatch, TrainBatch, check_finite
from couturier.components.together import mean_over

_REPLAYED = 4096  # history rows encoded at a time when explaining


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What every judge's config is made of: sizes that are at least one, shares between 0 and 1."""

    bce: float = 0.25
    """Weight of binary cross-entropy beside the Bradley-Terry loss over (taken, not taken) pairs."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"{type(self).__name__}.{name} is {value}; it must be at least 1.")
            if isinstance(value, float) and value < 0:
                raise ConfigError(f"{type(self).__name__}.{name} is {value}; it must not be negative.")


class ContentJudge(nn.Module, ABC):
    """A judge by content; see ``types.Judge`` for what each method promises.

    Args:
        config: the judge's sizes.
        features: which parts an item's features have.
        content: the catalogue.
    """

    Config: ClassVar[type[JudgeConfig]]
    name: ClassVar[str]
    every_position: ClassVar[bool] = False
    """Whether the loss learns from every place of the history (a sequence model), not from the candidates alone."""
    wants_transitions: ClassVar[bool] = False
    """Whether the loss learns from ``transitions``; then a fit counts them in its training data before it begins."""
    transitions: Transitions | None = None
    """What followed what in the training data; not needed to score, so not saved."""

    def __init__(self, config: JudgeConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__()
        self.settings = config
        self.items = ItemFeatures(features, content)
        self.register_buffer("calibration", torch.tensor([0.0, 1.0]))
        self.calibration: Tensor

    @property
    def width(self) -> int:
        """D."""
        return self.items.width

    def embed_pictures(self, rgb_N3HW: Tensor) -> Tensor:
        """Float pictures 0..1 without words -> features ``[N, D]``.

        Raises:
            DataError: not ``[N, 3, H, W]``, a value that is not finite, or a judge without eyes.
        """
        return self.items.embed_pictures(rgb_N3HW)

    def embed_items(self, *, words: bool = True) -> Tensor:
        """The catalogue -> features ``[I, D]``, with or without its words (and identities)."""
        return self.items.embed_items(words=words)

    def encode(self, history: HistoryBatch) -> Any:
        """Histories -> a state a user.

        Raises:
            DataError: shapes that do not agree or values that are not finite.
        """
        history.check(self.width)
        return self._encode(history)

    def score(self, state: Any, candidates_UCD: Tensor) -> Tensor:
        """Logits ``[U, C]``; higher means likelier to be taken next.

        Raises:
            DataError: a candidate of another width, for other users, or with a value that is not finite.
        """
        users = len(state)
        if candidates_UCD.ndim != 3 or candidates_UCD.shape[0] != users or candidates_UCD.shape[2] != self.width:
            raise DataError(
                f"candidates_UCD has shape {list(candidates_UCD.shape)}, wanted [{users}, C, {self.width}]: take the "
                "features from this judge's embed_items or embed_pictures, one row of candidates a user."
            )
        check_finite("candidates_UCD", candidates_UCD)
        if not candidates_UCD.shape[1]:
            return candidates_UCD.new_zeros(users, 0)
        return self._score(state, candidates_UCD)

    def score_all(self, state: Any, items_ID: Tensor) -> Tensor:
        """Logits ``[U, I]`` of the same candidates for every user; an item tower makes it one product."""
        return self._score(state, items_ID.expand(len(state), -1, -1))

    @abstractmethod
    def _encode(self, history: HistoryBatch) -> Any:
        """A checked history -> the judge's own state; ``len(state)`` is the number of users."""

    @abstractmethod
    def _score(self, state: Any, candidates_UCD: Tensor) -> Tensor:
        """Logits ``[U, C]`` of at least one checked candidate a user."""

    def loss(self, batch: TrainBatch, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step and its named parts, for the curves; ``noise`` draws whatever a judge draws."""
        return ranking_loss(self._score(self._encode(batch.history), batch.candidates_UCD), batch, self.settings.bce)

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        By reading every history again without each of its items, so it costs T times a score.
        """
        whole_UC = self.score(self.encode(history), candidates_UCD)
        real_UT = history.real_UT()
        out_UCT = whole_UC.new_zeros(*whole_UC.shape, real_UT.shape[1])
        lengths = history.lengths
        for user in range(len(history)):
            length, start = int(lengths[user]), int(history.offsets[user])
            step = max(1, _REPLAYED // max(1, length))
            for first in range(0, length, step):
                dropped_M = torch.arange(first, min(length, first + step))
                kept_MT = torch.arange(length) != dropped_M[:, None]
                rows = (torch.arange(length).expand(len(dropped_M), -1) + start)[kept_MT]
                offsets = torch.arange(len(dropped_M) + 1) * (length - 1)
                shown_MCD = candidates_UCD[user].expand(len(dropped_M), -1, -1)
                without_MC = self._score(self._encode(history.rows(rows, offsets)), shown_MCD)
                out_UCT[user, :, dropped_M] = (whole_UC[user] - without_MC).T
        return out_UCT

    @torch.no_grad()
    def calibrate(self, logits: Tensor) -> None:
        """Remember mean and SD of the logits of (train user, random catalogue picture) pairs."""
        self.calibration.copy_(torch.stack([logits.mean(), logits.std().clamp_min(1e-6)]))

    def standardise(self, logits: Tensor) -> Tensor:
        """Logits in units of the SD over (train user, random catalogue picture) pairs, 0 at their mean."""
        return (logits - self.calibration[0]) / self.calibration[1]


def ranking_loss(logits_UC: Tensor, batch: TrainBatch, bce: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry over all (taken, not taken) pairs of a user, and ``bce`` times binary cross-entropy."""
    good_UP, bad_UN = logits_UC[:, : batch.positives], logits_UC[:, batch.positives :]
    real_UN = batch.real_UC[:, batch.positives :]
    pairs = F.softplus(bad_UN[:, None] - good_UP[:, :, None]) * real_UN[:, None]
    ranking = mean_over(pairs.sum(), real_UN.sum() * batch.positives)
    level = F.softplus(-good_UP).mean() + mean_over((F.softplus(bad_UN) * real_UN).sum(), real_UN.sum())
    loss: Tensor = ranking + bce * level
    return loss, {"ranking": ranking.detach(), "bce": level.detach()}
