"""DMF: how alike two contents are enters attention as side information, at a price that no projection depends on.

    candidate, behaviour ─▶ content cosine ─┬▶ bucket ─▶ beside the behaviour in keys and values ─▶ attention ─▶ r_id ┐
                                            └▶ SimTier histogram ───────────────────────────────▶ network ────▶ r_sim ┤
                                                        r = alpha r_id + (1 - alpha) r_sim ─▶ network ─▶ logit ◀──────┘

DMF (arXiv 2510.11066). Early fusion would project ``[behaviour; likeness embedding]`` for every pair of a candidate and
a behaviour. The behaviour's half does not depend on the candidate, and likeness has only 35 buckets, so both are
projected once: ``k_j = W_k x_j + P_k[b_j]`` and ``v_j = W_v x_j + P_v[b_j]`` with ``P = W_b E`` of 35 rows. Here the
pair's key and value are never made at all: ``q.k_j`` is ``q.W_k x_j`` plus entry ``b_j`` of ``q P_k^T``, and the pooled
``P_v`` is the attention's mass by bucket times the table. ``test_dmf`` holds it to the plain form within 1e-6.

The abstract and a third-party implementation were read, not the paper's body. Ours: features are projected where the
paper looks an id up; the content vector is the picture part around its mean; a behaviour counts ``Amount`` times; the
last network also sees the candidate and its product with ``r``; a flag tells an empty history.

Letters: U users, C candidates of a user, T history length, P picture width, E width, K buckets, B tiers, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge, JudgeConfig
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.layers import mlp
from couturier.components.interest.tiers import Amount, Looks, SimTier, attention_weights, bucket, tier_sums
from couturier.components.interest.types import HistoryBatch

_MOST = 1 << 22  # numbers a chunk may hold


@dataclass(frozen=True, kw_only=True)
class DmfConfig(JudgeConfig):
    """Sizes of DMF."""

    width: int = 32
    """E, the width of queries, keys and values."""
    buckets: int = 35
    """K, parts of -1..1 whose likeness has an embedding."""
    likeness_width: int = 16
    """Width of that embedding."""
    tiers: int = 10
    """B, parts of -1..1 that SimTier counts in."""
    alpha: float = 0.5
    """Share of the attention path; the rest is the SimTier path's."""
    hidden: int = 64
    """Width of the hidden layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha > 1:
            raise ConfigError(f"DmfConfig.alpha is {self.alpha}; it must be between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class DmfState:
    """What the judge keeps of its users: nothing of it depends on a candidate."""

    keys_UTE: Tensor
    values_UTE: Tensor
    looks_UTP: Tensor
    amount_UT: Tensor
    empty_U: Tensor

    def __len__(self) -> int:
        return len(self.empty_U)


class DmfJudge(ContentJudge):
    """The judge ``dmf``; see the module."""

    Config = DmfConfig
    name = "dmf"

    def __init__(self, config: DmfConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        e = config.width
        self.looks, self.amount = Looks(content), Amount()
        self.query, self.key, self.value = (nn.Linear(self.width, e) for _ in range(3))
        self.likeness = nn.Embedding(config.buckets, config.likeness_width)
        self.key_of, self.value_of = (nn.Linear(config.likeness_width, e, bias=False) for _ in range(2))
        self.tiers = SimTier(config.tiers)
        self.enriched = mlp([e, config.hidden, e], lambda width: nn.GELU())
        self.centric = mlp([config.tiers, config.hidden, e], lambda width: nn.GELU())
        self.head = mlp([3 * e + 1, config.hidden, 1], lambda width: nn.GELU())

    def _encode(self, history: HistoryBatch) -> DmfState:
        features_ND = history.features_ND
        return DmfState(
            keys_UTE=history.pad(self.key(features_ND)),
            values_UTE=history.pad(self.value(features_ND)),
            looks_UTP=history.pad(self.looks(features_ND)),
            amount_UT=history.pad(self.amount(history)),
            empty_U=(history.lengths == 0).float(),
        )

    def _score(self, state: DmfState, candidates_UCD: Tensor) -> Tensor:
        return self._match(state, self.query(candidates_UCD), self.looks(candidates_UCD))

    def score_all(self, state: DmfState, items_ID: Tensor) -> Tensor:
        """Logits ``[U, I]``; an item is projected once for all users, and some users are scored at a time."""
        query_IE, looks_IP = self.query(items_ID), self.looks(items_ID)
        step = max(1, _MOST // (max(1, len(state)) * (4 * self.config.hidden + state.amount_UT.shape[1])))
        parts = [
            self._match(state, query.expand(len(state), -1, -1), looks.expand(len(state), -1, -1))
            for query, looks in zip(query_IE.split(step), looks_IP.split(step), strict=True)
        ]
        return torch.cat(parts, dim=1) if parts else items_ID.new_zeros(len(state), 0)

    def _match(self, state: DmfState, query_UCE: Tensor, looks_UCP: Tensor) -> Tensor:
        cosine_UCT = looks_UCP @ state.looks_UTP.transpose(1, 2)
        amount_U1T = state.amount_UT[:, None]
        _, _, pooled_UCE = self.attention(state, query_UCE, bucket(cosine_UCT, self.config.buckets))
        tiers_UCB = self.tiers(tier_sums(bucket(cosine_UCT, self.config.tiers), amount_U1T, self.config.tiers))
        empty_UC1 = state.empty_U[:, None, None].expand(*query_UCE.shape[:2], 1)
        return self._logit(pooled_UCE, tiers_UCB, query_UCE, empty_UC1)

    def attention(self, state: DmfState, query_UCE: Tensor, bucket_UCT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decoupled target-aware attention: weights ``[U, C, T]``, the projected values of the buckets ``[K, E]``,
        and what was pooled ``[U, C, E]``."""
        keys_KE, values_KE = self.key_of(self.likeness.weight), self.value_of(self.likeness.weight)
        by_bucket_UCK = query_UCE @ keys_KE.T
        dot_UCT = query_UCE @ state.keys_UTE.transpose(1, 2) + by_bucket_UCK.gather(-1, bucket_UCT)
        weight_UCT = attention_weights(dot_UCT / self.config.width**0.5, state.amount_UT[:, None])
        mass_UCK = tier_sums(bucket_UCT, weight_UCT, self.config.buckets)
        return weight_UCT, values_KE, weight_UCT @ state.values_UTE + mass_UCK @ values_KE

    def _logit(self, pooled_XE: Tensor, tiers_XB: Tensor, query_XE: Tensor, empty_X1: Tensor) -> Tensor:
        """Both paths, mixed, beside the candidate; any leading axes."""
        alpha = self.config.alpha
        interest_XE = alpha * self.enriched(pooled_XE) + (1 - alpha) * self.centric(tiers_XB)
        seen_XE = torch.cat([interest_XE, query_XE, interest_XE * query_XE, empty_X1], dim=-1)
        found: Tensor = self.head(seen_XE)[..., 0]
        return found

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        Leaving an item out takes one term out of the pooled sum, whose other shares grow to one again, and its amount
        out of one tier, so the cost grows with T and not with its square.
        """
        state = self.encode(history)
        whole_UC = self.score(state, candidates_UCD)
        out_UCT = whole_UC.new_zeros(*whole_UC.shape, state.amount_UT.shape[1])
        if not out_UCT.numel():
            return out_UCT
        query_UCE = self.query(candidates_UCD)
        cosine_UCT = self.looks(candidates_UCD) @ state.looks_UTP.transpose(1, 2)
        bucket_UCT, tier_UCT = bucket(cosine_UCT, self.config.buckets), bucket(cosine_UCT, self.config.tiers)
        weight_UCT, values_KE, pooled_UCE = self.attention(state, query_UCE, bucket_UCT)
        sums_UCB = tier_sums(tier_UCT, state.amount_UT[:, None], self.config.tiers)
        alone_U = history.lengths == 1
        # What is left beside an item that is nearly everything is summed, not subtracted: no other can hold over half.
        top_UC1 = weight_UCT.argmax(-1, keepdim=True)
        others_UCT = weight_UCT.scatter(-1, top_UC1, 0.0)
        others_UCT = others_UCT / others_UCT.sum(-1, keepdim=True).clamp_min(1e-30)
        others_UCE = others_UCT @ state.values_UTE
        others_UCE = others_UCE + tier_sums(bucket_UCT, others_UCT, self.config.buckets) @ values_KE
        at_T = torch.arange(out_UCT.shape[-1], device=out_UCT.device)
        step = max(1, _MOST // (whole_UC.numel() * 4 * self.config.hidden))
        for start in range(0, out_UCT.shape[-1], step):
            part = slice(start, start + step)
            own_UCT1 = weight_UCT[..., part, None]
            values_UCTE = state.values_UTE[:, None, part] + values_KE[bucket_UCT[..., part]]
            rest_UCTE = (pooled_UCE[:, :, None] - own_UCT1 * values_UCTE) / (1 - own_UCT1).clamp_min(0.5)
            rest_UCTE = torch.where((at_T[part] == top_UC1)[..., None], others_UCE[:, :, None], rest_UCTE)
            taken_UCTB = nn.functional.one_hot(tier_UCT[..., part], self.config.tiers)
            left_UCTB = sums_UCB[:, :, None] - taken_UCTB * state.amount_UT[:, None, part, None]
            tiers_UCTB = self.tiers(left_UCTB.clamp_min(0))
            empty_UCT1 = alone_U[:, None, None, None].expand(own_UCT1.shape).float()
            query_UCTE = query_UCE[:, :, None].expand_as(rest_UCTE)
            without_UCT = self._logit(rest_UCTE, tiers_UCTB, query_UCTE, empty_UCT1)
            out_UCT[..., part] = whole_UC[..., None] - without_UCT
        return out_UCT * history.real_UT()[:, None]
