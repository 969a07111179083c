"""A judge that keeps a profile: all that was ever done, as one matrix a head that new behaviours are added to.

    item ─▶ tower ─▶ q, k, v ─▶ causal linear attention with decay ─▶ gate ─▶ network ─▶ state h_t ─▶ <h_t, e_item>
                                        │
    profile S_t = lam S_(t-1) + k_t v_t^T ── stored; ``extend`` goes on from it without the old behaviours

Linear attention of TransNormerLLM (arXiv 2307.14995, 2405.17381) as a user encoder: SiLU on q, k and v, a root mean
square norm of what is read, a sigmoid gate, then a network with its residual; the operator is
:mod:`couturier.kernels.linear_attention`. Reading costs the same a behaviour at any length, and the profile has the
same size at any length. Ours: one block, so that there is one profile; the residual is the item itself; an item is the
projection of its content; the log of its weight scales what it leaves behind. It learns as ``sasrec`` does.

Letters: U users, N history rows, W width, H heads, E width of a head, T history length, C candidates, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.sasrec import SasrecConfig, SasrecJudge, SasrecState
from couturier.components.interest.layers import Drop, centre_inputs, keep_all
from couturier.components.interest.types import HistoryBatch
from couturier.kernels.linear_attention import linear_attention

_EXPLAINED = 128  # the newest behaviours that are left out one by one


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(SasrecConfig):
    """Size of the profile judge; what it shares with ``sasrec`` means the same."""

    heads: int = 4
    length: int = 200
    """The newest behaviours that a fit learns from; a history is read whole, however long."""
    longest_half_life: float = 2000.0
    """Behaviours after which the slowest head has forgotten half; the fastest forgets half after one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest_half_life < 1:
            raise ConfigError(f"ProfileConfig.longest_half_life is {self.longest_half_life}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Profile(SasrecState):
    """All that is kept of users: the memory and the newest state; as large for ten behaviours as for ten thousand."""

    memory_UHEE: Tensor


class ProfileJudge(SasrecJudge):
    """The judge ``profile``; see the module."""

    Config = ProfileConfig
    name = "profile"
    every_position = True

    def __init__(self, config: ProfileConfig, features: FeatureConfig, content: Content) -> None:
        ContentJudge.__init__(self, config, features, content)
        self.config: ProfileConfig = config
        width = config.width
        self.tower = nn.Linear(self.width, width)
        centre_inputs(self.tower, content.pictures_IP)
        self.nothing = nn.Parameter(0.02 * torch.randn(width))
        self.mix, self.gate = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.read, self.before = nn.Linear(width, width), nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.last = nn.LayerNorm(width)
        half_lives_H = torch.logspace(0, torch.tensor(config.longest_half_life).log2(), config.heads, base=2.0)
        self.register_buffer("slopes_H", torch.tensor(2.0).log() / half_lives_H)
        self.slopes_H: Tensor
        # At the start a state is the last item plus a fading mean of what was read: what is alike scores high at once.
        with torch.no_grad():
            self.mix.weight[: 2 * width].mul_(0.1)
            self.mix.bias[: 2 * width].fill_(1.0)
            self.mix.weight[2 * width :].copy_(torch.eye(width))
            self.read.weight.copy_(torch.eye(width))
            self.outer.weight.zero_()
            self.outer.bias.zero_()

    def _encode(self, history: HistoryBatch) -> Profile:
        users, e = len(history), self.config.width // self.config.heads
        memory_UHEE = self.nothing.new_zeros(users, self.config.heads, e, e)
        return self.extend(Profile(memory_UHEE=memory_UHEE, state_UW=self.nothing.expand(users, -1)), history)

    def extend(self, profile: Profile, history: HistoryBatch) -> Profile:
        """The profile after further behaviours of the same users; who has none keeps what there is.

        Behaviours must be newer than those read before; splitting a history anywhere gives the same profile.
        """
        read = history.oldest_first()
        if not len(read.features_ND):
            return profile
        states_NW, memory = self._read(read, self.tower(read.features_ND), keep_all, profile.memory_UHEE)
        newest_UW = states_NW[(read.offsets[1:] - 1).clamp_min(0)]
        some_U1 = (read.lengths > 0)[:, None]
        return Profile(memory_UHEE=memory, state_UW=torch.where(some_U1, newest_UW, profile.state_UW))

    @property
    def _drops(self) -> int:
        return 3

    def _states(self, history: HistoryBatch, items_NW: Tensor, drop: Drop) -> Tensor:
        return self._read(history, items_NW, drop, None)[0]

    def _read(
        self, history: HistoryBatch, items_NW: Tensor, drop: Drop, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``(states [N, W], memory [U, H, E, E])`` after each row and after the last."""
        heads, n = self.config.heads, len(items_NW)
        x_NW = drop(items_NW * self.config.width**0.5)
        normal_NW = self.before(x_NW)
        q, k, v = (F.silu(part).view(n, heads, -1) for part in self.mix(normal_NW).chunk(3, dim=-1))
        v = v * history.weight_N.clamp_min(0).log1p()[:, None, None] / torch.tensor(2.0).log()
        read_NHE, memory = linear_attention(q, k, v, self.slopes_H, initial_state=memory, offsets=history.offsets)
        found_NW = F.rms_norm(read_NHE, read_NHE.shape[-1:]).flatten(1) * self.gate(normal_NW).sigmoid()
        x_NW = x_NW + drop(self.read(found_NW))
        x_NW = x_NW + drop(self.outer(F.silu(self.inner(x_NW))))
        states_NW: Tensor = self.last(x_NW)
        return states_NW, memory

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]`` of the newest 128 behaviours: the logit minus the logit without each.

        What is older is read once and kept as a profile, so a long history costs little more than a short one; its
        behaviours are not told apart and have 0.
        """
        whole_UC = self.score(self.encode(history), candidates_UCD)
        out_UCT = whole_UC.new_zeros(*whole_UC.shape, history.real_UT().shape[1])
        order_N = torch.arange(len(history.features_ND))
        numbered = history.rows(order_N, history.offsets)
        by_age = history.age_days_N.argsort(descending=True, stable=True)
        if not history.in_time_order:
            order_N = by_age[history.users_N[by_age].argsort(stable=True)]
        for user in range(len(history)):
            start, end = int(history.offsets[user]), int(history.offsets[user + 1])
            cut = max(start, end - _EXPLAINED)
            told = order_N[cut:end]
            if not len(told):
                continue
            old = numbered.rows(order_N[start:cut], torch.tensor([0, cut - start]), in_time_order=True)
            profile = self._encode(old)
            kept = ~torch.eye(len(told), dtype=torch.bool)
            rows = told.expand(len(told), -1)[kept]
            without = numbered.rows(rows, torch.arange(len(told) + 1) * (len(told) - 1), in_time_order=True)
            many = Profile(
                memory_UHEE=profile.memory_UHEE.expand(len(told), -1, -1, -1).contiguous(),
                state_UW=profile.state_UW.expand(len(told), -1),
            )
            shown_MCD = candidates_UCD[user].expand(len(told), -1, -1)
            out_UCT[user, :, told - start] = (whole_UC[user] - self._score(self.extend(many, without), shown_MCD)).T
        return out_UCT
