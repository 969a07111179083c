"""Experts mixed by an attentive gate: who somebody is decides how a candidate is judged (AW-MoE).

    behaviour b_j, target t ─┬▶ attention unit ─▶ softmax ─▶ V = sum of b_j ─▶ x = [V | t | V t] ─▶ experts f_1 .. f_K
                             ├▶ gate unit g_j in R^K      ┐                                              │
                             └▶ activation unit a_j in R  ┴▶ g = mean_j a_j g_j (by weight) ──▶ logit = sum_k g_k f_k(x)
    contrast: the gate of a thinned history must be nearest to the gate of the whole one, among those of other people

JD, 2023 (arXiv 2306.05011). From its abstract: a mixture whose experts and gate both read the behaviours, a gate of one
gate unit and one activation unit that learn the expert activations by attention, random masking that plays the long
tail, a contrast on the gate's output. The body was not available, so ours are: the widths; the units as networks of one
hidden layer over ``[b | t | b t]``; no softmax over experts; a mean over behaviours where the paper may have a sum, so
that a gate does not grow with the history and a short one's resembles a long one's before anything is learned (with the
sum, short histories were judged worse than by DIN); InfoNCE over cosines, all gates of a batch asked about one target;
experts with one hidden layer; the attention of the input network, as in DIN's released code (arXiv 1706.06978) without
its constant.

A behaviour is its item's projection plus a small network of its age and weight. ``weight`` counts as copies: a weight
of 2 is the same as the row twice. An empty history has a learned gate and a learned V; to learn them, a share of the
histories of a batch is left out whole. The contrast compares the users of a batch, so over several processes its
negatives are those of one process.

Letters: U users, C candidates of a user, T history length, N rows, D features, E width of a behaviour, K experts,
F hidden width of a unit, S places left out at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge, JudgeConfig, ranking_loss
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.layers import centre_inputs, mlp
from couturier.components.interest.left_out import each_left_out
from couturier.components.interest.masking import thinned, with_strangers
from couturier.components.interest.types import HistoryBatch, TrainBatch

_TIMES = 5
_LEAST = 1e-3  # of a behaviour's weight
_PIECE = 1 << 21  # numbers of a hidden layer at a time, so that a piece stays in the cache


@dataclass(frozen=True, kw_only=True)
class AwMoeConfig(JudgeConfig):
    """Size of the mixture and weight of its contrast."""

    experts: int = 4
    """K."""
    width: int = 32
    """E, of a behaviour and a target."""
    unit: int = 8
    """F, hidden width of the attention, gate and activation units."""
    hidden: int = 32
    """Hidden width of an expert."""
    contrast: float = 0.2
    """Weight of the contrast between gates of whole and thinned histories; 0 for none."""
    mask: float = 0.8
    """Chance of a behaviour to be left out of a thinned history: high, so that twenty-five become the long tail's five
    (at 0.5 the contrast did not help in the planted world)."""
    temperature: float = 0.2
    """Of the contrast."""
    strangers: float = 0.03
    """Share of histories left out whole, from which the default gate is learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask >= 1 or self.strangers >= 1 or self.temperature == 0:
            raise ConfigError(
                f"AwMoeConfig.mask is {self.mask}, strangers {self.strangers} and temperature {self.temperature}; "
                "wanted less than 1, less than 1 and more than 0."
            )


@dataclass(frozen=True, kw_only=True)
class AwMoeState:
    """What the judge keeps of its users: their behaviours, padded on the right, and how much each counts (0 there)."""

    behaviours_UTE: Tensor
    amount_UT: Tensor

    def __len__(self) -> int:
        return len(self.behaviours_UTE)

    @property
    def empty_U(self) -> Tensor:
        """Bool ``[U]``, users of whom nothing is known."""
        return ~(self.amount_UT > 0).any(1)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What the three units find for some candidates: attention, ``w_j a_j``, and the gate unit's hidden layer."""

    weight_UCT: Tensor
    active_UCT: Tensor
    hidden_UCTF: Tensor


class AwMoeJudge(ContentJudge):
    """The judge ``aw_moe``; see the module."""

    Config = AwMoeConfig
    name = "aw_moe"

    def __init__(self, config: AwMoeConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        e, f, k = config.width, config.unit, config.experts
        self.item = nn.Linear(self.width, e)
        self.moment = mlp([_TIMES, 16, e], lambda width: nn.GELU())
        # First layers of the attention, activation and gate units side by side, over [b | t | b t].
        self.first = nn.Linear(3 * e, 3 * f)
        self.attention, self.activation, self.gate = nn.Linear(f, 1, bias=False), nn.Linear(f, 1), nn.Linear(f, k)
        self.experts = nn.Linear(3 * e, k * config.hidden)
        self.answers = nn.Parameter(torch.randn(k, config.hidden) * config.hidden**-0.5)
        self.offset = nn.Parameter(torch.zeros(k))
        self.nothing = nn.Parameter(torch.randn(e) * 0.1)
        self.usual = nn.Parameter(torch.full((k,), 0.5))
        # Everybody starts with the usual gate: from gates near 0 experts learn next to nothing for hundreds of steps.
        nn.init.ones_(self.activation.bias)
        nn.init.constant_(self.gate.bias, 0.5)
        # As DIN's, half as wide: the units multiply b and t, and a product of two small ones teaches them nothing for
        # hundreds of steps, while nobody's gate yet differs from anybody else's.
        nn.init.normal_(self.item.weight, std=0.5)
        nn.init.zeros_(self.item.bias)
        centre_inputs(self.item, content.pictures_IP)

    def _encode(self, history: HistoryBatch) -> AwMoeState:
        amount_N = history.weight_N.clamp_min(_LEAST)
        behaviours_NE = self.item(history.features_ND) + self.moment(_times(history.age_days_N))
        return AwMoeState(behaviours_UTE=history.pad(behaviours_NE), amount_UT=history.pad(amount_N))

    def _score(self, state: AwMoeState, candidates_UCD: Tensor) -> Tensor:
        return self._judged(state, self.item(candidates_UCD))[0]

    def gates(self, state: AwMoeState, candidates_UCD: Tensor) -> Tensor:
        """``[U, C, K]``: how much each expert counts for each candidate."""
        return self._judged(state, self.item(candidates_UCD))[1]

    def _judged(self, state: AwMoeState, targets_UCE: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[U, C]`` and gates ``[U, C, K]``, some candidates at a time."""
        pooled, gates = [], []
        empty_U11 = state.empty_U[:, None, None]
        mass_U11 = state.amount_UT.sum(1)[:, None, None].clamp_min(_LEAST)
        for part_UCE, read in self._reads(state, targets_UCE):
            if read is None:
                pooled.append(self.nothing.expand(part_UCE.shape))
                gates.append(self.usual.expand(*part_UCE.shape[:2], -1))
                continue
            pooled.append(torch.where(empty_U11, self.nothing, read.weight_UCT @ state.behaviours_UTE))
            summed_UCF = (read.active_UCT[:, :, None] @ read.hidden_UCTF)[:, :, 0]
            gate_UCK = summed_UCF @ self.gate.weight.T + read.active_UCT.sum(-1, keepdim=True) * self.gate.bias
            gates.append(torch.where(empty_U11, self.usual, gate_UCK / mass_U11))
        gates_UCK = torch.cat(gates, dim=1)
        return self._mixed(torch.cat(pooled, dim=1), targets_UCE, gates_UCK), gates_UCK

    def _reads(self, state: AwMoeState, targets_UCE: Tensor) -> list[tuple[Tensor, _Read | None]]:
        """The units over (candidate, behaviour) pairs, some candidates at a time; None where nobody has a history.

        ``W [b | t | b t] = (Wt + Wp b) t + Wb b`` is one product of the targets with a matrix a user.
        """
        users, length, e = state.behaviours_UTE.shape
        if not users or not length:
            return [(targets_UCE, None)]
        f = self.config.unit
        own_FE, target_FE, both_FE = self.first.weight.split(e, dim=1)
        base_UX = (state.behaviours_UTE @ own_FE.T + self.first.bias).flatten(1)
        matrix_UXE = (both_FE * state.behaviours_UTE[:, :, None] + target_FE).flatten(1, 2)
        amount_U1T = state.amount_UT[:, None]
        out: list[tuple[Tensor, _Read | None]] = []
        for part_UCE in targets_UCE.split(max(1, _PIECE // max(1, users * length * 3 * f)), dim=1):
            hidden_UCX = torch.baddbmm(base_UX[:, None], part_UCE, matrix_UXE.transpose(1, 2)).relu()
            hidden_UCTX = hidden_UCX.unflatten(-1, (length, 3 * f))
            attention_UCTF, active_UCTF, gate_UCTF = hidden_UCTX.split(f, dim=-1)
            match_UCT = self.attention(attention_UCTF)[..., 0] + amount_U1T.clamp_min(1e-30).log()
            weight_UCT = match_UCT.masked_fill(amount_U1T == 0, -1e30).softmax(-1)
            active_UCT = self.activation(active_UCTF)[..., 0] * amount_U1T
            out.append((part_UCE, _Read(weight_UCT=weight_UCT, active_UCT=active_UCT, hidden_UCTF=gate_UCTF)))
        return out

    def _mixed(self, pooled_XE: Tensor, target_XE: Tensor, gate_XK: Tensor) -> Tensor:
        """``sum_k g_k f_k([V | t | V t])``; any leading axes."""
        x_XZ = torch.cat([pooled_XE, target_XE, pooled_XE * target_XE], dim=-1)
        hidden_XKH = self.experts(x_XZ).relu().unflatten(-1, (self.config.experts, -1))
        found_X: Tensor = (((hidden_XKH * self.answers).sum(-1) + self.offset) * gate_XK).sum(-1)
        return found_X

    def loss(self, batch: TrainBatch, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Ranking, and the contrast between the gates of whole and thinned histories for one target."""
        config = self.config
        history = with_strangers(batch.history, config.strangers, noise) if config.strangers else batch.history
        state = self._encode(history)
        targets_UCE = self.item(batch.candidates_UCD)
        if not config.contrast:
            return ranking_loss(self._judged(state, targets_UCE)[0], batch, config.bce)
        shared_U1E = self._shared(targets_UCE, noise)
        logits_UC, gates_UCK = self._judged(state, torch.cat([targets_UCE, shared_U1E], dim=1))
        loss, parts = ranking_loss(logits_UC[:, :-1], batch, config.bce)
        thin = self._encode(thinned(history, config.mask, noise))
        thin_U1K = self._judged(thin, shared_U1E)[1]
        both_U = ~(state.empty_U | thin.empty_U)
        contrast = gate_contrast(thin_U1K[both_U, 0], gates_UCK[both_U, -1], config.temperature)
        return loss + config.contrast * contrast, parts | {"contrast": contrast.detach()}

    def _shared(self, targets_UCE: Tensor, noise: torch.Generator) -> Tensor:
        """What one user of the batch, drawn at random, took, as everybody's target ``[U, 1, E]``.

        Of targets of their own, a gate that told the targets apart would end the contrast without a look at who reads.
        """
        users = len(targets_UCE)
        drawn_1 = torch.randint(max(1, users), (min(1, users),), generator=noise, device=noise.device)
        return targets_UCE[drawn_1.to(targets_UCE.device), :1].expand(users, -1, -1)

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        Leaving an item out takes one term out of the gate's mean and out of the history's, so the cost grows with T.
        """
        state = self.encode(history)
        whole_UC = self.score(state, candidates_UCD)
        real_UT = history.real_UT()
        out_UCT = whole_UC.new_zeros(*whole_UC.shape, real_UT.shape[1])
        alone_U = history.lengths == 1
        mass_UT = (state.amount_UT.sum(1, keepdim=True) - state.amount_UT).clamp_min(_LEAST)
        start = 0
        for part_UCE, read in self._reads(state, self.item(candidates_UCD)):
            if read is None:
                break
            here = slice(start, start := start + part_UCE.shape[1])
            gate_UCTK = self.gate(read.hidden_UCTF) * read.active_UCT[..., None]
            gate_UC1K = gate_UCTK.sum(2, keepdim=True)
            for places, pooled_UCSE in each_left_out(read.weight_UCT, state.behaviours_UTE):
                left_UCSK = (gate_UC1K - gate_UCTK[:, :, places]) / mass_UT[:, None, places, None]
                nobody_U111 = alone_U[:, None, None, None]
                pooled_UCSE = torch.where(nobody_U111, self.nothing, pooled_UCSE)
                left_UCSK = torch.where(nobody_U111, self.usual, left_UCSK)
                target_UCSE = part_UCE[:, :, None].expand_as(pooled_UCSE)
                without_UCS = self._mixed(pooled_UCSE, target_UCSE, left_UCSK)
                out_UCT[:, here, places] = whole_UC[:, here, None] - without_UCS
        return out_UCT.masked_fill(~real_UT[:, None], 0.0)


def gate_contrast(thin_UK: Tensor, whole_UK: Tensor, temperature: float) -> Tensor:
    """InfoNCE over cosines: each thinned history's gate must be nearest to its own whole one; 0 for less than two.

    Example:
        >>> apart = torch.eye(2)
        >>> round(gate_contrast(apart, apart, 0.5).item(), 3)  # log(1 + exp(-1 / 0.5))
        0.127
    """
    if len(thin_UK) < 2:
        return thin_UK.sum() * 0
    likeness_UU = F.normalize(thin_UK, dim=-1) @ F.normalize(whole_UK, dim=-1).T / temperature
    return F.cross_entropy(likeness_UU, torch.arange(len(thin_UK), device=thin_UK.device))


def _times(age_days_N: Tensor) -> Tensor:
    """Age on scales from an hour to a season, ``[N, 5]``."""
    age = age_days_N.clamp_min(0)
    scales = [age.log1p() / 4, (-age * 4).exp(), (-age / 7).exp(), (-age / 30).exp(), (-age / 90).exp()]
    return torch.stack(scales, dim=-1)
