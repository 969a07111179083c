"""Temporal interest network: what a behaviour means depends on the candidate and on how long before it it happened.

    behaviour ─▶ v_t + p(t) = v~_t ─┬▶ softmax(<v~_t, v~_q> / sqrt E) = a ─▶ sum a v~_t ─────────┐
                                    │                           (TAA)      sum a v~_t * v~_q ────┼▶ MLP ─▶ logit
    candidate ─▶ v_q + p(0) = v~_q ─┴──────────────────────────────────────────────── (TAR) v~_q ┘
                       (TTE)

Zhou et al., "Temporal Interest Network for User Response Prediction" (WWW 2024, arXiv 2308.08487): a target-relative
time embedding (TTE), target-aware attention (TAA) and a target-aware representation (TAR), each of which a setting
takes out. Attention pools ``v~_t * v~_q``, as in the paper; because that product factors out of the sum, it is computed
as ``v~_q * sum a v~_t``. The network reads it beside the plain sum and the candidate, as in the released code (the
product alone, as the paper has it, fitted worse). Position 1 is the newest behaviour, as in the released code.

Ours: one linear map of an item's content stands where the paper has tables of ids and categories; an activation other
than the sigmoid, whose gradient is small for the few hundred steps of a fit; no batch normalisation before the network,
so that a score does not depend on who else is in a batch. A behaviour of weight w counts as w behaviours at one place
(``log w`` is added to its score). An empty history pools to zero: what is left is what the candidate itself is worth.

Letters: U users, C candidates of a user, T history length, N rows, D features, E width, P positions, A categories.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.interest.base import ContentJudge, JudgeConfig
from couturier.components.interest.correlation import learned_correlation
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.layers import mlp
from couturier.components.interest.left_out import each_left_out
from couturier.components.interest.recency import Time, check_time, time_index
from couturier.components.interest.types import HistoryBatch
from couturier.kernels.target_attention import dot_attention

_LEAST_WEIGHT = 1e-6


@dataclass(frozen=True, kw_only=True)
class TinConfig(JudgeConfig):
    """Size of the judge ``tin``, and which of its three parts are there."""

    embedding: int = 64
    """E, the width of a behaviour (the paper's 128: 64 for the item, 64 for its category)."""
    time: Time = "position"
    """What the time embedding knows: the ``position`` from the newest on, or the time ``interval`` to now."""
    times: int = 64
    """Rows of its table, row 0 being the candidate's; what is older shares the last (431 in the released code)."""
    hidden: int = 80
    """Width of the first hidden layer; the second has half of it (80 and 40 in the released code)."""
    use_time: bool = True
    """TTE: whether there is a time embedding."""
    use_attention: bool = True
    """TAA: whether attention depends on the candidate; if not, the plain weighted mean."""
    use_product: bool = True
    """TAR: whether the product with the candidate is pooled too; if not, the behaviour alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_time("judge.tin.time", self.time)


@dataclass(frozen=True, kw_only=True)
class TinState:
    """Behaviours with their times, jagged: user ``u`` owns rows ``offsets[u]`` to ``offsets[u + 1]``."""

    keys_NE: Tensor
    log_weight_N: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return self.offsets.numel() - 1


class TinJudge(ContentJudge):
    """The judge ``tin``; see the module."""

    Config = TinConfig
    name = "tin"

    def __init__(self, config: TinConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        self.embedding = nn.Linear(self.width, config.embedding)
        read = (3 if config.use_product else 2) * config.embedding
        self.head = mlp([read, config.hidden, max(1, config.hidden // 2), 1], lambda width: nn.PReLU(init=0.1))
        if config.use_time:
            self.times = nn.Embedding(config.times, config.embedding)
            nn.init.normal_(self.times.weight, std=0.1)

    def _encode(self, history: HistoryBatch) -> TinState:
        keys_NE = self.embedding(history.features_ND)
        if self.config.use_time:
            keys_NE = keys_NE + self.times(time_index(history, self.config.time, self.config.times))
        return TinState(
            keys_NE=keys_NE, log_weight_N=history.weight_N.clamp_min(_LEAST_WEIGHT).log(), offsets=history.offsets
        )

    def _score(self, state: TinState, candidates_UCD: Tensor) -> Tensor:
        query_UCE = self._query(candidates_UCD)
        if self.config.use_attention:
            pooled_UCE = dot_attention(query_UCE, state.keys_NE, state.offsets, behaviour_bias=state.log_weight_N)
        else:
            nobody_U1E = query_UCE.new_zeros(len(state), 1, query_UCE.shape[2])
            bias_N = state.log_weight_N
            pooled_UCE = dot_attention(nobody_U1E, state.keys_NE, state.offsets, behaviour_bias=bias_N)
            pooled_UCE = pooled_UCE.expand_as(query_UCE)
        return self._logit(pooled_UCE, query_UCE)

    def _query(self, candidates_UCD: Tensor) -> Tensor:
        """``v~_q``."""
        bias_E = self.embedding.bias + self.times.weight[0] if self.config.use_time else self.embedding.bias
        return F.linear(candidates_UCD, self.embedding.weight, bias_E)

    def _logit(self, pooled_XE: Tensor, query_XE: Tensor) -> Tensor:
        """From the attended behaviours and the candidate; any leading axes."""
        parts = [pooled_XE, query_XE, *([pooled_XE * query_XE] if self.config.use_product else [])]
        out: Tensor = self.head(torch.cat(parts, dim=-1))
        return out[..., 0]

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        The other items keep their positions, so the cost grows with T and not with its square.
        """
        state = self.encode(history)
        whole_UC = self.score(state, candidates_UCD)
        query_UCE = self._query(candidates_UCD)
        keys_UTE, real_UT = history.pad(state.keys_NE), history.real_UT()
        bias_U1T = history.pad(state.log_weight_N).masked_fill(~real_UT, -torch.inf)[:, None]
        if self.config.use_attention:
            score_UCT = query_UCE @ keys_UTE.transpose(1, 2) / query_UCE.shape[-1] ** 0.5 + bias_U1T
        else:
            score_UCT = bias_U1T.expand(-1, query_UCE.shape[1], -1)
        weight_UCT = score_UCT.softmax(-1).nan_to_num(0.0)
        out_UCT = whole_UC.new_zeros(*whole_UC.shape, real_UT.shape[1])
        for places, pooled_UCTE in each_left_out(weight_UCT, keys_UTE):
            without_UCT = self._logit(pooled_UCTE, query_UCE[:, :, None].expand_as(pooled_UCTE))
            out_UCT[..., places] = whole_UC[..., None] - without_UCT
        return out_UCT.masked_fill(~real_UT[:, None], 0.0)

    @torch.no_grad()
    def correlation(self, categories_AD: Tensor, positions: int) -> Tensor:
        """What was learned for (target category, behaviour category, time): ``[A, A, P]``, each target's in 0..1.

        To be held against ``correlation.measured_correlation``. Times are the first ``positions`` rows after the
        candidate's: positions, or intervals if the judge tells time by intervals.

        Args:
            categories_AD: features of each category, such as the mean over its items.
        """
        embedded_AE = self.embedding(categories_AD)
        if not self.config.use_time:
            nothing_E = embedded_AE.new_zeros(embedded_AE.shape[1])
            return learned_correlation(embedded_AE, nothing_E.expand(positions, -1), nothing_E)
        times_PE = F.embedding(
            torch.arange(1, positions + 1, device=embedded_AE.device).clamp(max=self.config.times - 1),
            self.times.weight,
        )
        return learned_correlation(embedded_AE, times_PE, self.times.weight[0])
