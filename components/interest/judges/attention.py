"""A judge with target attention: what of a history counts depends on the candidate, on when and on how much.

    history item ─▶ keys, values ┐                       ┌ pooled value x candidate (temporal interest network) ┐
    age, weight  ─▶ gates ───────┼▶ attention by candidate┤                                                      ├▶logit
    candidate    ─▶ query, value ┘                       └ likeness: is it there already, how often, how lately ┘

The pooling is target-aware twice, in the attention and in the value (Zhou et al. 2024, "Temporal Interest Network");
the likeness features make repeats plain to see, which attention alone learns slowly: by pictures and, where items have
identities, by those too, so that what was taken often is told from what only looks like it. A learned row stands at
the head of every history, so that an empty one has an answer.

Letters: U users, C candidates of a user, T history length, N rows, I items, P picture width, W word width,
D features as in ``items``, H heads, E width of a head, B likeness kernels, one more with identities, I identity width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.interest.base import ContentJudge, JudgeConfig
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.types import HistoryBatch

_SHARPNESS = (3.0, 10.0, 30.0)  # of the likeness kernels at the start; learned
_SAME = 20.0  # sharpness of the identity's kernel: two random rows of a table point far apart
_TIMES = 6
_EXPLAINED = 128  # history items left out at a time


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(JudgeConfig):
    """Size of the attention judge."""

    heads: int = 4
    head_width: int = 16
    """E, the width of a head."""
    hidden: int = 64
    """Width of the last layer but one."""


@dataclass(frozen=True, kw_only=True)
class AttentionState:
    """What the judge keeps of its users; every tensor has the user first. Row 0 of ``keys`` is the learned row."""

    keys_UTHE: Tensor
    values_UTHE: Tensor
    bias_UTH: Tensor
    look_UTP: Tensor
    who_UTI: Tensor
    """Identities of unit length, of width 0 where there are none."""
    gates_UTB: Tensor
    real_UT: Tensor

    def __len__(self) -> int:
        return len(self.real_UT)


class AttentionJudge(ContentJudge):
    """The judge ``attention``; see the module."""

    Config = AttentionConfig
    name = "attention"

    def __init__(self, config: AttentionConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config, self.kernels = config, len(_SHARPNESS) + (features.ids > 0)
        p, inner = self.items.picture_width, config.heads * config.head_width
        self.query, self.key = nn.Linear(self.width, inner), nn.Linear(self.width, inner)
        self.value, self.taste = nn.Linear(self.width, inner), nn.Linear(self.width, inner)
        self.times = nn.Sequential(nn.Linear(_TIMES, 16), nn.GELU(), nn.Linear(16, config.heads + self.kernels))
        self.look = nn.Linear(p, p)
        self.sharpness = nn.Parameter(torch.tensor(_SHARPNESS).log())
        self.nothing = nn.Parameter(torch.zeros(2, inner))
        likeness = 2 * self.kernels + 1
        self.head = nn.Sequential(
            nn.Linear(inner + likeness + 2, config.hidden), nn.GELU(), nn.Linear(config.hidden, 1)
        )
        self.shortcut = nn.Linear(likeness, 1)
        pictures_IP = content.pictures_IP
        with torch.no_grad():
            self.look.weight.copy_(torch.eye(p))
            self.look.bias.copy_(-pictures_IP.mean(0) if len(pictures_IP) else torch.zeros(p))
            nn.init.normal_(self.nothing, std=0.1)

    def _encode(self, history: HistoryBatch) -> AttentionState:
        return self.encode_padded(*history.padded())

    def encode_padded(self, features_UTD: Tensor, age_UT: Tensor, weight_UT: Tensor, real_UT: Tensor) -> AttentionState:
        """As ``encode``, of histories already padded; rows where ``real_UT`` is False count for nothing."""
        h, e, b = self.config.heads, self.config.head_width, self.kernels
        u, t, _ = features_UTD.shape
        real = real_UT[..., None]
        timed_UTX = self.times(_times(age_UT, weight_UT))
        first = self.nothing.view(2, 1, 1, h, e).expand(2, u, 1, h, e)
        return AttentionState(
            keys_UTHE=torch.cat([first[0], self.key(features_UTD).view(u, t, h, e)], dim=1),
            values_UTHE=torch.cat([first[1], self.value(features_UTD).view(u, t, h, e)], dim=1),
            bias_UTH=F.pad(timed_UTX[..., :h].masked_fill(~real, -torch.inf), (0, 0, 1, 0)),
            look_UTP=self._look(features_UTD),
            who_UTI=self._who(features_UTD),
            gates_UTB=F.softplus(timed_UTX[..., h : h + b]) * real,
            real_UT=real_UT,
        )

    def _score(self, state: AttentionState, candidates_UCD: Tensor) -> Tensor:
        weight_UHCT = self._attention(state, candidates_UCD)
        pooled_UCHE = torch.einsum("uhct,uthe->uche", weight_UHCT, state.values_UTHE)
        length_U = state.real_UT.sum(1).float()
        length_UC = length_U[:, None].expand(candidates_UCD.shape[:2])
        taste_UCX = self.taste(candidates_UCD)
        return self._logit(pooled_UCHE.flatten(2), taste_UCX, self._likeness(state, candidates_UCD), length_UC)

    def _attention(self, state: AttentionState, candidates_UCD: Tensor) -> Tensor:
        """Weights ``[U, H, C, 1 + T]``; the first is the learned row's."""
        u, c, _ = candidates_UCD.shape
        h, e = self.config.heads, self.config.head_width
        query_UCHE = self.query(candidates_UCD).view(u, c, h, e)
        match_UHCT = torch.einsum("uche,uthe->uhct", query_UCHE, state.keys_UTHE) / e**0.5
        weight_UHCT: Tensor = (match_UHCT + state.bias_UTH.permute(0, 2, 1)[:, :, None]).softmax(-1)
        return weight_UHCT

    def _logit(self, pooled_X: Tensor, taste_X: Tensor, likeness_L: Tensor, length: Tensor) -> Tensor:
        """From what attention found, the candidate, what is like it, and how long the history is; any leading axes."""
        known_2 = torch.stack([length.log1p() / 4, (length == 0).float()], dim=-1)
        hidden = torch.cat([pooled_X * taste_X, likeness_L, known_2], dim=-1)
        found: Tensor = self.head(hidden) + self.shortcut(likeness_L)
        return found[..., 0]

    def _look(self, features_ND: Tensor) -> Tensor:
        """The picture part in the space where likeness is a cosine, of unit length."""
        return F.normalize(self.look(features_ND[..., : self.items.picture_width]), dim=-1)

    def _who(self, features_XD: Tensor) -> Tensor:
        """The identity part, of unit length; zeros for what has none."""
        ids = self.items.config.ids
        if not ids:
            return features_XD[..., :0]
        return F.normalize(features_XD[..., -ids - 1 : -1], dim=-1)

    def _cosine(self, state: AttentionState, candidates_UCD: Tensor) -> Tensor:
        """``[U, C, T]``, 0 where padded or pointing away, so that padding is never the closest."""
        cosine_UCT = self._look(candidates_UCD) @ state.look_UTP.transpose(1, 2)
        return cosine_UCT.clamp_min(0) * state.real_UT[:, None]

    def _gated(self, state: AttentionState, cosine_UCT: Tensor, candidates_UCD: Tensor) -> list[Tensor]:
        """``exp(b (cos - 1))`` times the gate of each history item, ``[U, C, T]`` a kernel."""
        found = [sharpness * (cosine_UCT - 1) for sharpness in self.sharpness.exp()]
        if self.items.config.ids:
            found.append(_SAME * (self._who(candidates_UCD) @ state.who_UTI.mT - 1))
        return [one.exp() * state.gates_UTB[:, None, :, index] for index, one in enumerate(found)]

    def _likeness(self, state: AttentionState, candidates_UCD: Tensor) -> Tensor:
        """Closest cosine, and per kernel the gated sum over the history and its closest gated item.

        ``[U, C, 2 B + 1]``; all 0 for an empty history.
        """
        u, c, _ = candidates_UCD.shape
        if state.real_UT.shape[1] == 0:
            return candidates_UCD.new_zeros(u, c, 2 * self.kernels + 1)
        cosine_UCT = self._cosine(state, candidates_UCD)
        found = [cosine_UCT.amax(-1)]
        for gated_UCT in self._gated(state, cosine_UCT, candidates_UCD):
            found += [gated_UCT.sum(-1).log1p(), gated_UCT.amax(-1)]
        return torch.stack(found, dim=-1)

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        A difference, not a gradient, because a sharp likeness has no useful slope. Leaving an item out takes one term
        out of each sum and lets each maximum fall to the next, so the cost grows with T and not with its square. The
        other items keep their shares of the history's weight.
        """
        state = self.encode(history)
        whole_UC = self.score(state, candidates_UCD)
        weight_UHCT = self._attention(state, candidates_UCD)
        pooled_UCHE = torch.einsum("uhct,uthe->uche", weight_UHCT, state.values_UTHE)
        cosine_UCT = self._cosine(state, candidates_UCD)
        gated = self._gated(state, cosine_UCT, candidates_UCD)
        likeness = [_largest_without(cosine_UCT)] if cosine_UCT.shape[-1] else []
        for gated_UCT in gated if likeness else []:
            rest_UCT = (gated_UCT.sum(-1, keepdim=True) - gated_UCT).clamp_min(0)
            likeness += [rest_UCT.log1p(), _largest_without(gated_UCT)]
        taste_UC1X = self.taste(candidates_UCD)[:, :, None]
        length_U = (state.real_UT.sum(1).float() - 1).clamp_min(0)
        parts = []
        for start in range(0, cosine_UCT.shape[-1], _EXPLAINED):
            part = slice(start, start + _EXPLAINED)
            own_UCTH = weight_UHCT[..., 1:][..., part].permute(0, 2, 3, 1)[..., None]
            values_U1THE = state.values_UTHE[:, 1:][:, part][:, None]
            others_UCTHE = (pooled_UCHE[:, :, None] - own_UCTH * values_U1THE) / (1 - own_UCTH).clamp_min(1e-6)
            likeness_UCTL = torch.stack([value[..., part] for value in likeness], dim=-1)
            length_UCT = length_U[:, None, None].expand(likeness_UCTL.shape[:3])
            parts.append(self._logit(others_UCTHE.flatten(3), taste_UC1X, likeness_UCTL, length_UCT))
        if not parts:
            return whole_UC.new_zeros(*whole_UC.shape, 0)
        return (whole_UC[..., None] - torch.cat(parts, dim=-1)).masked_fill(~state.real_UT[:, None], 0.0)


def _largest_without(values_UCT: Tensor) -> Tensor:
    """For each place of the last axis the largest of the others; 0 where there is no other. Values are not negative."""
    top = F.pad(values_UCT, (0, 1)).topk(2, dim=-1)
    at_UCT = torch.arange(values_UCT.shape[-1], device=values_UCT.device)
    return torch.where(at_UCT == top.indices[..., :1], top.values[..., 1:], top.values[..., :1])


def _times(age_days_UT: Tensor, weight_UT: Tensor) -> Tensor:
    """Age and weight on scales from a day to a season, and the share of the history's weight: ``[U, T, 6]``."""
    age, weight = age_days_UT.clamp_min(0), weight_UT.clamp_min(0)
    share = weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)
    scales = [age.log1p() / 4, (-age / 7).exp(), (-age / 30).exp(), (-age / 90).exp(), weight.log1p(), share]
    return torch.stack(scales, dim=-1)
