"""People as boxes: a taste is a region of the item space, and its width says how broad the taste is (hypercuboids).

    v_1 .. v_T, age, weight ─▶ two-way LSTM ─▶ h ─▶ K attentions ─▶ centres c_k = sum of v + W sum of h
                                                              └───▶ key-value memory ─▶ offsets f_k >= 0
    distance = outside + gamma inside, the least over cuboids;  logit = bias - scale distance

        outside = || max(v - hi, 0) + max(lo - v, 0) ||,  inside = || c - min(hi, max(lo, v)) ||,  hi, lo = c +- f

Zhang et al. 2021 (WSDM; arXiv 2011.05742); its body was not available. The distance is that of the released code of its
follow-up CubeRec (Chen et al. 2022), with gamma 0.5. From the abstract and summaries: concentric cuboids (several
offsets about one centre), several independent ones (the least distance), a sequence encoder of a two-way LSTM with
self-attention for the centres and a key-value memory for the offsets, hinge or Bayesian personalised ranking. Ours: an
item's point is the projection of its content features; the mean over concentric shells, each at least as wide as the
one within; the centre as a weighted mean of the items' own points plus a correction; the memory is asked with what the
attention found and with how far its items lie apart; age and the log of the weight are inputs beside the item, and the
log of the weight is added to the attention's logits (0 for a plain event); an empty history has learned cuboids, for
which a share of the histories of a batch is left out whole.

Letters: U users, C candidates of a user, T history length, N rows, D features, W width of the item space, K cuboids,
S shells, M memory slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge, JudgeConfig, ranking_loss
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.layers import centre_inputs
from couturier.components.interest.masking import with_strangers
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.together import mean_over

_TINY = 1e-12  # within the root, so that a distance of 0 has a gradient of 0
_NUMBERS = 3


@dataclass(frozen=True, kw_only=True)
class HypercuboidConfig(JudgeConfig):
    """Size, form and objective of the boxes."""

    bce: float = 0.0
    """Weight of binary cross-entropy beside the pairs; a distance has no level of its own, so none by default."""
    width: int = 32
    """W, of the item space."""
    cuboids: int = 2
    """K, independent boxes of a user; the nearest counts."""
    shells: int = 1
    """S, concentric offsets of a box."""
    gamma: float = 0.5
    """What distance from the centre counts within the box; less than 1."""
    points: bool = False
    """Whether the boxes have no width at all: then a distance is the plain one from the centre (metric learning)."""
    memory: int = 16
    """M, slots of the key-value memory of offsets."""
    length: int = 50
    """The newest history items that are read; older ones count for nothing."""
    objective: Literal["bpr", "hinge"] = "bpr"
    """Bayesian personalised ranking, or a hinge with a margin."""
    margin: float = 1.0
    """Of the hinge, in units of distance."""
    strangers: float = 0.03
    """Share of histories left out whole, from which the default boxes are learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma >= 1 or self.strangers >= 1:
            raise ConfigError(
                f"HypercuboidConfig.gamma is {self.gamma} and strangers {self.strangers}; wanted less than 1."
            )
        if self.objective not in ("bpr", "hinge"):
            raise ConfigError(f"HypercuboidConfig.objective is {self.objective!r}; choose bpr or hinge.")


@dataclass(frozen=True, kw_only=True)
class HypercuboidState:
    """A user's boxes: centres, and of each shell the half widths, growing outwards."""

    centre_UKW: Tensor
    offset_UKSW: Tensor

    def __len__(self) -> int:
        return len(self.centre_UKW)


class HypercuboidJudge(ContentJudge):
    """The judge ``hypercuboid``; see the module."""

    Config = HypercuboidConfig
    name = "hypercuboid"

    def __init__(self, config: HypercuboidConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        w, k, s = config.width, config.cuboids, config.shells
        self.item = nn.Linear(self.width, w)
        self.reader = nn.LSTM(w + _NUMBERS, w, batch_first=True, bidirectional=True)
        self.attend = nn.Sequential(nn.Linear(2 * w, w), nn.Tanh(), nn.Linear(w, k, bias=False))
        self.correct = nn.Linear(2 * w, w)
        self.ask = nn.Linear(3 * w, w)
        self.memory_key = nn.Parameter(torch.randn(config.memory, w) * w**-0.5)
        self.memory_value = nn.Parameter(torch.rand(config.memory, s, w) * 0.5)
        self.nothing_centre = nn.Parameter(torch.randn(k, w) * 0.1)
        self.nothing_offset = nn.Parameter(torch.rand(k, s, w) * 0.5)
        self.scale = nn.Parameter(torch.zeros(()))
        self.level = nn.Parameter(torch.zeros(()))
        centre_inputs(self.item, content.pictures_IP)
        with torch.no_grad():
            nn.init.zeros_(self.correct.weight)
            nn.init.zeros_(self.correct.bias)

    def _encode(self, history: HistoryBatch) -> HypercuboidState:
        read = history.newest(self.config.length)
        if not len(read.features_ND):
            return self._default(len(history))
        points_UTW = read.pad(self.item(read.features_ND))
        real_UT, lengths_U = read.real_UT(), read.lengths
        age_N, amount_N = read.age_days_N.clamp_min(0), read.weight_N.clamp_min(1e-2).log()
        numbers_NX = torch.stack([age_N.log1p() / 4, (-age_N / 30).exp(), amount_N], dim=-1)
        packed = nn.utils.rnn.pack_padded_sequence(
            torch.cat([points_UTW, read.pad(numbers_NX)], dim=-1),
            lengths_U.clamp_min(1).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        hidden_UTZ, _ = nn.utils.rnn.pad_packed_sequence(self.reader(packed)[0], batch_first=True)
        match_UTK = self.attend(hidden_UTZ) + read.pad(amount_N)[..., None]
        weight_UKT = match_UTK.masked_fill(~real_UT[..., None], -1e30).softmax(1).transpose(1, 2)
        centre_UKW, offset_UKSW = self._boxes(weight_UKT, points_UTW, hidden_UTZ)
        default, some_U111 = self._default(len(history)), (lengths_U > 0)[:, None, None, None]
        return HypercuboidState(
            centre_UKW=torch.where(some_U111[..., 0], centre_UKW, default.centre_UKW),
            offset_UKSW=torch.where(some_U111, offset_UKSW, default.offset_UKSW),
        )

    def _boxes(self, weight_UKT: Tensor, points_UTW: Tensor, hidden_UTZ: Tensor) -> tuple[Tensor, Tensor]:
        """Centres ``[U, K, W]`` and offsets ``[U, K, S, W]`` of what each attention found."""
        found_UKZ, mean_UKW = weight_UKT @ hidden_UTZ, weight_UKT @ points_UTW
        spread_UKW = ((weight_UKT @ points_UTW.square()) - mean_UKW.square()).clamp_min(1e-6).sqrt()
        asked_UKW = self.ask(torch.cat([found_UKZ, spread_UKW], dim=-1))
        slot_UKM = (asked_UKW @ self.memory_key.T).softmax(-1)
        raw_UKSW = torch.einsum("ukm,msw->uksw", slot_UKM, self.memory_value)
        return mean_UKW + self.correct(found_UKZ), self._widths(raw_UKSW)

    def _widths(self, raw_XSW: Tensor) -> Tensor:
        """Half widths from the memory's values: none below 0, each shell around the one before."""
        return torch.zeros_like(raw_XSW) if self.config.points else raw_XSW.relu().cumsum(-2)

    def _default(self, users: int) -> HypercuboidState:
        return HypercuboidState(
            centre_UKW=self.nothing_centre.expand(users, -1, -1),
            offset_UKSW=self._widths(self.nothing_offset).expand(users, -1, -1, -1),
        )

    def _score(self, state: HypercuboidState, candidates_UCD: Tensor) -> Tensor:
        return self.level - self.scale.exp() * self.distances(state, candidates_UCD)

    def distances(self, state: HypercuboidState, candidates_UCD: Tensor) -> Tensor:
        """Distance of each candidate from its user's nearest box, ``[U, C]``."""
        points_UC1W = self.item(candidates_UCD)[:, :, None]
        nearest_UC: Tensor | None = None
        for box in range(self.config.cuboids):
            centre_U1W, offset_USW = state.centre_UKW[:, box, None], state.offset_UKSW[:, box]
            found_UCS = box_distance(points_UC1W, centre_U1W[:, None], offset_USW[:, None], gamma=self.config.gamma)
            mean_UC = found_UCS.mean(-1)
            nearest_UC = mean_UC if nearest_UC is None else torch.minimum(nearest_UC, mean_UC)
        assert nearest_UC is not None
        return nearest_UC

    @torch.no_grad()
    def breadth(self, history: HistoryBatch) -> Tensor:
        """How broad each user's taste is, ``[U]``: the outermost half width, a mean over axes and boxes, in units of
        the spread of the catalogue's points along an axis. 1 is as broad as the catalogue."""
        state = self.encode(history)
        spread_W = self.item(self.embed_items()).std(0).clamp_min(1e-6)
        return (state.offset_UKSW[:, :, -1] / spread_W).mean((1, 2))

    def loss(self, batch: TrainBatch, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """BPR over (taken, not taken) pairs, or a hinge over their distances."""
        config = self.config
        history = with_strangers(batch.history, config.strangers, noise) if config.strangers else batch.history
        state = self._encode(history)
        if config.objective == "bpr":
            return ranking_loss(self._score(state, batch.candidates_UCD), batch, config.bce)
        distance_UC = self.distances(state, batch.candidates_UCD)
        good_UP, bad_UN = distance_UC[:, : batch.positives], distance_UC[:, batch.positives :]
        real_UN = batch.real_UC[:, batch.positives :]
        pairs = (config.margin + good_UP[:, :, None] - bad_UN[:, None]).relu() * real_UN[:, None]
        loss = mean_over(pairs.sum(), real_UN.sum() * batch.positives)
        return loss, {"hinge": loss.detach()}

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


def box_distance(points_XW: Tensor, centre_XW: Tensor, offset_XW: Tensor, *, gamma: float) -> Tensor:
    """``outside + gamma inside`` of points and a box ``centre +- offset``, ``[X]``; leading axes broadcast.

    Outside is the distance to the box (0 in it), inside the distance from the centre of the box's point nearest to it.
    Both change by no more than the point moves.

    Example:
        >>> square = torch.ones(2)
        >>> round(box_distance(torch.tensor([4.0, 0.0]), torch.zeros(2), square, gamma=0.5).item(), 4)
        3.5
    """
    away_XW = points_XW - centre_XW
    within_XW = torch.minimum(torch.maximum(away_XW, -offset_XW), offset_XW)
    outside_X = ((away_XW - within_XW).square().sum(-1) + _TINY).sqrt() - _TINY**0.5
    inside_X = (within_XW.square().sum(-1) + _TINY).sqrt() - _TINY**0.5
    return outside_X + gamma * inside_X
