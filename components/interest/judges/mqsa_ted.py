"""Sequence judge with short and long queries, taught by what follows what (MQSA-TED).

    e_1 .. e_T ─▶ x_t = sqrt(W) e_t + place ─┬▶ short: query x_t ─────────────────────┐
                                             └▶ long: query mean(x_{t-L+1} .. x_t) ───┴▶ h_t = a short + (1 - a) long
    keys and values: the single x_1 .. x_t, for both                    score of an item = <h_t, e_item>
    loss: what came at t + 1, for every t, and softmax(sqrt(W) <e_i, e_j> / tau) towards how often j followed i

Zhu et al. 2024 (WSDM; arXiv 2311.01056), as the released code has it: one self-attention block a branch, the normalised
query is the residual, ``logits = a short + (1 - a) long`` (so one vector a user serves both), cross-entropy over all
items, and transition-aware distillation with the teacher ``softmax((N_i / max N_i) / tau)``. Ours: an item is the
projection of its content features instead of a row of a table (with identities on, a table is among them); the log of
an item's weight is a learned direction in its input (0 for a plain event); an empty history has a learned state, which
learns what people begin with; a catalogue too long for a whole softmax uses the batch's pool, teacher and student then
both within it; the teacher reads ``teacher_items`` items of a batch, not all; L2 is the loop's weight decay; a fit
starts from states that are the query plus the mean of what was read, as our SASRec's does (from small random vectors,
with one query and no teacher, 250 steps in a first-order world gave NDCG@10 .19, so .31, and SASRec .32).

Letters: U users, T longest history, N history rows, K rows that are learned from, C candidates, P taken ones, W width,
A heads, S pool (or catalogue), I items, D features, M taught items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.base import ContentJudge, JudgeConfig, ranking_loss
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.layers import centre_inputs
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.together import mean_over
from couturier.kernels.catalogue_softmax import cross_entropy

_SMALL = 0.02  # of a place's vector and a stranger's state at the start


@dataclass(frozen=True, kw_only=True)
class MqsaTedConfig(JudgeConfig):
    """Size and loss of the judge; the paper's settings but for dropout (there .5)."""

    width: int = 64
    """W."""
    blocks: int = 1
    heads: int = 1
    length: int = 50
    """The newest history items that are read; older ones count for nothing."""
    long: int = 3
    """L, how many of the newest items the long query is the mean of."""
    alpha: float = 0.5
    """Share of the short branch in a score; the long one has the rest."""
    dropout: float = 0.2
    distillation: float = 0.1
    """Weight of the transition-aware distillation."""
    tau: float = 0.1
    """Temperature of teacher and student."""
    teacher_items: int = 256
    """M, history items of a step that are taught, drawn from all of its history items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(f"MqsaTedConfig.width is {self.width}; it must be a multiple of heads ({self.heads}).")
        if self.alpha > 1 or self.dropout >= 1 or self.tau == 0:
            raise ConfigError(
                f"MqsaTedConfig.alpha is {self.alpha}, dropout {self.dropout} and tau {self.tau}; "
                "wanted at most 1, less than 1 and more than 0."
            )


@dataclass(frozen=True, kw_only=True)
class MqsaTedState:
    """One vector a user, whatever the length of the history."""

    state_UW: Tensor

    def __len__(self) -> int:
        return len(self.state_UW)


class _Block(nn.Module):
    """Causal self-attention and a two-layer network, each with its residual; the query is a mean of ``long`` items."""

    def __init__(self, config: MqsaTedConfig, long: int) -> None:
        super().__init__()
        width = config.width
        self.heads, self.long = config.heads, long
        self.before, self.between = nn.LayerNorm(width, eps=1e-8), nn.LayerNorm(width, eps=1e-8)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        # At the start a state is the query plus the mean of what was read, as in our SASRec.
        with torch.no_grad():
            self.key_value.weight[width:].copy_(torch.eye(width))
            self.outer.weight.zero_()
            self.outer.bias.zero_()

    def forward(self, x_UTW: Tensor, drop: _Drop) -> Tensor:
        query_UTW = self.before(newest_mean(x_UTW, self.long))
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(query_UTW), *self.key_value(x_UTW).chunk(2, -1))
        )
        match_UATT = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        t = x_UTW.shape[1]
        ahead_TT = torch.ones(t, t, dtype=torch.bool, device=x_UTW.device).triu(1)
        weight_UATT = drop(match_UATT.masked_fill(ahead_TT, -torch.inf).softmax(-1))
        out_UTW = self.between(query_UTW + (weight_UATT @ value).transpose(1, 2).flatten(2))
        found_UTW: Tensor = out_UTW + drop(self.outer(drop(self.inner(out_UTW).relu())))
        return found_UTW


class _Branch(nn.Module):
    """Blocks whose queries are means of the newest ``long`` items, and a last normalisation."""

    def __init__(self, config: MqsaTedConfig, long: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(config, long) for _ in range(config.blocks))
        self.last = nn.LayerNorm(config.width, eps=1e-8)

    def forward(self, x_UTW: Tensor, drop: _Drop) -> Tensor:
        for block in self.blocks:
            x_UTW = block(x_UTW, drop)
        found_UTW: Tensor = self.last(x_UTW)
        return found_UTW


class MqsaTedJudge(ContentJudge):
    """The judge ``mqsa_ted``; see the module."""

    Config = MqsaTedConfig
    name = "mqsa_ted"
    every_position = True
    wants_transitions = True

    def __init__(self, config: MqsaTedConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        self.tower = nn.Linear(self.width, config.width)
        centre_inputs(self.tower, content.pictures_IP)
        self.places = nn.Parameter(_SMALL * torch.randn(config.length, config.width))
        self.amount = nn.Parameter(torch.zeros(config.width))
        self.nothing = nn.Parameter(_SMALL * torch.randn(config.width))
        self.short, self.long = _Branch(config, 1), _Branch(config, config.long)

    def _encode(self, history: HistoryBatch) -> MqsaTedState:
        read = history.newest(self.config.length)
        states_UTW = self._states(read, self.tower(read.features_ND), _Drop(0.0, None))
        return MqsaTedState(state_UW=self._last(read, states_UTW))

    def _score(self, state: MqsaTedState, candidates_UCD: Tensor) -> Tensor:
        return (self.tower(candidates_UCD) @ state.state_UW[..., None])[..., 0]

    def score_all(self, state: MqsaTedState, items_ID: Tensor) -> Tensor:
        """Logits ``[U, I]``: one product."""
        scores_UI: Tensor = state.state_UW @ self.tower(items_ID).T
        return scores_UI

    def _states(self, history: HistoryBatch, items_NW: Tensor, drop: _Drop) -> Tensor:
        """The state after each place, ``[U, T, W]``, from the tower's rows of a history in time order.

        Padding stands on the right, where causality hides it; what is written there counts for nothing.
        """
        amount_N1 = history.weight_N.clamp_min(1e-2).log()[:, None]
        back_N = history.offsets[1:][history.users_N] - 1 - torch.arange(len(items_NW), device=items_NW.device)
        place_NW = self.places[self.config.length - 1 - back_N]
        x_UTW = history.pad(drop(items_NW * self.config.width**0.5 + place_NW + amount_N1 * self.amount))
        if not x_UTW.numel():
            return x_UTW
        alpha = self.config.alpha
        states_UTW: Tensor = alpha * self.short(x_UTW, drop) + (1 - alpha) * self.long(x_UTW, drop)
        return states_UTW

    def _last(self, history: HistoryBatch, states_UTW: Tensor) -> Tensor:
        """Each user's newest state; the learned one where there is no history."""
        lengths_U = history.lengths
        if not states_UTW.numel():
            return self.nothing.expand(len(history), -1)
        last_UW = states_UTW[torch.arange(len(lengths_U), device=lengths_U.device), (lengths_U - 1).clamp_min(0)]
        return torch.where((lengths_U > 0)[:, None], last_UW, self.nothing)

    def loss(self, batch: TrainBatch, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """What came next at every place, what was taken last, and the distillation.

        Where candidates are shown otherwise than the catalogue has them (worn pictures, no words), the ranking loss
        over them as shown is added.

        Raises:
            DataError: the history does not say which items it holds, or nobody counted the transitions.
        """
        history = batch.history.newest(self.config.length)
        if history.items_N is None:
            raise DataError("mqsa_ted learns which item came next: give the history its items_N.")
        drop = _Drop(self.config.dropout, noise)
        catalogue_ID = self.embed_items()
        pool_S = batch.pool_S if batch.pool_S is not None and len(batch.pool_S) < len(catalogue_ID) else None
        pool_SW = self.tower(catalogue_ID if pool_S is None else catalogue_ID[pool_S])
        states_UTW = self._states(history, self.tower(history.features_ND), drop)
        last_UW = self._last(history, states_UTW)
        rows_KW = self._rows(history, states_UTW, last_UW, batch)
        next_ = self._next_loss(batch, history, rows_KW, catalogue_ID, pool_S, pool_SW)
        loss, parts = next_, {"next": next_.detach()}
        if self.config.distillation:
            taught = self._distilled(history.items_N, catalogue_ID, pool_S, pool_SW, drop)
            loss, parts = loss + self.config.distillation * taught, parts | {"distillation": taught.detach()}
        shown_UCD = batch.candidates_UCD
        if torch.equal(shown_UCD.detach(), catalogue_ID[batch.items_UC.clamp_min(0)].detach()):
            return loss, parts
        shown, shown_parts = ranking_loss((self.tower(shown_UCD) @ last_UW[..., None])[..., 0], batch, self.config.bce)
        return loss + shown, parts | shown_parts

    def _rows(self, history: HistoryBatch, states_UTW: Tensor, last_UW: Tensor, batch: TrainBatch) -> Tensor:
        """The state before each history row, then each user's newest once for every taken candidate, ``[K, W]``."""
        first_U1W = self.nothing.expand(len(history), 1, -1)
        before_UTW = torch.cat([first_U1W, states_UTW], dim=1)[:, : states_UTW.shape[1]]
        return torch.cat([before_UTW[history.real_UT()], last_UW.repeat_interleave(batch.positives, 0)])

    def _next_loss(
        self,
        batch: TrainBatch,
        history: HistoryBatch,
        states_KW: Tensor,
        catalogue_ID: Tensor,
        pool_S: Tensor | None,
        pool_SW: Tensor,
    ) -> Tensor:
        """Mean over places of the cross-entropy of what came next; a basket's items share one place."""
        taken_UP = batch.items_UC[:, : batch.positives]
        assert history.items_N is not None
        items_K = torch.cat([history.items_N, taken_UP.flatten()])
        one_N = states_KW.new_ones(len(history.items_N))
        share_K = torch.cat([one_N, states_KW.new_full((taken_UP.numel(),), 1 / batch.positives)]) * (items_K >= 0)
        items_K = items_K.clamp_min(0)
        own_KW = pool_SW.index_select(0, items_K) if pool_S is None else self.tower(catalogue_ID[items_K])
        own_K = (states_KW * own_KW).sum(-1)
        log_q_S = None if pool_S is None else batch.pool_log_q_S
        bias_S = pool_SW.new_zeros(len(pool_SW)) if log_q_S is None else -log_q_S
        total = cross_entropy(states_KW, own_K, pool_SW, bias_S, pool_S, items_K, share_K)
        return mean_over(total, share_K.sum())

    def _distilled(
        self, items_N: Tensor, catalogue_ID: Tensor, pool_S: Tensor | None, pool_SW: Tensor, drop: _Drop
    ) -> Tensor:
        """Mean over taught history items of the cross-entropy of the student under the teacher."""
        if self.transitions is None:
            raise DataError("mqsa_ted is taught by transitions: set judge.transitions, or distillation to 0.")
        known_N = items_N[items_N >= 0]
        heads_M = known_N[drop.some(len(known_N), self.config.teacher_items)]
        counts_MI = self.transitions.dense(heads_M.cpu()).to(pool_SW.device)
        teacher_MS = teacher(counts_MI, self.config.tau, pool_S)
        head_MW = drop(self.tower(catalogue_ID[heads_M]) * self.config.width**0.5)
        student_MS = (head_MW @ pool_SW.T / self.config.tau).log_softmax(1)
        return mean_over(-(teacher_MS * student_MS).sum(), torch.tensor(len(heads_M)))

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        Without one of the newest ``length`` items the next older one is read instead; what is older counts for nothing.
        """
        history.check(self.width)
        numbered = replace(history, items_N=torch.arange(len(history.features_ND), device=history.offsets.device))
        read = numbered.newest(self.config.length + 1)
        found_UCT = super().explain(read, candidates_UCD)
        real_UT = history.real_UT()
        out_UTC = found_UCT.new_zeros(*real_UT.shape, candidates_UCD.shape[1])
        users_N = read.users_N
        assert read.items_N is not None
        out_UTC[users_N, read.items_N - history.offsets[users_N]] = found_UCT.transpose(1, 2)[read.real_UT()]
        return out_UTC.transpose(1, 2).contiguous()


class _Drop:
    """Dropout and choice out of the noise that a loss is given; nothing is dropped without it."""

    def __init__(self, share: float, noise: torch.Generator | None) -> None:
        self.share, self.noise = share, noise

    def __call__(self, x: Tensor) -> Tensor:
        if self.noise is None or self.share == 0:
            return x
        kept = torch.empty(x.shape, device=self.noise.device).bernoulli_(1 - self.share, generator=self.noise)
        return x * kept.div_(1 - self.share).to(x.device)

    def some(self, count: int, most: int) -> Tensor:
        """Indices of at most ``most`` of ``count`` things."""
        if count <= most or self.noise is None:
            return torch.arange(count)
        return torch.randperm(count, generator=self.noise)[:most]


def newest_mean(x_UTW: Tensor, count: int) -> Tensor:
    """At each place the mean of the newest ``count`` rows up to it (of fewer near the start).

    Example:
        >>> newest_mean(torch.tensor([[[2.0], [4.0], [9.0]]]), 2).flatten().tolist()
        [2.0, 3.0, 6.5]
    """
    if count == 1:
        return x_UTW
    padded_UWT = F.pad(x_UTW.transpose(1, 2), (count - 1, 0))
    mean_UTW = F.avg_pool1d(padded_UWT, count, stride=1).transpose(1, 2)
    there_T1 = torch.arange(1, x_UTW.shape[1] + 1, device=x_UTW.device).clamp(max=count)[:, None]
    return mean_UTW * (count / there_T1)


def teacher(counts_MI: Tensor, tau: float, pool_S: Tensor | None = None) -> Tensor:
    """``softmax((N / max N) / tau)`` a row, ``[M, I]``, or of the columns ``pool_S`` alone; uniform without counts.

    A row with one successor keeps mass on every item: its peak is only ``exp(1 / tau)`` times the rest.

    Example:
        >>> teacher(torch.tensor([[0.0, 0.0], [0.0, 5.0]]), 1.0).round(decimals=3).tolist()
        [[0.5, 0.5], [0.26899999380111694, 0.7310000061988831]]
    """
    level_MI = counts_MI / counts_MI.amax(1, keepdim=True).clamp_min(1e-24) / tau
    return (level_MI if pool_S is None else level_MI[:, pool_S]).softmax(1)
