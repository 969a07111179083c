"""How an interest moves: behaviours as vectors, a short-term state by causal attention, a long-term mean that fades.

    item e, kind, value, gap ─▶ h ─┬▶ the newest behaviour asks the newest R ─▶ short s ┐
                                   └▶ mean by strength x exp(-age / tau), and a prior ─▶ long l ┴▶ u = g s + (1 - g) l

The card of arXiv 2509.04751 asks for a behaviour-driven embedding of viewing, liking and commenting that follows
interest drift; the body could not be had, so this form is ours. A behaviour's strength is
``softplus(a_kind + b_kind log(1 + value))`` times its weight. Kind and value scale an item's vector before they are
added to it, so that after averaging "liked this, saw that" can still be told from "saw this, liked that". The prior is
what a stranger's interest is; it counts as a constant amount in the long-term mean, so a history that has faded falls
back on it.

Letters: U users, T history length, R newest behaviours that are asked, N rows, E width, H heads, F width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.interest.layers import time_bucket
from couturier.components.interest.types import HistoryBatch

_TIMES, _VALUES = 24, 16
_AT_ONCE = 256  # places of a trace whose attention is computed at a time


@dataclass(frozen=True, kw_only=True)
class Behaviours:
    """Behaviours of users, each from oldest to newest: vectors, strengths, weights, ages; padded on the right."""

    vectors_UTE: Tensor
    strength_UT: Tensor
    weight_UT: Tensor
    age_UT: Tensor
    real_UT: Tensor

    def newest(self, count: int) -> Behaviours:
        """Each user's newest ``count``."""
        lengths_U = self.real_UT.sum(1)
        kept_U = lengths_U.clamp(max=count)
        place_T = torch.arange(min(count, self.real_UT.shape[1]), device=lengths_U.device)
        at = torch.arange(len(lengths_U), device=lengths_U.device)[:, None], (lengths_U - kept_U)[:, None] + place_T
        return Behaviours(**{name: value[at] for name, value in vars(self).items()})

    def part(self, places: slice) -> Behaviours:
        """Some places of everybody's."""
        return Behaviours(**{name: value[:, places] for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Interest:
    """``user_XE`` is the interest; ``gate_X`` the share of the short-term state in it."""

    user_XE: Tensor
    short_XE: Tensor
    long_XE: Tensor
    gate_X: Tensor


def value_bucket(value: Tensor) -> Tensor:
    """int64 bucket of a behaviour's value: tenths up to 1 (a watched share), octaves above; 0 for 0 and below.

    Example:
        >>> value_bucket(torch.tensor([-1.0, 0.0, 0.05, 0.95, 1.0, 3.0, 1e9])).tolist()
        [0, 0, 1, 10, 10, 12, 15]
    """
    tenths = (value.clamp(0, 1) * 10).ceil()
    octaves = torch.log2(value.clamp_min(1)).ceil()
    return (tenths + octaves).long().clamp(max=_VALUES - 1)


class Evolution(nn.Module):
    """Behaviours to interests; see the module.

    Args:
        width: E.
        heads: H, which must divide E.
        kinds: kinds of behaviour told apart; later ones share the last.
        recent: R.
        fade_days: tau at first; learned.
    """

    def __init__(self, *, width: int, heads: int, kinds: int, recent: int, fade_days: float) -> None:
        super().__init__()
        self.heads, self.kinds, self.recent = heads, kinds, recent
        self.kind, self.value = nn.Embedding(kinds, width), nn.Embedding(_VALUES, width)
        self.gap = nn.Embedding(_TIMES + 1, width)
        for table in (self.kind, self.value, self.gap):
            nn.init.normal_(table.weight, std=0.5 * width**-0.5)
        self.kind_scale, self.value_scale = nn.Embedding(kinds, width), nn.Embedding(_VALUES, width)
        for table in (self.kind_scale, self.value_scale):
            nn.init.normal_(table.weight, std=0.3)
        self.strength = nn.Embedding(kinds, 2)
        nn.init.zeros_(self.strength.weight)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.read, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.since = nn.Embedding(_TIMES, heads)
        nn.init.zeros_(self.since.weight)
        for layer in (self.read, self.out):
            nn.init.eye_(layer.weight)
        self.norm = nn.LayerNorm(width)
        nn.init.constant_(self.norm.weight, width**-0.5)  # of unit length, as items are
        self.prior_E = nn.Parameter(0.1 * torch.randn(width))
        self.prior_amount = nn.Parameter(torch.tensor(-2.0))
        self.log_fade = nn.Parameter(torch.tensor(fade_days).log())
        self.gate = nn.Linear(2 * width, 1)

    def behaviours(self, history: HistoryBatch, items_NE: Tensor) -> Behaviours:
        """``history`` from oldest to newest, and its items in the shared space."""
        kind_N = history.kinds_N.clamp(0, self.kinds - 1)
        gap_N = history.age_days_N.roll(1) - history.age_days_N
        first_N = history.offsets[:-1][history.lengths > 0]
        gap_row_N = time_bucket(gap_N, _TIMES).index_fill(0, first_N, _TIMES)
        value_N = value_bucket(history.values_N)
        scale_NE = 1 + self.kind_scale(kind_N) + self.value_scale(value_N)
        vectors_NE = items_NE * scale_NE + self.kind(kind_N) + self.value(value_N) + self.gap(gap_row_N)
        level_N, slope_N = self.strength(kind_N).unbind(-1)
        strength_N = F.softplus(level_N + slope_N * history.values_N.clamp_min(0).log1p())
        weight_N = history.weight_N.clamp_min(0)
        return Behaviours(
            vectors_UTE=history.pad(vectors_NE),
            strength_UT=history.pad(strength_N * weight_N),
            weight_UT=history.pad(weight_N),
            age_UT=history.pad(history.age_days_N),
            real_UT=history.real_UT(),
        )

    def attention(self, asking_UQE: Tensor, age_UQ: Tensor, asked: Behaviours, allowed_UQT: Tensor) -> Tensor:
        """Weights ``[U, H, Q, T]`` of behaviours for the behaviours that ask; 0 where not allowed."""
        u, q, e = asking_UQE.shape
        query_UHQF = self.query(asking_UQE).view(u, q, self.heads, -1).transpose(1, 2)
        key_UHTF = self.key(asked.vectors_UTE).view(u, -1, self.heads, e // self.heads).transpose(1, 2)
        match_UHQT = query_UHQF @ key_UHTF.transpose(2, 3) / (e // self.heads) ** 0.5
        since_UQT = time_bucket(asked.age_UT[:, None] - age_UQ[..., None], _TIMES)
        bias_UQT = asked.weight_UT.clamp_min(1e-30).log()[:, None]
        match_UHQT = match_UHQT + self.since(since_UQT).permute(0, 3, 1, 2) + bias_UQT[:, None]
        allowed_UHQT = allowed_UQT[:, None]
        return match_UHQT.masked_fill(~allowed_UHQT, -1e9).softmax(-1) * allowed_UHQT

    def short(self, weight_UHQT: Tensor, asked: Behaviours) -> Tensor:
        """What behaviours that ask find: ``[U, Q, E]``."""
        u, _, q, _ = weight_UHQT.shape
        read_UHTF = self.read(asked.vectors_UTE).view(u, asked.real_UT.shape[1], self.heads, -1).transpose(1, 2)
        found_UQE = (weight_UHQT @ read_UHTF).transpose(1, 2).reshape(u, q, -1)
        shown: Tensor = self.norm(self.out(found_UQE))
        return shown

    def long(self, faded_XE: Tensor, amount_X: Tensor) -> Tensor:
        """The long-term mean out of the faded sum of vectors and the sum of their amounts, with the prior."""
        prior = F.softplus(self.prior_amount)
        return (faded_XE + prior * self.prior_E) / (amount_X + prior)[..., None]

    def faded(self, behaviours: Behaviours) -> Tensor:
        """How much each behaviour counts in the long-term mean now, ``[U, T]``."""
        return behaviours.strength_UT * (-behaviours.age_UT.clamp_min(0) / self.log_fade.exp()).exp()

    def mixed(self, short_XE: Tensor, long_XE: Tensor, known_X: Tensor) -> Interest:
        """Short and long term by a gate; the long term alone where nothing is known."""
        gate_X = torch.sigmoid(self.gate(torch.cat([short_XE, long_XE], dim=-1)))[..., 0] * known_X
        user_XE = gate_X[..., None] * short_XE + (1 - gate_X)[..., None] * long_XE
        return Interest(user_XE=user_XE, short_XE=short_XE, long_XE=long_XE, gate_X=gate_X)

    def now(self, behaviours: Behaviours) -> Interest:
        """The interest now, ``[U, ...]``, of all behaviours; the prior where there are none."""
        faded_UT = self.faded(behaviours)
        long_UE = self.long((faded_UT[..., None] * behaviours.vectors_UTE).sum(1), faded_UT.sum(1))
        known_U = behaviours.real_UT.any(1).to(long_UE.dtype)
        if not behaviours.real_UT.shape[1]:
            return self.mixed(torch.zeros_like(long_UE), long_UE, known_U)
        asked = behaviours.newest(self.recent)
        short_UE = self.short(self.newest_asks(asked, asked.real_UT), asked)[:, 0]
        return self.mixed(short_UE, long_UE, known_U)

    def newest_asks(self, asked: Behaviours, allowed_UT: Tensor) -> Tensor:
        """The attention ``[U, H, 1, T]`` of the newest allowed behaviour to all allowed."""
        place_T = torch.arange(allowed_UT.shape[1], device=allowed_UT.device)
        last_U1 = (place_T * allowed_UT).argmax(1, keepdim=True)
        asking_U1E = asked.vectors_UTE.gather(1, last_U1[..., None].expand(-1, -1, asked.vectors_UTE.shape[-1]))
        return self.attention(asking_U1E, asked.age_UT.gather(1, last_U1), asked, allowed_UT[:, None])

    def trace(self, behaviours: Behaviours) -> Interest:
        """The interest right after each behaviour, ``[U, T, ...]``: that of the history up to it."""
        vectors_UTE, length = behaviours.vectors_UTE, behaviours.real_UT.shape[1]
        if not length:
            return self.mixed(vectors_UTE, vectors_UTE, vectors_UTE.sum(-1))
        places = torch.arange(length, device=vectors_UTE.device).split(_AT_ONCE)
        found = [vars(self.after(behaviours, place_Q)) for place_Q in places]
        return Interest(**{name: torch.cat([part[name] for part in found], dim=1) for name in found[0]})

    def after(self, behaviours: Behaviours, place_Q: Tensor) -> Interest:
        """The interest right after the behaviours in some places (rising; the same for everybody), ``[U, Q, ...]``."""
        first, end = int(place_Q[0]), int(place_Q[-1]) + 1
        seen = behaviours.part(slice(0, end))
        back_QT = place_Q[:, None] - torch.arange(end, device=place_Q.device)
        before_UQT = (back_QT >= 0) & seen.real_UT[:, None]
        near = slice(max(0, first + 1 - self.recent), end)
        allowed_UQT = before_UQT[..., near] & (back_QT[:, near] < self.recent)
        asked, age_UQ = seen.part(near), seen.age_UT[:, place_Q]
        weight_UHQT = self.attention(seen.vectors_UTE[:, place_Q], age_UQ, asked, allowed_UQT)
        since_UQT = (seen.age_UT[:, None] - age_UQ[..., None]).clamp_min(0)
        faded_UQT = seen.strength_UT[:, None] * (-since_UQT / self.log_fade.exp()).exp() * before_UQT
        long_UQE = self.long(faded_UQT @ seen.vectors_UTE, faded_UQT.sum(-1))
        return self.mixed(self.short(weight_UHQT, asked), long_UQE, seen.real_UT[:, place_Q].to(long_UQE.dtype))
