"""DARE: what to attend to and what it means are learned in two tables that share nothing; a search comes first.

    history ─▶ attention table ──────┐ search: the K best by score ─▶ softmax ─┐
    candidate ─▶ attention table ────┘    <sem, sem>/sqrt + <time, time>/sqrt  │
    history ─▶ representation table ──────────────────────────────────────────▶ sum = h ─▶ [r; h; h * r] ─▶ MLP ─▶ logit
    candidate ─▶ representation table = r

Feng et al., "Long-Sequence Recommendation Models Need Decoupled Embeddings" (ICLR 2025, arXiv 2410.02604). In one table
the gradients of attention and of representation pull the same rows different ways, and the larger wins; two tables
end that, and the attention's can be narrow, which makes the search cheap. ``tied=True`` is the baseline with one table,
TWIN (Chang et al., arXiv 2302.02352), in the same code. The search score is the attention score, so what is searched is
what will be attended to; an auxiliary head on attention without the cut lets every behaviour teach the attention.
``interest/decoupling.py`` measures the conflict.

Ours: a linear map of an item's content without bias stands where the paper has tables of ids and categories; what of
the content is itself learned (words, identity) is split, half of its columns for each table, so that nothing trained is
shared. No batch normalisation (a score would depend on who else is in the batch), one logit instead of two, the weight
of the auxiliary loss. A behaviour of weight w counts as w behaviours (``log w`` is added to its score). An empty
history finds nothing, ``h = 0``.

Letters: U users, C candidates of a user, R = U C rows, K found behaviours, T history length, N rows, D features,
H width of a key, V width of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge, JudgeConfig, ranking_loss
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.layers import mlp
from couturier.components.interest.recency import Time, check_time, time_index
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.kernels.target_attention import dot_attention
from couturier.kernels.topk_search import topk_search

_LEAST_WEIGHT = 1e-6


@dataclass(frozen=True, kw_only=True)
class DareConfig(JudgeConfig):
    """Size of the judge ``dare``."""

    attention: int = 32
    """Width of the attention table (the paper's 16 for the item and 16 for its category)."""
    representation: int = 32
    """Width of the representation table."""
    time_width: int = 16
    """Width of each time table, and of the time part of each score and value."""
    time: Time = "position"
    """What the time tables know: the ``position`` from the newest on, or the time ``interval`` to now."""
    times: int = 201
    """Rows of a time table, row 0 being the candidate's; what is older shares the last (the paper's 200 behaviours)."""
    top: int = 20
    """K, how many behaviours the search keeps."""
    hidden: int = 128
    """Width of the first hidden layer; the second has two fifths of it (200 and 80 in the released code)."""
    auxiliary: float = 0.5
    """Weight of the loss of the auxiliary head."""
    tied: bool = False
    """One table for both, which is TWIN; then both widths must be equal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_time("judge.dare.time", self.time)
        if self.tied and self.attention != self.representation:
            raise ConfigError(
                f"judge.dare.tied has one table, but attention is {self.attention} wide and representation "
                f"{self.representation}; make them equal."
            )


@dataclass(frozen=True, kw_only=True)
class DareState:
    """Behaviours as the two tables see them, jagged: user ``u`` owns rows ``offsets[u]`` to ``offsets[u + 1]``."""

    keys_NH: Tensor
    values_NV: Tensor
    log_weight_N: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return self.offsets.numel() - 1


class DareJudge(ContentJudge):
    """The judge ``dare``; see the module."""

    Config = DareConfig
    name = "dare"

    def __init__(self, config: DareConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        self.representation = nn.Linear(self.width, config.representation, bias=False)
        self.representation_times = nn.Embedding(config.times, config.time_width)
        tables = [self.representation_times]
        if not config.tied:
            self.attention = nn.Linear(self.width, config.attention, bias=False)
            self.attention_times = nn.Embedding(config.times, config.time_width)
            tables.append(self.attention_times)
        for table in tables:
            nn.init.normal_(table.weight, std=0.1)
        value = config.representation + config.time_width
        widths = [3 * value, config.hidden, max(1, 2 * config.hidden // 5), 1]
        self.head = mlp(widths, lambda width: nn.PReLU(init=0.1))
        self.auxiliary = mlp([3 * value, config.hidden, 1], lambda width: nn.PReLU(init=0.1))
        self.attends_D: Tensor
        self.represents_D: Tensor
        attends_D, represents_D = self._halves()
        self.register_buffer("attends_D", attends_D, persistent=False)
        self.register_buffer("represents_D", represents_D, persistent=False)

    def _halves(self) -> tuple[Tensor, Tensor]:
        """Which columns of the features each table reads: all that are fixed, and half of each learned part."""
        attends_D, represents_D = torch.ones(self.width), torch.ones(self.width)
        words, ids, start = self.items.config.words, self.items.config.ids, self.items.picture_width
        for width in [] if self.config.tied else [part for part in (words, ids) if part]:
            represents_D[start : start + width // 2] = 0
            attends_D[start + width // 2 : start + width] = 0
            start += width + 1
        return attends_D, represents_D

    def _encode(self, history: HistoryBatch) -> DareState:
        when_N = time_index(history, self.config.time, self.config.times)
        return DareState(
            keys_NH=self._key(history.features_ND, when_N),
            values_NV=self._value(history.features_ND, when_N),
            log_weight_N=history.weight_N.clamp_min(_LEAST_WEIGHT).log(),
            offsets=history.offsets,
        )

    def _score(self, state: DareState, candidates_UCD: Tensor) -> Tensor:
        shown_UCV = self._value(candidates_UCD, candidates_UCD.new_zeros(candidates_UCD.shape[:2], dtype=torch.int64))
        pool = self._found if _longest(state) > self.config.top else self._all
        return self._logit(self.head, pool(state, self._query(candidates_UCD)), shown_UCV)

    def loss(self, batch: TrainBatch, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The ranking loss of what the search found, and that of the auxiliary head, which attends to everything."""
        state, config = self._encode(batch.history), self.config
        query_UCH = self._query(batch.candidates_UCD)
        shown_UCV = self._value(batch.candidates_UCD, torch.zeros_like(batch.items_UC))
        whole_UCV = self._all(state, query_UCH)
        found_UCV = self._found(state, query_UCH) if _longest(state) > config.top else whole_UCV
        loss, parts = ranking_loss(self._logit(self.head, found_UCV, shown_UCV), batch, config.bce)
        if not config.auxiliary:
            return loss, parts
        beside, _ = ranking_loss(self._logit(self.auxiliary, whole_UCV, shown_UCV), batch, config.bce)
        return loss + config.auxiliary * beside, parts | {"auxiliary": beside.detach()}

    def _query(self, candidates_UCD: Tensor) -> Tensor:
        """Semantic and time part, each scaled by the root of its own width, so that one product adds the two scores."""
        now_UC = candidates_UCD.new_zeros(candidates_UCD.shape[:2], dtype=torch.int64)
        key_UCH = self._key(candidates_UCD, now_UC)
        wide, time = key_UCH.shape[-1] - self.config.time_width, self.config.time_width
        return torch.cat([key_UCH[..., :wide] / wide**0.5, key_UCH[..., wide:] / time**0.5], dim=-1)

    def _key(self, features_XD: Tensor, when_X: Tensor) -> Tensor:
        """The attention table's ``[semantic; time]``."""
        if self.config.tied:
            return self._value(features_XD, when_X)
        return torch.cat([self.attention(features_XD * self.attends_D), self.attention_times(when_X)], dim=-1)

    def _value(self, features_XD: Tensor, when_X: Tensor) -> Tensor:
        """The representation table's."""
        meaning_XV = self.representation(features_XD * self.represents_D)
        return torch.cat([meaning_XV, self.representation_times(when_X)], dim=-1)

    def _all(self, state: DareState, query_UCH: Tensor) -> Tensor:
        """What attention finds among all behaviours."""
        bias_N, values_NV = state.log_weight_N, state.values_NV
        return dot_attention(
            query_UCH, state.keys_NH, state.offsets, values=values_NV, behaviour_bias=bias_N, scale=1.0
        )

    def _found(self, state: DareState, query_UCH: Tensor) -> Tensor:
        """What attention finds among the K best behaviours."""
        found_RK, score_RK = self._search(state, query_UCH, self.config.top)
        weight_RK = score_RK.softmax(-1).nan_to_num(0.0)
        pooled_RV = F.embedding_bag(found_RK.clamp_min(0), state.values_NV, mode="sum", per_sample_weights=weight_RK)
        return pooled_RV.view(*query_UCH.shape[:2], -1)

    def _search(self, state: DareState, query_UCH: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Rows of the history and their scores ``[R, count]``, the best first; -1 and minus infinity where none is.

        The search itself has no gradient; where one is wanted the scores of what was found are computed again.
        """
        keys_NH, bias_N = state.keys_NH, state.log_weight_N
        found_UCK, score_UCK = topk_search(query_UCH, keys_NH, state.offsets, count, similarity="dot", bias=bias_N)
        found_RK, score_RK = found_UCK.flatten(0, 1), score_UCK.flatten(0, 1)
        if torch.is_grad_enabled():
            at_RK = found_RK.clamp_min(0)
            again_RK = torch.einsum("rh,rkh->rk", query_UCH.flatten(0, 1), keys_NH[at_RK]) + bias_N[at_RK]
            score_RK = again_RK.masked_fill(found_RK < 0, -torch.inf)
        return found_RK, score_RK

    def _logit(self, head: nn.Module, found_XV: Tensor, shown_XV: Tensor) -> Tensor:
        """From the behaviours found and the candidate; any leading axes."""
        out: Tensor = head(torch.cat([shown_XV, found_XV, found_XV * shown_XV], dim=-1))
        return out[..., 0]

    @torch.no_grad()
    def search(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """What the search finds: int64 ``[U, C, K]`` places in each user's history, the best first, -1 for none."""
        state = self.encode(history)
        if not len(history.features_ND):
            return history.offsets.new_zeros(*candidates_UCD.shape[:2], 0)
        found_RK, _ = self._search(state, self._query(candidates_UCD), self.config.top)
        found_UCK = found_RK.view(*candidates_UCD.shape[:2], -1)
        return torch.where(found_UCK < 0, found_UCK, found_UCK - history.offsets[:-1, None, None])

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        Only what the search found contributes; when it is left out the next best takes its place. The other items keep
        their times, so the cost grows with T and not with its square.
        """
        state = self.encode(history)
        whole_UC = self.score(state, candidates_UCD)
        longest = history.real_UT().shape[1]
        out_UCT = whole_UC.new_zeros(*whole_UC.shape, longest)
        if not longest or not whole_UC.shape[1]:
            return out_UCT
        users, count = whole_UC.shape
        found_RL, score_RL = self._search(state, self._query(candidates_UCD), self.config.top + 1)
        values_RLV = state.values_NV[found_RL.clamp_min(0)]
        kept = min(self.config.top, found_RL.shape[1])
        score_RKL = score_RL[:, None].repeat(1, kept, 1)
        score_RKL.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        pooled_RKV = score_RKL.softmax(-1).nan_to_num(0.0) @ values_RLV
        shown_UCV = self._value(candidates_UCD, found_RL.new_zeros(users, count))
        shown_RKV = shown_UCV.flatten(0, 1)[:, None].expand_as(pooled_RKV)
        without_UCK = self._logit(self.head, pooled_RKV, shown_RKV).view(users, count, kept)
        found_UCK = found_RL.view(users, count, -1)[..., :kept]
        place_UCK = (found_UCK - history.offsets[:-1, None, None]).clamp_min(0)
        part_UCK = (whole_UC[..., None] - without_UCK).masked_fill(found_UCK < 0, 0.0)
        return out_UCT.scatter_add(-1, place_UCK, part_UCK)


def _longest(state: DareState) -> int:
    lengths_U = state.offsets.diff()
    return int(lengths_U.max()) if len(lengths_U) else 0
