"""Deep interest network: what a history says depends on the candidate that asks it.

    behaviour ─▶ e_k ─┐                                        ┌ din_code: softmax over the history ┐
                      ├▶ unit [v, e_k, v - e_k, v * e_k] ─▶ a_k┤                                    ├▶ u = sum a_k e_k
    candidate ─▶ v ───┘                                        └ din_paper: a_k, strength adds up  ─┘        │
                                              logit ◀─ head [u, v(, u * v)] (+ bias of the item) ◀───────────┘

Zhou et al. 2018 (arXiv 1706.06978). ``din_paper`` is the paper: one hidden layer in the unit, raw weights, head over
[u, v]. ``din_code`` is the released code: two sigmoid layers, softmax over the history, batch normalisation, a dense
layer, head over [u, v, u * v], a bias of the item. Activations are Dice (equation 4) or PReLU or the sigmoid. The
mini-batch-aware L2 (section 5.1; from memory, it is not in the released code) shrinks only the identities that a batch
holds, by how rarely each is met; being a sum over items, it is not a mean over users, nor are batch statistics, so
several processes fit almost, not exactly, as one.

Ours: items are a projection of their content features instead of rows of tables; the item's bias is linear in them; the
log of a behaviour's weight, and with ``ages`` a learned row for its age, is added to e_k (nothing for a plain event);
``mean_pool`` takes attention out, for comparison; the loss is the house's ranking loss, with the paper's cross-entropy
in it. The score does not depend on the order of a history.

Letters: U users, C candidates of a user, T longest history, N history rows, M rows of anything, I items, D features,
W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge, JudgeConfig, ranking_loss
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.layers import Dice, centre_inputs, mlp, time_bucket
from couturier.components.interest.left_out import each_left_out
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.kernels.target_attention import Layer, mlp_attention

_PAIRS = 1 << 21  # (candidate, behaviour) pairs scored at a time
_AGES = 24
_AT_ONCE = 128  # history items left out at a time when explaining


@dataclass(frozen=True, kw_only=True)
class DinConfig(JudgeConfig):
    """Form and size of the judge."""

    form: Literal["din_code", "din_paper"] = "din_code"
    width: int = 32
    """W (128 in the released code)."""
    unit: int = 32
    """First hidden layer of the attention unit: 36 in the paper, 80 in the code."""
    unit_2: int = 16
    """Its second, in ``din_code`` alone: 40 in the code."""
    hidden: int = 80
    """First hidden layer of the head: 200 in the paper, 80 in the code."""
    hidden_2: int = 40
    """Its second: 80 in the paper, 40 in the code."""
    activation: Literal["dice", "prelu", "sigmoid"] = "dice"
    """Of the head, and of the unit of ``din_paper``; the unit of ``din_code`` has sigmoids."""
    mba_l2: float = 0.0
    """Mini-batch-aware L2 on the identity table; 0 for none."""
    ages: bool = False
    """Whether the age of a behaviour is known; the paper has no time."""
    mean_pool: bool = False
    """Whether the history is its plain mean, whatever the candidate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("form", ("din_code", "din_paper")), ("activation", ("dice", "prelu", "sigmoid"))):
            if vars(self)[name] not in known:
                raise ConfigError(f"DinConfig.{name} is {vars(self)[name]!r}; choose one of {', '.join(known)}.")


@dataclass(frozen=True, kw_only=True)
class DinState:
    """The behaviours, jagged: user ``u`` owns rows ``offsets[u]`` to ``offsets[u + 1]``."""

    keys_NW: Tensor
    weight_N: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return self.offsets.numel() - 1


class _BatchNorm(nn.BatchNorm1d):
    """Over the last axis, whatever the others; one row is judged by what was seen before."""

    def forward(self, x_XW: Tensor) -> Tensor:
        flat_MW = x_XW.flatten(0, -2)
        training = self.training and len(flat_MW) > 1
        normal_MW = F.batch_norm(
            flat_MW, self.running_mean, self.running_var, self.weight, self.bias, training, 0.1, self.eps
        )
        return normal_MW.view_as(x_XW)


class DinJudge(ContentJudge):
    """The judge ``din``; see the module."""

    Config = DinConfig
    name = "din"

    def __init__(self, config: DinConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        w, coded = config.width, config.form == "din_code"
        self.embedding = nn.Linear(self.width, w)
        # Entries of about one: a product of two small ones would be lost in the unit for hundreds of steps.
        nn.init.normal_(self.embedding.weight)
        nn.init.zeros_(self.embedding.bias)
        centre_inputs(self.embedding, content.pictures_IP)
        self.amount = nn.Parameter(torch.zeros(w))
        if config.ages:
            self.ages = nn.Embedding(_AGES, w)
            nn.init.zeros_(self.ages.weight)
        # Made by mlp, run by the attention kernel: Linear, activation, Linear...
        unit = [4 * w, config.unit, config.unit_2, 1] if coded else [4 * w, config.unit, 1]
        self.unit = mlp(unit, (lambda width: nn.Sigmoid()) if coded else self._activation)
        if coded:
            self.before, self.dense = _BatchNorm(w), nn.Linear(w, w)
            self.between, self.bias = _BatchNorm(3 * w), nn.Linear(self.width, 1)
            nn.init.eye_(self.dense.weight)
        self.head = mlp([(3 if coded else 2) * w, config.hidden, config.hidden_2, 1], self._activation)
        if features.ids:
            self.counts_I: Tensor
            self.register_buffer("counts_I", content.counts_I.float().clamp_min(1))

    def _activation(self, width: int) -> nn.Module:
        kinds = {"dice": lambda: Dice(width), "prelu": lambda: nn.PReLU(width), "sigmoid": nn.Sigmoid}
        return kinds[self.config.activation]()

    def _encode(self, history: HistoryBatch) -> DinState:
        return self._state(history, self.embedding(history.features_ND))

    def _state(self, history: HistoryBatch, items_NW: Tensor) -> DinState:
        """What is kept of histories whose items have been embedded."""
        keys_NW = torch.addcmul(items_NW, history.weight_N.clamp_min(1e-2).log()[:, None], self.amount)
        if self.config.ages:
            keys_NW = keys_NW + self.ages(time_bucket(history.age_days_N, _AGES))
        return DinState(keys_NW=keys_NW, weight_N=history.weight_N, offsets=history.offsets)

    def _score(self, state: DinState, candidates_UCD: Tensor) -> Tensor:
        longest = int(state.offsets.diff().max()) if len(state) else 0
        step = max(1, _PAIRS // max(1, len(state) * longest))
        if torch.is_grad_enabled() or step >= candidates_UCD.shape[1]:
            query_UCW = self.embedding(candidates_UCD)
            return self._judged(state, query_UCW, candidates_UCD)
        return torch.cat([self._score(state, part) for part in candidates_UCD.split(step, dim=1)], dim=1)

    def _judged(self, state: DinState, query_UCW: Tensor, candidates_UCD: Tensor) -> Tensor:
        return self._logit(self.interest(state, query_UCW), query_UCW, self._item_bias(candidates_UCD))

    def interest(self, state: DinState, query_UCW: Tensor) -> Tensor:
        """The history as each candidate sees it, ``[U, C, W]``; zeros for an empty one."""
        if self.config.mean_pool:
            return self._mean(state)[:, None].expand_as(query_UCW)
        layers, gates = self._unit()
        # In full width even in mixed precision: weights that are a small difference of scores need it.
        with torch.autocast(query_UCW.device.type, enabled=False):
            return mlp_attention(
                query_UCW.float(),
                state.keys_NW.float(),
                state.offsets,
                layers,
                activations=gates,
                pooling=self.config.form,
            )

    def _unit(self) -> tuple[list[Layer], list[Callable[[Tensor], Tensor]] | None]:
        """The attention unit's layers and activations, as the kernel takes them."""
        layers: list[Layer] = [(layer.weight, layer.bias) for layer in self.unit if isinstance(layer, nn.Linear)]
        if self.config.form == "din_code":
            return layers, None
        return layers, [one.gate() if isinstance(one, Dice) else one for one in list(self.unit)[1::2]]

    def _mean(self, state: DinState) -> Tensor:
        """``[U, W]``, each behaviour counting by its weight."""
        users_N = torch.repeat_interleave(torch.arange(len(state), device=state.offsets.device), state.offsets.diff())
        weight_N1 = state.weight_N[:, None].clamp_min(0)
        sums = state.keys_NW.new_zeros(len(state), self.config.width).index_add(0, users_N, state.keys_NW * weight_N1)
        mass = weight_N1.new_zeros(len(state), 1).index_add(0, users_N, weight_N1)
        return sums / mass.clamp_min(1e-6)

    def _item_bias(self, candidates_XD: Tensor) -> Tensor | float:
        return self.bias(candidates_XD)[..., 0] if self.config.form == "din_code" else 0.0

    def _logit(self, interest_XW: Tensor, query_XW: Tensor, bias_X: Tensor | float) -> Tensor:
        """From what was found of the history and the candidate; any leading axes."""
        known = [interest_XW, query_XW]
        if self.config.form == "din_code":
            user_XW = self.dense(self.before(interest_XW))
            known = [self.between(torch.cat([user_XW, query_XW, user_XW * query_XW], dim=-1))]
        found_X: Tensor = self.head(torch.cat(known, dim=-1).flatten(0, -2)).view(interest_XW.shape[:-1])
        return found_X + bias_X

    def _logits(self, batch: TrainBatch) -> Tensor:
        """``[U, C]``; items are embedded once where they are shown as the catalogue has them and it is not large."""
        history, catalogue_ID = batch.history, batch.catalogue_ID
        if catalogue_ID is None or history.items_N is None or len(catalogue_ID) > len(history.features_ND):
            return self._score(self._encode(history), batch.candidates_UCD)
        items_IW = self.embedding(catalogue_ID)
        state = self._state(history, items_IW.index_select(0, history.items_N))
        query_UCW = items_IW.index_select(0, batch.items_UC.clamp_min(0).flatten()).unflatten(0, batch.items_UC.shape)
        return self._judged(state, query_UCW, batch.candidates_UCD)

    def loss(self, batch: TrainBatch, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The ranking loss, and mini-batch-aware L2 where it is asked for."""
        loss, parts = ranking_loss(self._logits(batch), batch, self.config.bce)
        if not self.config.mba_l2 or not self.items.config.ids:
            return loss, parts
        held = [batch.items_UC.flatten()] + ([] if batch.history.items_N is None else [batch.history.items_N])
        items = torch.cat(held).unique()
        items = items[items >= 0]
        shrink = mini_batch_aware_l2(self.items.identity.weight, items, self.counts_I)
        return loss + self.config.mba_l2 * shrink, parts | {"mba_l2": shrink.detach()}

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        A behaviour's weight depends on no other behaviour before the softmax, so leaving one out takes one term out
        of a sum and the cost grows with T, not with its square.
        """
        state = self.encode(history)
        whole_UC = self.score(state, candidates_UCD)
        query_UCW, bias_UC1 = self.embedding(candidates_UCD), self._item_bias(candidates_UCD)
        if isinstance(bias_UC1, Tensor):
            bias_UC1 = bias_UC1[..., None]
        real_UT, keys_UTW = history.real_UT(), history.pad(state.keys_NW)
        out_UCT = whole_UC.new_zeros(*whole_UC.shape, real_UT.shape[1])
        weight_UCT = self.weights(state, query_UCW, real_UT)
        summed = self.config.form == "din_paper" and not self.config.mean_pool
        parts = _each_taken_off(weight_UCT, keys_UTW) if summed else each_left_out(weight_UCT, keys_UTW)
        for places, pooled_UCTW in parts:
            shown_UCTW = query_UCW[:, :, None].expand_as(pooled_UCTW)
            out_UCT[..., places] = whole_UC[..., None] - self._logit(pooled_UCTW, shown_UCTW, bias_UC1)
        return out_UCT.masked_fill(~real_UT[:, None], 0.0)

    def weights(self, state: DinState, query_UCW: Tensor, real_UT: Tensor) -> Tensor:
        """How much each behaviour counts for each candidate, ``[U, C, T]``; 0 where padded."""
        real_UCT = real_UT[:, None].expand(-1, query_UCW.shape[1], -1)
        out_UCT = query_UCW.new_zeros(real_UCT.shape)
        if self.config.mean_pool:
            out_UT = query_UCW.new_zeros(real_UT.shape)
            out_UT[real_UT] = state.weight_N.clamp_min(0)
            out_UT = out_UT / out_UT.sum(-1, keepdim=True).clamp_min(1e-6)
            return out_UT[:, None].expand_as(out_UCT)
        layers, gates = self._unit()
        out_UCT[real_UCT] = mlp_attention(
            query_UCW,
            state.keys_NW,
            state.offsets,
            layers,
            activations=gates,
            pooling=self.config.form,
            return_weights=True,
        )[1]
        return out_UCT


def _each_taken_off(weight_UCT: Tensor, values_UTW: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """As ``each_left_out`` for plain sums: ``(places, the sum without each place [U, C, t, W])``."""
    whole_UC1W = (weight_UCT @ values_UTW)[:, :, None]
    for start in range(0, weight_UCT.shape[-1], _AT_ONCE):
        places = slice(start, min(start + _AT_ONCE, weight_UCT.shape[-1]))
        yield places, whole_UC1W - weight_UCT[..., places, None] * values_UTW[:, None, places]


def mini_batch_aware_l2(table_IW: Tensor, items_M: Tensor, counts_I: Tensor) -> Tensor:
    """``1/2 sum of |row|^2 / count`` over the distinct items of a batch: rows of other items get no gradient at all.

    Zhou et al. 2018, section 5.1: so that a batch costs what it holds, and what is often met is not shrunk more often.

    Example:
        >>> table = torch.ones(3, 2, requires_grad=True)
        >>> mini_batch_aware_l2(table, torch.tensor([0, 2]), torch.tensor([1.0, 1.0, 4.0])).backward()
        >>> table.grad[:, 0].tolist()
        [1.0, 0.0, 0.25]
    """
    found: Tensor = (table_IW[items_M].square().sum(1) / counts_I[items_M]).sum() / 2
    return found
