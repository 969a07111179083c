"""Self-attentive sequence judges: what came last, read in order, points at what comes next (SASRec, gSASRec).

    e_1 .. e_T ─▶ sqrt(W) e_t + place ─▶ causal blocks ─▶ state h_t ─▶ score of an item = <h_t, e_item>
    item features ─▶ tower ─▶ e_item                      └▶ learns from every t: what came at t + 1

Kang and McAuley 2018 (arXiv 1808.09781), in the order of operations of the released code: queries are normalised, keys
and values are not, the normalised query is the residual. gSASRec is Petrov and Macdonald 2023 (arXiv 2308.07192). Ours:
an item is the projection of its content features instead of a row of a table (with identities on, a table is among
them); places are counted from the newest, as left padding counts them; an empty history has a learned state, which
learns what people begin with; the log of an item's weight is a learned direction in its input (0 for a plain event);
attention weights are not dropped out; a batch shares its sampled negatives; a fit starts from states that are the
mean of what was read (values and outputs of attention are the identity).

Rows lie one user after another without padding (:mod:`couturier.kernels.causal_attention`).

Letters: U users, N history rows, K rows that are learned from, C candidates, P taken ones, W width,
A heads, E width of a head, S pool, I items, D features.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.base import ContentJudge, JudgeConfig, ranking_loss
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.layers import Drop, RowDropout, centre_inputs, keep_all
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.shares import how_many, summed
from couturier.kernels.catalogue_softmax import cross_entropy
from couturier.kernels.causal_attention import causal_attention


@dataclass(frozen=True, kw_only=True)
class SasrecConfig(JudgeConfig):
    """Size and loss of the sequence judge."""

    width: int = 64
    """W."""
    blocks: int = 2
    heads: int = 1
    length: int = 50
    """The newest history items that are read; older ones count for nothing."""
    dropout: float = 0.2
    loss: Literal["softmax", "sampled", "gbce"] = "softmax"
    """Over the whole catalogue; over the batch's pool of negatives; or gSASRec's generalised binary cross-entropy
    against that pool."""
    negatives: int = 256
    """S, negatives drawn uniformly where the batch brings no pool."""
    calibration: float = 0.75
    """t of gBCE: 0 is binary cross-entropy, 1 makes the probabilities true ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(f"SasrecConfig.width is {self.width}; it must be a multiple of heads ({self.heads}).")
        if self.loss not in ("softmax", "sampled", "gbce"):
            raise ConfigError(f"SasrecConfig.loss is {self.loss!r}; choose softmax, sampled or gbce.")
        if self.dropout >= 1 or self.calibration > 1:
            raise ConfigError(
                f"SasrecConfig.dropout is {self.dropout} and calibration {self.calibration}; "
                "wanted less than 1 and at most 1."
            )


@dataclass(frozen=True, kw_only=True)
class SasrecState:
    """One vector a user, whatever the length of the history."""

    state_UW: Tensor

    def __len__(self) -> int:
        return len(self.state_UW)


class _Block(nn.Module):
    """Causal self-attention and a two-layer network, each with its residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width, eps=1e-8), nn.LayerNorm(width, eps=1e-8)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        # At the start a state is the last item plus the mean of what was read: what is alike scores high at once.
        with torch.no_grad():
            self.key_value.weight[width:].copy_(torch.eye(width))
            self.out.weight.copy_(torch.eye(width))
            self.outer.weight.zero_()
            self.outer.bias.zero_()

    def forward(self, x_NW: Tensor, offsets: Tensor, drop: Drop) -> Tensor:
        q_NW = self.before(x_NW)
        x_NW = self.between(q_NW + drop(self.out(self._attended(q_NW, x_NW, offsets))))
        added: Tensor = x_NW + drop(self.outer(self.inner(x_NW).relu()))
        return added

    def _attended(self, q_NW: Tensor, x_NW: Tensor, offsets: Tensor) -> Tensor:
        """Causal attention of every row over its user's rows up to itself, ``[N, W]``."""
        query_NAE, key_NAE, value_NAE = (
            rows_NW.unflatten(-1, (self.heads, -1))
            for rows_NW in (self.query(q_NW), *self.key_value(x_NW).chunk(2, -1))
        )
        return causal_attention(query_NAE, key_NAE, value_NAE, offsets).flatten(1)


class SasrecJudge(ContentJudge):
    """The judge ``sasrec``; see the module."""

    Config = SasrecConfig
    name = "sasrec"
    every_position = True

    def __init__(self, config: SasrecConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        self.tower = nn.Linear(self.width, config.width)
        centre_inputs(self.tower, content.pictures_IP)
        self.places = nn.Parameter(0.02 * torch.randn(config.length, config.width))
        self.amount = nn.Parameter(torch.zeros(config.width))
        self.nothing = nn.Parameter(0.02 * torch.randn(config.width))
        self.blocks = nn.ModuleList(_Block(config.width, config.heads) for _ in range(config.blocks))
        self.last = nn.LayerNorm(config.width, eps=1e-8)

    def _encode(self, history: HistoryBatch) -> SasrecState:
        read = history.newest(self.config.length)
        return SasrecState(state_UW=self._last(read, self._states(read, self.tower(read.features_ND), keep_all)))

    def _score(self, state: SasrecState, candidates_UCD: Tensor) -> Tensor:
        return (self.tower(candidates_UCD) @ state.state_UW[..., None])[..., 0]

    def score_all(self, state: SasrecState, items_ID: Tensor) -> Tensor:
        """Logits ``[U, I]``: one product."""
        scores_UI: Tensor = state.state_UW @ self.tower(items_ID).T
        return scores_UI

    def states(self, history: HistoryBatch) -> Tensor:
        """The state after each row of a history in time order, ``[N, W]``; at most ``length`` rows a user.

        Raises:
            DataError: a longer history, or rows that are not in time order.
        """
        history.check(self.width)
        if not history.in_time_order or bool((history.lengths > self.config.length).any()):
            raise DataError(f"states are of histories in time order of at most {self.config.length}; call newest().")
        return self._states(history, self.tower(history.features_ND), keep_all)

    def _states(self, history: HistoryBatch, items_NW: Tensor, drop: Drop) -> Tensor:
        """``[N, W]`` from the tower's rows ``items_NW``."""
        amount_N1 = history.weight_N.clamp_min(1e-2).log()[:, None]
        back_N = history.offsets[1:][history.users_N] - 1 - torch.arange(len(items_NW), device=items_NW.device)
        place_NW = self.places.index_select(0, self.config.length - 1 - back_N)
        x_NW = drop(items_NW * self.config.width**0.5 + place_NW + amount_N1 * self.amount)
        for block in self.blocks:
            x_NW = block(x_NW, history.offsets, drop)
        states_NW: Tensor = self.last(x_NW)
        return states_NW

    @property
    def _drops(self) -> int:
        """How often ``_states`` drops units."""
        return 1 + 2 * self.config.blocks

    def _last(self, history: HistoryBatch, states_NW: Tensor) -> Tensor:
        """Each user's newest state; the learned one where there is no history."""
        some_U1 = (history.lengths > 0)[:, None]
        if not len(states_NW):
            return self.nothing.expand(len(history), -1)
        last_U = (history.offsets[1:] - 1).clamp_min(0)
        return torch.where(some_U1, states_NW.index_select(0, last_U), self.nothing)

    def loss(self, batch: TrainBatch, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """What came next at every place, and what was taken last; see ``SasrecConfig.loss``.

        Where candidates are shown otherwise than the catalogue has them (worn pictures, no words), the ranking loss
        over them as shown is added. The sum over places is divided by users times ``length``, so that the loss is a
        mean over users and several processes fit as one.

        Raises:
            DataError: the history does not say which items it holds.
        """
        history = batch.history.newest(self.config.length)
        if history.items_N is None:
            raise DataError("sasrec learns which item came next: give the history its items_N.")
        catalogue_ID = self.embed_items() if batch.catalogue_ID is None else batch.catalogue_ID
        users, rows = len(history), len(history.features_ND)
        share = self.config.dropout if self.training else 0.0
        drop = RowDropout(share, rows=rows, width=self.config.width, layers=self._drops, noise=noise)
        taken_UP = batch.items_UC[:, : batch.positives]
        # Items are projected once, where they are shown as the catalogue has them and it is projected anyway.
        if batch.catalogue_ID is not None and self.config.loss == "softmax":
            total = self._whole_catalogue(history, taken_UP, self.tower(catalogue_ID), drop)
            return total / (max(1, users) * self.config.length), {"next": total.detach() / max(1, rows + users)}
        rows_NW, own_KW = self.tower(history.features_ND), self.tower(catalogue_ID[taken_UP.flatten()])
        next_, last_UW = self._next(history, taken_UP, rows_NW, own_KW, drop.of(0, rows))
        total = self._next_loss(next_, batch, catalogue_ID, noise)
        loss = total / (max(1, users) * self.config.length)
        parts = {"next": total.detach() / max(1, rows + users)}
        shown_UCD = batch.candidates_UCD
        if batch.catalogue_ID is not None or torch.equal(
            shown_UCD.detach(), catalogue_ID[batch.items_UC.clamp_min(0)].detach()
        ):
            return loss, parts
        shown, shown_parts = ranking_loss((self.tower(shown_UCD) @ last_UW[..., None])[..., 0], batch, self.config.bce)
        return loss + shown, parts | shown_parts

    def _whole_catalogue(self, history: HistoryBatch, taken_UP: Tensor, items_IW: Tensor, drop: RowDropout) -> Tensor:
        """The loss over the whole catalogue, with users shared out to cores where that pays."""
        users, rows = len(history), len(history.features_ND)

        def part(start: int, stop: int, items_IW: Tensor) -> Tensor:
            begin, end = int(history.offsets[start]), int(history.offsets[stop])
            some, taken_UP_ = history.of_users(start, stop), taken_UP[start:stop]
            assert some.items_N is not None
            rows_NW, own_KW = items_IW.index_select(0, some.items_N), items_IW.index_select(0, taken_UP_.flatten())
            next_, _ = self._next(some, taken_UP_, rows_NW, own_KW, drop.of(begin, end))
            return next_softmax(next_, items_IW, items_IW.new_zeros(len(items_IW)), None)

        shares = how_many(self.tower, users, rows)
        if shares == 1:
            return part(0, users, items_IW)
        # As many rows each: a core with fewer would wait.
        wanted = torch.arange(1, shares) * (rows + users) // shares
        cuts = [0, *torch.searchsorted(history.offsets + torch.arange(users + 1), wanted).tolist(), users]
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        parts = [partial(part, start, stop) for start, stop in itertools.pairwise(cuts)]
        return summed(parts, [items_IW], weights)

    def _next(
        self, history: HistoryBatch, taken_UP: Tensor, rows_NW: Tensor, own_KW: Tensor, drop: Drop
    ) -> tuple[_Next, Tensor]:
        """What is learned from, and each user's newest state."""
        assert history.items_N is not None
        positives = taken_UP.shape[1]
        states_NW = self._states(history, rows_NW, drop)
        last_UW = self._last(history, states_NW)
        shift_NW = torch.cat([self.nothing[None], states_NW[:-1]]) if len(states_NW) else states_NW
        place_N = torch.arange(len(states_NW), device=states_NW.device)
        # A first row has nothing before it, which stands first.
        before_NW = shift_NW.index_select(0, place_N * (place_N != history.offsets[:-1][history.users_N]))
        next_ = _Next(
            states_KW=torch.cat([before_NW, last_UW.repeat_interleave(positives, 0)]),
            own_KW=torch.cat([rows_NW, own_KW]),
            items_K=torch.cat([history.items_N, taken_UP.flatten()]),
            share_K=torch.cat([last_UW.new_ones(len(before_NW)), last_UW.new_full((taken_UP.numel(),), 1 / positives)]),
        )
        return next_, last_UW

    def _next_loss(self, next_: _Next, batch: TrainBatch, catalogue_ID: Tensor, noise: torch.Generator) -> Tensor:
        if self.config.loss == "softmax":
            items_IW = self.tower(catalogue_ID)
            return next_softmax(next_, items_IW, items_IW.new_zeros(len(items_IW)), None)
        pool_S, log_q_S = batch.pool_S, batch.pool_log_q_S
        if pool_S is None or log_q_S is None:
            count, items = self.config.negatives, self.items.items
            pool_S = torch.randint(items, (count,), generator=noise, device=noise.device).to(catalogue_ID.device)
            log_q_S = catalogue_ID.new_full((count,), math.log(count / items))
        pool_SW = self.tower(catalogue_ID[pool_S])
        if self.config.loss == "sampled":
            return next_softmax(next_, pool_SW, -log_q_S, pool_S)
        own_K = (next_.states_KW * next_.own_KW).sum(-1)
        bad_KS = next_.states_KW @ pool_SW.T
        real_KS = pool_S != next_.items_K[:, None]
        power = gbce_power(len(pool_S), self.items.items, self.config.calibration)
        return (gbce(own_K, bad_KS, real_KS, power) * next_.share_K).sum()

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


@dataclass(frozen=True, kw_only=True)
class _Next:
    """What is learned from: a state, the item that came next, its vector, and how much the row counts."""

    states_KW: Tensor
    own_KW: Tensor
    items_K: Tensor
    share_K: Tensor


def gbce_power(negatives: int, items: int, calibration: float) -> float:
    """beta of gBCE: ``alpha (t (1 - 1 / alpha) + 1 / alpha)`` with ``alpha = negatives / (items - 1)``.

    Petrov and Macdonald 2023, equation 10. More negatives than items count as all.

    Example:
        >>> gbce_power(4, 101, 0.0), round(gbce_power(4, 101, 1.0), 4)
        (1.0, 0.04)
    """
    alpha = min(1.0, negatives / max(1, items - 1))
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def gbce(good_K: Tensor, bad_KS: Tensor, real_KS: Tensor, power: float) -> Tensor:
    """``-(power log sigmoid(good) + sum log(1 - sigmoid(bad))) / (S + 1)`` a row, over the bad ones that are real."""
    bad_K = (F.softplus(bad_KS) * real_KS).sum(-1)
    return (power * F.softplus(-good_K) + bad_K) / (real_KS.sum(-1) + 1)


def next_softmax(next_: _Next, items_SW: Tensor, bias_S: Tensor, pool_S: Tensor | None) -> Tensor:
    """Cross-entropy of the item that came next against others, summed over rows times their shares.

    Args:
        items_SW: the others.
        bias_S: added to their logits; minus the log of the expected number of draws makes the normaliser unbiased
            (logQ correction; the item that came next is always there, so it is not corrected).
        pool_S: which catalogue items they are; None for the whole catalogue in its order.
    """
    own_K = (next_.states_KW * next_.own_KW).sum(-1)
    return cross_entropy(next_.states_KW, own_K, items_SW, bias_S, pool_S, next_.items_K, next_.share_K)
