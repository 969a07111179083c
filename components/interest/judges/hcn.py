"""HCN: several interests of a person, found level by level in long and short memory, each an arrow in item space.

    behaviours x ─▶ level 1: centres C <- norm(sum s x), s = softmax(x W C) ─▶ x - what they explain ─▶ level 2 ─▶ ...
         long (all) ─┐                                                                 (residual)
         short (newest) ─┴▶ co-interest: each reads the other, gated ─▶ K interests u_k
    candidate v ─▶ item tower ─▶ score = scale max_k <u_k, v> + bias(v)

After "Hierarchical Multi-Interest Co-Network for Coarse-Grained Ranking" (arXiv 2210.10547), whose body was not
available: its abstract fixes a hierarchical extraction layer that updates interest centres step by step to make
interests less redundant, and a co-network of long and short interests. The rest is our design. A level finds its
centres by routing, whose last step alone is learned through; a behaviour then loses its part along them
(``x - sum_k s_k <x, C_k> C_k``), so the next level finds what is left. The last layer pairs centre k of both memories:
each reads the other by attention, a gate adds them. Training uses label-aware attention and a sampled softmax as MIND
(Li et al., arXiv 1904.08030), binary cross-entropy on the served score, and a penalty ``sum cos(u_k, u_l)^2`` over
pairs. Serving takes the largest inner product: the item tower knows nothing of the user, so a catalogue is one matrix
product.

A behaviour of weight w pulls w times as hard, and in each memory more or less by how long ago it was (a learned factor
for each time bucket: ours). Each centre starts at a learned vector, which stays as a small prior: an empty history has
those. An interest is the mean of what was routed to it, shrunk: short where little was, or where an earlier level had
explained it already (ours, after the capsules of MIND). ``levels=1, redundancy=0`` is single-layer dynamic routing.

Letters: U users, C candidates of a user, P taken ones among them, T history length, N rows, I items, D features,
E width, K interests, L levels, J centres of a level (K = L J), S negatives, M = 2 memories: long, short.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.interest.base import ContentJudge, JudgeConfig
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.layers import time_bucket
from couturier.components.interest.recency import positions
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.together import mean_over

_EXPLAINED = 128  # history items left out at a time
_SHARP = 5.0  # of routing and scale of the score, at the start


@dataclass(frozen=True, kw_only=True)
class HcnConfig(JudgeConfig):
    """Size of the judge ``hcn``."""

    embedding: int = 64
    """E, the width of item space."""
    levels: int = 2
    """L, how often what is left over is read again."""
    centres: int = 2
    """J, interests of a level; there are ``levels * centres`` in all."""
    iterations: int = 3
    """Routing steps of a level."""
    short: int = 10
    """How many of the newest behaviours are short-term memory; long-term memory is everything."""
    times: int = 32
    """Time buckets of the pull; a bucket spans 1.4 times the age of the one before, the last holds what is older."""
    focus: float = 4.0
    """How sharply training picks the interest nearest to what was taken; infinity is the serving rule."""
    redundancy: float = 0.05
    """Weight of the penalty on interests that point the same way."""


@dataclass(frozen=True, kw_only=True)
class HcnState:
    """The interests of each user, shorter the less there was of them."""

    interests_UKE: Tensor

    def __len__(self) -> int:
        return len(self.interests_UKE)


@dataclass(frozen=True, kw_only=True)
class Routed:
    """One level's last routing step: what each behaviour gave to each centre (share times weight), and what it was."""

    given_MUTJ: Tensor
    rest_MUTE: Tensor

    def sums(self) -> Sums:
        """What each centre was given in all."""
        return Sums(vector_MXJE=self.given_MUTJ.transpose(2, 3) @ self.rest_MUTE, mass_MXJ=self.given_MUTJ.sum(2))


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What the centres of a level were given: the weighted sum of behaviours and the sum of weights."""

    vector_MXJE: Tensor
    mass_MXJ: Tensor


class HcnJudge(ContentJudge):
    """The judge ``hcn``; see the module."""

    Config = HcnConfig
    name = "hcn"

    def __init__(self, config: HcnConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        wide, levels, centres = config.embedding, config.levels, config.centres
        self.item = nn.Linear(self.width, wide)
        self.worth = nn.Linear(self.width, 1)
        self.starts = nn.Parameter(torch.randn(levels, centres, wide))
        self.routing = nn.Parameter(_SHARP * torch.eye(wide).repeat(levels, 1, 1))
        self.pull = nn.Embedding(config.times, 2)
        nn.init.zeros_(self.pull.weight)
        self.prior = nn.Parameter(torch.tensor(0.1).log())
        self.gate = nn.Linear(2 * wide, 1)
        self.scale = nn.Parameter(torch.tensor(_SHARP).log())

    def item_tower(self, features_XD: Tensor) -> Tensor:
        """Items as unit vectors of the space the interests live in, whoever looks: ``[..., E]``."""
        return F.normalize(self.item(features_XD), dim=-1)

    def interests(self, history: HistoryBatch) -> Tensor:
        """``[U, K, E]``, a level after the other; at most one long, and short where little was routed."""
        return self._co_interest([level.sums() for level in self._route(history)])

    def _encode(self, history: HistoryBatch) -> HcnState:
        return HcnState(interests_UKE=self.interests(history))

    def _score(self, state: HcnState, candidates_UCD: Tensor) -> Tensor:
        match_UCK = self.item_tower(candidates_UCD) @ state.interests_UKE.transpose(1, 2)
        return self.scale.exp() * match_UCK.amax(-1) + self.worth(candidates_UCD)[..., 0]

    def score_all(self, state: HcnState, items_ID: Tensor) -> Tensor:
        """Logits ``[U, I]``: one product with the catalogue, the best interest of each."""
        match_UKI = state.interests_UKE @ self.item_tower(items_ID).T
        return self.scale.exp() * match_UKI.amax(1) + self.worth(items_ID)[:, 0]

    def loss(self, batch: TrainBatch, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Sampled softmax with label-aware attention, the served score's binary cross-entropy, redundancy.

        Negatives are the batch's pool with its logQ correction; without a pool a user's own, and what others took.
        """
        interests_UKE = self.interests(batch.history)
        state, taken = HcnState(interests_UKE=interests_UKE), batch.positives
        served_UC = self._score(state, batch.candidates_UCD)
        target_UPE = self.item_tower(batch.candidates_UCD[:, :taken])
        aware_UPE = label_aware(interests_UKE, target_UPE, self.config.focus * self.scale.exp())
        good_UP = (
            self.scale.exp() * (aware_UPE * target_UPE).sum(-1) + self.worth(batch.candidates_UCD[:, :taken])[..., 0]
        )
        bad_UPS = self._negatives(batch, aware_UPE)
        sampled = (torch.cat([good_UP[..., None], bad_UPS], dim=-1).logsumexp(-1) - good_UP).mean()
        real_UC = batch.real_UC
        level = F.softplus(-served_UC[:, :taken]).mean()
        bad = F.softplus(served_UC[:, taken:]) * real_UC[:, taken:]
        level = level + mean_over(bad.sum(), real_UC[:, taken:].sum())
        redundant = redundancy(interests_UKE)
        loss = sampled + self.config.bce * level + self.config.redundancy * redundant
        return loss, {"softmax": sampled.detach(), "bce": level.detach(), "redundancy": redundant.detach()}

    def _negatives(self, batch: TrainBatch, aware_UPE: Tensor) -> Tensor:
        """Logits ``[U, P, S]`` of what was not taken, for each taken item's view of the user; minus infinity: none."""
        taken = batch.positives
        if batch.pool_S is not None and batch.pool_log_q_S is not None:
            shared_SD, shared_S = self.embed_items()[batch.pool_S], batch.pool_S
            correction_S = batch.pool_log_q_S
            own_UPN = aware_UPE.new_zeros(*aware_UPE.shape[:2], 0)
        else:
            shared_SD, shared_S = batch.candidates_UCD[:, :taken].flatten(0, 1), batch.items_UC[:, :taken].flatten()
            correction_S = aware_UPE.new_zeros(len(shared_S))
            bad_UND = batch.candidates_UCD[:, taken:]
            own_UPN = self.scale.exp() * aware_UPE @ self.item_tower(bad_UND).transpose(1, 2)
            own_UPN = own_UPN + self.worth(bad_UND)[..., 0][:, None]
            own_UPN = own_UPN.masked_fill(~batch.real_UC[:, None, taken:], -torch.inf)
        shared_UPS = self.scale.exp() * aware_UPE @ self.item_tower(shared_SD).T + self.worth(shared_SD)[:, 0]
        theirs_US = (batch.items_UC[:, :taken, None] == shared_S).any(1)
        shared_UPS = (shared_UPS - correction_S).masked_fill(theirs_US[:, None], -torch.inf)
        return torch.cat([own_UPN, shared_UPS], dim=-1)

    def _route(self, history: HistoryBatch) -> list[Routed]:
        """The levels of both memories."""
        fading_NM = (_SHARP * self.pull(time_bucket(history.age_days_N, self.config.times))).clamp(max=_SHARP).exp()
        pull_NM = fading_NM * history.weight_N.clamp_min(0)[:, None]
        newest_N = positions(history) <= self.config.short
        pull_NM = torch.stack([pull_NM[:, 0], pull_NM[:, 1] * newest_N], dim=-1)
        weight_MUT1 = history.pad(pull_NM).movedim(-1, 0)[..., None]
        rest_MUTE = history.pad(self.item_tower(history.features_ND)).repeat(2, 1, 1, 1)
        levels: list[Routed] = []
        for level in range(self.config.levels):
            centre_MUJE = self._centre(level, rest_MUTE.new_zeros(*rest_MUTE.shape[:2], *self.starts.shape[1:]))
            with torch.no_grad():
                for _ in range(self.config.iterations - 1):
                    given_MUTJ = self._shares(level, rest_MUTE, centre_MUJE) * weight_MUT1
                    centre_MUJE = self._centre(level, given_MUTJ.transpose(2, 3) @ rest_MUTE)
            share_MUTJ = self._shares(level, rest_MUTE, centre_MUJE)
            given_MUTJ = share_MUTJ * weight_MUT1
            levels.append(Routed(given_MUTJ=given_MUTJ, rest_MUTE=rest_MUTE))
            if level + 1 < self.config.levels:
                centre_MUJE = self._centre(level, given_MUTJ.transpose(2, 3) @ rest_MUTE)
                rest_MUTE = rest_MUTE - (share_MUTJ * (rest_MUTE @ centre_MUJE.transpose(2, 3))) @ centre_MUJE
        return levels

    def _shares(self, level: int, rest_MUTE: Tensor, centre_MUJE: Tensor) -> Tensor:
        """``softmax over centres of x W C``, ``[M, U, T, J]``."""
        aimed_MUJE = centre_MUJE @ self.routing[level].T
        shares_MUTJ: Tensor = (rest_MUTE @ aimed_MUJE.transpose(2, 3)).softmax(-1)
        return shares_MUTJ

    def _centre(self, level: int, sum_XJE: Tensor) -> Tensor:
        """Centres of a level, of unit length, from the sums of what was routed to them; any leading axes."""
        return F.normalize(self._pulled(level, sum_XJE), dim=-1)

    def _pulled(self, level: int, sum_XJE: Tensor) -> Tensor:
        return sum_XJE + self.prior.exp() * F.normalize(self.starts[level], dim=-1)

    def _co_interest(self, sums: list[Sums]) -> Tensor:
        """Interests ``[..., K, E]`` from what each level was given.

        A centre's interest is the mean of what it was given, with the prior and one behaviour's weight of nothing.
        Level by level, each memory's interests read the other's that point the same way, and a gate adds the two.
        """
        interests = []
        for level, each in enumerate(sums):
            mean_MXJE = self._pulled(level, each.vector_MXJE) / (each.mass_MXJ + 1)[..., None]
            long_XJE, short_XJE = mean_MXJE
            one_XJE, other_XJE = F.normalize(mean_MXJE, dim=-1)
            match_XJJ = one_XJE @ other_XJE.transpose(-1, -2) * self.scale.exp()
            long_read_XJE = long_XJE + match_XJJ.softmax(-1) @ short_XJE
            short_read_XJE = short_XJE + match_XJJ.transpose(-1, -2).softmax(-1) @ long_XJE
            gate_XJ1 = self.gate(torch.cat([long_XJE, short_XJE], dim=-1)).sigmoid()
            interests.append(0.5 * (gate_XJ1 * long_read_XJE + (1 - gate_XJ1) * short_read_XJE))
        return torch.cat(interests, dim=-2)

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        What an item gave to each centre is taken away, and the interests follow; the other items keep their shares, so
        the cost grows with T and not with its square.
        """
        whole_UC = self.score(self.encode(history), candidates_UCD)
        levels, real_UT = self._route(history), history.real_UT()
        target_U1EC = self.item_tower(candidates_UCD).transpose(1, 2)[:, None]
        worth_U1C = self.worth(candidates_UCD)[..., 0][:, None]
        out_UCT = whole_UC.new_zeros(*whole_UC.shape, real_UT.shape[1])
        for start in range(0, real_UT.shape[1] if whole_UC.numel() else 0, _EXPLAINED):
            part = slice(start, start + _EXPLAINED)
            match_UTKC = self._co_interest([_without(level, part) for level in levels]) @ target_U1EC
            without_UTC = self.scale.exp() * match_UTKC.amax(2) + worth_U1C
            out_UCT[..., part] = whole_UC[..., None] - without_UTC.transpose(1, 2)
        return out_UCT.masked_fill(~real_UT[:, None], 0.0)


def _without(level: Routed, part: slice) -> Sums:
    """What the centres of a level were given without each of some behaviours: X is then (U, t)."""
    whole = level.sums()
    own_MUTJ = level.given_MUTJ[:, :, part]
    return Sums(
        vector_MXJE=whole.vector_MXJE[:, :, None] - own_MUTJ[..., None] * level.rest_MUTE[:, :, part, None],
        mass_MXJ=whole.mass_MXJ[:, :, None] - own_MUTJ,
    )


def label_aware(interests_UKE: Tensor, target_UPE: Tensor, focus: Tensor | float) -> Tensor:
    """The user as seen from what was taken: interests weighted by ``softmax(focus <u_k, v>)``, ``[U, P, E]``.

    Li et al., "MIND" (arXiv 1904.08030). A great focus picks the nearest interest, as serving does.

    Example:
        >>> label_aware(torch.eye(2)[None], torch.tensor([[[0.2, 0.1]]]), 1e6)
        tensor([[[1., 0.]]])
    """
    weight_UPK = (focus * target_UPE @ interests_UKE.transpose(1, 2)).softmax(-1)
    return weight_UPK @ interests_UKE


def redundancy(interests_UKE: Tensor) -> Tensor:
    """Mean over users of ``sum over pairs k != l of cos(u_k, u_l)^2``.

    Example:
        >>> redundancy(torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]]))
        tensor(2.)
    """
    direction_UKE = F.normalize(interests_UKE, dim=-1)
    cosine_UKK = direction_UKE @ direction_UKE.transpose(1, 2)
    return (cosine_UKK.square().sum((1, 2)) - cosine_UKK.diagonal(dim1=1, dim2=2).square().sum(1)).mean()
