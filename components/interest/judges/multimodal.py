"""The multimodal judge: modalities in one space, behaviours of several kinds, an interest that drifts, and its reasons.

    item ─▶ modalities (picture, words, ...) ─▶ fused e ─┬────────────────────────────────────────┐
    kinds, values, gaps ─────────────────────────────────┴▶ behaviours ─▶ short, long term ─▶ u ──┴▶ click, kind, value

"Multimodal foundation model driven user interest modelling on short video" (arXiv 2509.04751). Of the paper only the
abstract could be had: one semantic space by cross-modal alignment, behaviour-driven embedding of viewing, liking and
commenting, interest drift, cold start, and explanations by modality. Everything within that is our design:
``modalities`` and ``evolution`` have the parts, and this file the heads. An event has one kind (view, like, comment,
...), so one cross-entropy over kinds stands for the card's two binary ones; it and the regression of the value are
learned at places along a history from the interest before it. The click loss is the one of all judges. An identity,
where features have one, is added behind its gate, so an item that was never met is judged by its content alone.

Letters: U users, C candidates of a user, T history length, M modalities, N rows, E width, F hidden width, K kinds,
D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge, JudgeConfig, ranking_loss
from couturier.components.interest.evolution import Behaviours, Evolution, Interest
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.modalities import Fused, Modalities
from couturier.components.interest.types import HistoryBatch, TrainBatch

_MOST = 1 << 22  # numbers of a chunk
_SHARPNESS = 5.0  # of the likeness of interest and item at first; learned


@dataclass(frozen=True, kw_only=True)
class MultimodalConfig(JudgeConfig):
    """Sizes and loss weights of the multimodal judge."""

    width: int = 32
    """E, the width of the shared space."""
    heads: int = 2
    """Heads of the causal attention; they divide the width."""
    hidden: int = 64
    """F, the width of the layer below the heads."""
    modalities: tuple[str, ...] = ()
    """The pieces that content vectors are made of as ``NAME:WIDTH``, such as ``("picture:16", "audio:16")``; a piece of
    zeros is missing. Empty for one piece, the picture. Words come by themselves."""
    recent: int = 64
    """How many of the newest behaviours the short-term interest reads; the long-term one reads all."""
    fade_days: float = 30.0
    """Days in which a behaviour's part in the long-term interest falls to 1 / e, at first; learned."""
    kinds: int = 8
    """Kinds of behaviour told apart; kinds with higher numbers share the last."""
    temperature: float = 0.07
    """Of the alignment loss, at first; learned."""
    align_items: int = 128
    """Items of a step that the alignment loss compares."""
    behaviour_places: int = 8
    """Places of the histories of a step from which the next kind and value are foretold."""
    align_weight: float = 0.1
    kind_weight: float = 0.3
    value_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(f"MultimodalConfig.heads is {self.heads}; it must divide width, {self.width}.")
        if self.fade_days <= 0 or self.temperature <= 0:
            raise ConfigError(
                f"MultimodalConfig has fade_days {self.fade_days} and temperature {self.temperature}; both must be "
                "above 0."
            )
        for piece in self.modalities:
            name, _, width = piece.partition(":")
            if not name or not width.isdigit() or not int(width):
                raise ConfigError(f"MultimodalConfig.modalities has {piece!r}; write NAME:WIDTH, such as 'audio:16'.")

    @property
    def pieces(self) -> list[tuple[str, int]]:
        """Names and widths of ``modalities``."""
        return [(name, int(width)) for name, _, width in (piece.partition(":") for piece in self.modalities)]


@dataclass(frozen=True, kw_only=True)
class MultimodalState:
    """A user's interest, and how much of it is the short-term one."""

    user_UE: Tensor
    gate_U: Tensor

    def __len__(self) -> int:
        return len(self.user_UE)


@dataclass(frozen=True, kw_only=True)
class Reasons:
    """What a score rests on.

    Args:
        names: the M modalities.
        candidate_weight_UCM, history_weight_UTM: each modality's weight in an item; 0 where it is missing.
        behaviour_UT: each behaviour's share in the interest, in the history's order; what lacks to one is the prior's.
        without_UCM: the logit minus the logit when nobody has that modality, neither candidate nor history.
    """

    names: tuple[str, ...]
    candidate_weight_UCM: Tensor
    history_weight_UTM: Tensor
    behaviour_UT: Tensor
    without_UCM: Tensor


@dataclass(frozen=True, kw_only=True)
class InterestTrace:
    """How interests moved, from the oldest behaviour to the newest, padded with zeros (and no label) on the right.

    Args:
        interest_UTE: the interest right after each behaviour.
        drift_UT: ``1 - cosine`` with the interest before; 0 at the first behaviour.
        nearest_UT: row of ``labels`` of the concept that is scored highest then; -1 where padded or without concepts.
        row_UT: which row of the history each place is, counted within the user; -1 where padded.
    """

    interest_UTE: Tensor
    drift_UT: Tensor
    nearest_UT: Tensor
    row_UT: Tensor
    labels: tuple[str, ...]

    def label(self, user: int, place: int) -> str | None:
        """The concept nearest after that behaviour."""
        row = int(self.nearest_UT[user, place])
        return self.labels[row] if row >= 0 else None


class MultimodalJudge(ContentJudge):
    """The judge ``multimodal``; see the module."""

    Config = MultimodalConfig
    name = "multimodal"

    def __init__(self, config: MultimodalConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        e, f = config.width, config.hidden
        self.modalities = Modalities(config.pieces, self.items, e, config.temperature)
        self.identity = nn.Linear(features.ids, e, bias=False) if features.ids else None
        self.evolution = Evolution(
            width=e, heads=config.heads, kinds=config.kinds, recent=config.recent, fade_days=config.fade_days
        )
        self.of_user, self.of_item, self.of_both = nn.Linear(e, f), nn.Linear(e, f), nn.Linear(e, f)
        self.click, self.kind, self.value = nn.Linear(f, 1), nn.Linear(f, config.kinds), nn.Linear(f, 1)
        self.likeness = nn.Parameter(torch.tensor(_SHARPNESS))

    def fused(self, features_XD: Tensor, *, without: int | None = None) -> tuple[Tensor, Fused]:
        """Items in the shared space with their identities, ``[..., E]``, and how their modalities were fused."""
        fused = self.modalities(features_XD, without=without)
        if self.identity is None:
            return fused.item_XE, fused
        start = self.width - self.items.config.ids - 1
        return fused.item_XE + self.identity(features_XD[..., start:-1]), fused

    def _behaviours(self, history: HistoryBatch, without: int | None = None) -> tuple[Behaviours, Tensor, Fused]:
        """Of an ordered history: behaviours, the items they are about ``[U, T, E]``, and their fusion by row."""
        items_NE, fused = self.fused(history.features_ND, without=without)
        return self.evolution.behaviours(history, items_NE), history.pad(items_NE), fused

    def _encode(self, history: HistoryBatch) -> MultimodalState:
        return self._state(history)

    def _state(self, history: HistoryBatch, without: int | None = None) -> MultimodalState:
        interest = self.evolution.now(self._behaviours(history.oldest_first(), without)[0])
        return MultimodalState(user_UE=interest.user_XE, gate_U=interest.gate_X)

    def _score(self, state: MultimodalState, candidates_UCD: Tensor) -> Tensor:
        return self._logit(state.user_UE[:, None], self.fused(candidates_UCD)[0])

    def score_all(self, state: MultimodalState, items_ID: Tensor) -> Tensor:
        """Logits ``[U, I]``; an item is fused once for all users, and some items are scored at a time."""
        items_IE = self.fused(items_ID)[0]
        step = max(1, _MOST // (self.config.hidden * max(1, len(state))))
        parts = [self._logit(state.user_UE[:, None], part[None]) for part in items_IE.split(step)]
        return torch.cat(parts, dim=1) if parts else items_ID.new_zeros(len(state), 0)

    def _hidden(self, user_XE: Tensor, item_XE: Tensor) -> Tensor:
        return F.gelu(self.of_user(user_XE) + self.of_item(item_XE) + self.of_both(user_XE * item_XE))

    def _logit(self, user_XE: Tensor, item_XE: Tensor) -> Tensor:
        found: Tensor = self.click(self._hidden(user_XE, item_XE))[..., 0]
        return found + self.likeness * (user_XE * item_XE).sum(-1)

    def behaviour(self, state: MultimodalState, candidates_UCD: Tensor) -> tuple[Tensor, Tensor]:
        """What a user would do with an item: chances of the kinds ``[U, C, K]``, and the value expected ``[U, C]``."""
        hidden_UCF = self._hidden(state.user_UE[:, None], self.fused(candidates_UCD)[0])
        return self.kind(hidden_UCF).softmax(-1), self.value(hidden_UCF)[..., 0].clamp(-20, 20).expm1()

    def loss(self, batch: TrainBatch, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Click (ranking), alignment of modalities, and kind and value of each behaviour from the interest before."""
        history, config = batch.history.oldest_first(), self.config
        behaviours, items_UTE, fused = self._behaviours(history)
        item_UCE, _ = self.fused(batch.candidates_UCD)
        logits_UC = self._logit(self.evolution.now(behaviours).user_XE[:, None], item_UCE)
        loss, parts = ranking_loss(logits_UC, batch, config.bce)
        if config.align_weight and len(self.modalities.names) > 1:
            rows_M = _distinct(history, config.align_items, noise)
            align = self.modalities.alignment(fused.views_XME[rows_M], fused.present_XM[rows_M])
            loss, parts = loss + config.align_weight * align, parts | {"align": align.detach()}
        told = history.kind_N is not None and bool((history.kinds_N != history.kinds_N[:1]).any())
        valued = bool(history.values_N.any())
        if (told and config.kind_weight) or (valued and config.value_weight):
            kind, value = self._behaviour_losses(history, behaviours, items_UTE, noise)
            loss = loss + config.kind_weight * told * kind + config.value_weight * valued * value
            parts |= {"kind": kind.detach(), "value": value.detach()}
        return loss, parts

    def _behaviour_losses(
        self, history: HistoryBatch, behaviours: Behaviours, items_UTE: Tensor, noise: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the kind and Huber loss of ``log(1 + value)``, given the interest before and the item."""
        length = items_UTE.shape[1]
        if length < 2:
            return items_UTE.sum() * 0, items_UTE.sum() * 0
        drawn = torch.randperm(length - 1, generator=noise)[: self.config.behaviour_places].sort().values
        before_Q = drawn.to(items_UTE.device)
        real_UQ = behaviours.real_UT[:, before_Q + 1]
        before_UQE = self.evolution.after(behaviours, before_Q).user_XE
        hidden_MF = self._hidden(before_UQE[real_UQ], items_UTE[:, before_Q + 1][real_UQ])
        kind_M = history.pad(history.kinds_N)[:, before_Q + 1][real_UQ].clamp(0, self.config.kinds - 1)
        value_M = history.pad(history.values_N)[:, before_Q + 1][real_UQ].clamp_min(0).log1p()
        if not len(kind_M):
            return hidden_MF.sum(), hidden_MF.sum()
        return F.cross_entropy(self.kind(hidden_MF), kind_M), F.huber_loss(self.value(hidden_MF)[:, 0], value_M)

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        The gap that a later behaviour remembers stays as it was. The long term loses one term of its mean; only the
        newest behaviours are read again, so the cost grows with T and not with its square.
        """
        whole_UC = self.score(self.encode(history), candidates_UCD)
        marked = replace(
            history, items_N=torch.arange(len(history.features_ND), device=history.offsets.device)
        ).oldest_first()
        behaviours, _, _ = self._behaviours(marked)
        item_UCE, lengths = self.fused(candidates_UCD)[0], history.lengths
        out_UCT = whole_UC.new_zeros(*whole_UC.shape, behaviours.real_UT.shape[1])
        assert marked.items_N is not None
        for user in range(len(history)):
            start, length = int(history.offsets[user]), int(lengths[user])
            if not length or not whole_UC.shape[1]:
                continue
            own = Behaviours(**{name: value[user : user + 1, :length] for name, value in vars(behaviours).items()})
            interest_TE = self._each_left_out(own).user_XE
            step = max(1, _MOST // (whole_UC.shape[1] * self.config.hidden))
            without = [self._logit(part[:, None], item_UCE[user][None]) for part in interest_TE.split(step)]
            rows_T = marked.items_N[start : start + length] - start
            out_UCT[user][:, rows_T] = whole_UC[user][:, None] - torch.cat(without).T
        return out_UCT

    def _each_left_out(self, own: Behaviours) -> Interest:
        """The interest of one user's T behaviours without each of them, ``[T, ...]``."""
        evolution, length = self.evolution, own.real_UT.shape[1]
        faded_T = evolution.faded(own)[0]
        parts_TE = faded_T[:, None] * own.vectors_UTE[0]
        long_TE = evolution.long(parts_TE.sum(0) - parts_TE, (faded_T.sum() - faded_T).clamp_min(0))
        asked = own.newest(evolution.recent + 1)
        count = asked.real_UT.shape[1]
        kept_VT = ~torch.eye(count, dtype=torch.bool, device=long_TE.device)
        # Without one of the newest R, the one behind them is read in its place.
        kept_VT &= kept_VT.flip(1).cumsum(1).flip(1) <= evolution.recent
        each = Behaviours(**{name: value.expand(count, *value.shape[1:]) for name, value in vars(asked).items()})
        short_VE = evolution.short(evolution.newest_asks(each, kept_VT), each)[:, 0]
        # Those beyond them are not read, so leaving one out is like leaving out the one just behind.
        short_TE = torch.cat([short_VE[:1].expand(length - count, -1), short_VE])
        known_T = torch.full_like(faded_T, float(length > 1))
        return evolution.mixed(short_TE, long_TE, known_T)

    @torch.no_grad()
    def reasons(self, history: HistoryBatch, candidates_UCD: Tensor) -> Reasons:
        """What the scores rest on: modalities, behaviours, and what is lost without each modality.

        Raises:
            DataError: as ``encode`` and ``score``.
        """
        state = self.encode(history)
        whole_UC = self.score(state, candidates_UCD)
        lost = []
        for place in range(len(self.modalities.names)):
            item_UCE = self.fused(candidates_UCD, without=place)[0]
            lost.append(whole_UC - self._logit(self._state(history, place).user_UE[:, None], item_UCE))
        marked = replace(
            history, items_N=torch.arange(len(history.features_ND), device=history.offsets.device)
        ).oldest_first()
        behaviours, _, _ = self._behaviours(marked)
        share_UT = torch.zeros_like(behaviours.age_UT)
        assert marked.items_N is not None
        share_UT[history.real_UT()] = share_UT.new_zeros(len(marked.items_N)).scatter(
            0, marked.items_N, self._shares(behaviours, state.gate_U)[behaviours.real_UT]
        )
        return Reasons(
            names=self.modalities.names,
            candidate_weight_UCM=self.modalities(candidates_UCD).weight_XM,
            history_weight_UTM=history.pad(self.modalities(history.features_ND).weight_XM),
            behaviour_UT=share_UT,
            without_UCM=torch.stack(lost, dim=-1),
        )

    def _shares(self, behaviours: Behaviours, gate_U: Tensor) -> Tensor:
        """Each behaviour's share in the interest, oldest first, ``[U, T]``."""
        faded_UT, gate_U1 = self.evolution.faded(behaviours), gate_U[:, None]
        whole_U1 = faded_UT.sum(1, keepdim=True) + F.softplus(self.evolution.prior_amount)
        shares_UT = (1 - gate_U1) * faded_UT / whole_U1
        if not shares_UT.shape[1]:
            return shares_UT
        place_T = torch.arange(shares_UT.shape[1], device=gate_U.device)
        lengths_U1 = behaviours.real_UT.sum(1, keepdim=True)
        newest_UT = behaviours.real_UT & (place_T >= lengths_U1 - self.evolution.recent)
        return shares_UT + gate_U1 * self.evolution.newest_asks(behaviours, newest_UT).mean(1)[:, 0]

    @torch.no_grad()
    def interest_trace(self, history: HistoryBatch, concepts: Mapping[str, Tensor] | None = None) -> InterestTrace:
        """How interests moved with each behaviour.

        Args:
            concepts: for a label, the features ``[n, D]`` of items that stand for it; the interest is nearest to the
                label whose items' mean it scores highest.

        Raises:
            DataError: as ``encode``.
        """
        history.check(self.width)
        marked = replace(
            history, items_N=torch.arange(len(history.features_ND), device=history.offsets.device)
        ).oldest_first()
        assert marked.items_N is not None
        behaviours, _, _ = self._behaviours(marked)
        real_UT = behaviours.real_UT
        interest_UTE = self.evolution.trace(behaviours).user_XE * real_UT[..., None]
        drift_UT = F.pad(1 - F.cosine_similarity(interest_UTE[:, 1:], interest_UTE[:, :-1], dim=-1), (1, 0))
        drift_UT = drift_UT[:, : real_UT.shape[1]] * real_UT
        nearest_UT = torch.full_like(real_UT, -1, dtype=torch.int64)
        labels = tuple(concepts or {})
        if concepts and real_UT.shape[1]:
            concept_LE = torch.stack([self.fused(features)[0].mean(0) for features in concepts.values()])
            nearest_UT = self._logit(interest_UTE[:, :, None], concept_LE).argmax(-1).masked_fill(~real_UT, -1)
        row_UT = history.pad(marked.items_N - history.offsets[:-1][history.users_N]).masked_fill(~real_UT, -1)
        return InterestTrace(
            interest_UTE=interest_UTE, drift_UT=drift_UT, nearest_UT=nearest_UT, row_UT=row_UT, labels=labels
        )


def _distinct(history: HistoryBatch, count: int, noise: torch.Generator) -> Tensor:
    """At most ``count`` rows of a history, one an item where it is known which items they are."""
    rows_M = torch.arange(len(history.features_ND))
    if history.items_N is not None:
        items, whose_N = history.items_N.cpu().unique(return_inverse=True)
        rows_M = rows_M.new_full((len(items),), len(rows_M)).scatter_reduce(0, whose_N, rows_M, "amin")
    chosen = rows_M[torch.randperm(len(rows_M), generator=noise)[:count]]
    return chosen.to(history.features_ND.device)
