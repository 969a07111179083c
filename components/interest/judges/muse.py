"""MUSE: search a long history by content, then read what was found by identity and content together.

    candidate ─▶ content cosine with every behaviour ─▶ the nearest K ─┬▶ SA-TA ─▶ interest ┐
                                                                       └▶ SimTier           ├▶ network ─▶ logit
    newest behaviours ─▶ dot attention, mean, SimTier ─────────────────────────────────────┘

Wu et al. 2025 (arXiv 2512.07216). Search: the K largest cosines of frozen content vectors, no gradient. SA-TA:
``b1 dot + b2 r + b3 dot r`` with ``dot = q.k`` and ``r = cosine / tau``, softmax over the K, sum of ``v``; q, k and v
are ``silu(linear)``. SimTier: ``components.interest.tiers``. The formulas are those of the released code; the paper's
body was not read. The released code has two outputs and a softmax, which is one logit.

Ours: where the paper looks up an id (and a category), the item's features are projected, the gated identity among them,
so an item that was never met is read by its content; the content vector is the picture part around its mean (the paper
pre-trains one on purchases); a behaviour counts ``Amount`` times, in tiers, means and softmaxes alike; the released
code's ``dot`` is not scaled, and nor is this, but biases start at the paper's 1; a flag tells an empty history.

Letters: U users, C candidates of a user, T history length, K found, P picture width, E item width, S = 2 E SA-TA width,
B tiers, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge, JudgeConfig, ranking_loss
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.layers import Dice, mlp
from couturier.components.interest.tiers import Amount, Looks, SimTier, attention_weights, tier, tier_sums, tiers_in
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.kernels.topk_search import topk_search

_MOST = 1 << 22  # numbers gathered at a time in the exact stage


@dataclass(frozen=True, kw_only=True)
class MuseConfig(JudgeConfig):
    """Sizes of MUSE; the defaults are those of the released code, with a smaller network on top."""

    width: int = 16
    """E, the width of an item; SA-TA is twice as wide."""
    top: int = 50
    """K, how many behaviours a search finds."""
    recent: int = 50
    """How many of the newest behaviours are read without a search."""
    temperature: float = 0.1
    """tau that SA-TA's cosine is divided by, at first; learned."""
    step: float = 0.1
    """Width of a tier of SimTier; 22 tiers for 0.1."""
    hidden: tuple[int, ...] = (64, 32)
    """Widths of the network on top (released: 256, 128, 64)."""
    auxiliary: float = 0.0
    """Weight of a second loss on what the search found alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0 or not 0 < self.step <= 1 or not self.hidden or min(self.hidden) < 1:
            raise ConfigError(
                f"MuseConfig has temperature {self.temperature}, step {self.step} and hidden {self.hidden}; wanted a "
                "temperature above 0, a step between 0 and 1, and widths of at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class Behaviours:
    """Behaviours of users, padded: all there is to find, or the newest."""

    looks_UTP: Tensor
    keys_UTS: Tensor
    rows_UTX: Tensor
    """SA-TA's values and the item, side by side: S + E."""
    amount_UT: Tensor


@dataclass(frozen=True, kw_only=True)
class Searched:
    """Behaviours of users, one after another from oldest to newest, to be searched."""

    looks_NP: Tensor
    keys_NS: Tensor
    rows_NX: Tensor
    amount_N: Tensor
    offsets: Tensor


@dataclass(frozen=True, kw_only=True)
class MuseState:
    """What the judge keeps of its users: all behaviours, and the newest (the same object if that is all)."""

    whole: Behaviours | Searched
    newest: Behaviours
    empty_U: Tensor

    def __len__(self) -> int:
        return len(self.empty_U)


class MuseJudge(ContentJudge):
    """The judge ``muse``; see the module."""

    Config = MuseConfig
    name = "muse"

    def __init__(self, config: MuseConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        e, s = config.width, 2 * config.width
        tiers = tiers_in(config.step)
        self.looks, self.amount = Looks(content), Amount()
        self.item = nn.Linear(self.width, e)
        self.query, self.key, self.value = nn.Linear(e, s), nn.Linear(e, s), nn.Linear(e, s)
        self.mix_3 = nn.Parameter(torch.ones(3))
        self.log_temperature = nn.Parameter(torch.tensor(config.temperature).log())
        self.tiers_found, self.tiers_newest = SimTier(tiers), SimTier(tiers)
        found = s + e + tiers
        self.head = mlp([found + 2 * e + tiers + e + 1, *config.hidden, 1], Dice)
        self.found_head = mlp([found + e, config.hidden[-1], 1], Dice) if config.auxiliary else None

    def _encode(self, history: HistoryBatch) -> MuseState:
        longest = int(history.lengths.max()) if len(history) else 0
        empty_U = (history.lengths == 0).float()
        if longest <= self.config.top:
            whole = self._padded(history)
            shown = whole if longest <= self.config.recent else self._padded(history.newest(self.config.recent))
            return MuseState(whole=whole, newest=shown, empty_U=empty_U)
        history = history.oldest_first()
        looks_NP, keys_NS, rows_NX, amount_N = self._rows(history)
        long = Searched(looks_NP=looks_NP, keys_NS=keys_NS, rows_NX=rows_NX, amount_N=amount_N, offsets=history.offsets)
        return MuseState(whole=long, newest=self._padded(history.newest(self.config.recent)), empty_U=empty_U)

    def _rows(self, history: HistoryBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Looks, keys, values beside items, and amounts of a history's rows."""
        item_NE = self.item(history.features_ND)
        values_NX = torch.cat([F.silu(self.value(item_NE)), item_NE], dim=-1)
        return self.looks(history.features_ND), F.silu(self.key(item_NE)), values_NX, self.amount(history)

    def _padded(self, history: HistoryBatch) -> Behaviours:
        looks_UTP, keys_UTS, rows_UTX, amount_UT = (history.pad(rows) for rows in self._rows(history))
        return Behaviours(looks_UTP=looks_UTP, keys_UTS=keys_UTS, rows_UTX=rows_UTX, amount_UT=amount_UT)

    def _score(self, state: MuseState, candidates_UCD: Tensor) -> Tensor:
        return self._logits(state, candidates_UCD)[0]

    def score_all(self, state: MuseState, items_ID: Tensor) -> Tensor:
        """Logits ``[U, I]`` of the same candidates for every user, some of them at a time."""
        step = max(1, _MOST // (256 * max(1, len(state))))
        parts = [self._score(state, part.expand(len(state), -1, -1)) for part in items_ID.split(step)]
        return torch.cat(parts, dim=1) if parts else items_ID.new_zeros(len(state), 0)

    def loss(self, batch: TrainBatch, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The ranking loss, and with ``auxiliary`` that of what the search found alone."""
        logits_UC, found_UC = self._logits(self._encode(batch.history), batch.candidates_UCD)
        loss, parts = ranking_loss(logits_UC, batch, self.config.bce)
        if found_UC is None:
            return loss, parts
        extra, _ = ranking_loss(found_UC, batch, self.config.bce)
        return loss + self.config.auxiliary * extra, parts | {"auxiliary": extra.detach()}

    def _logits(self, state: MuseState, candidates_UCD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits, and those of the auxiliary head where there is one."""
        item_UCE, looks_UCP = self.item(candidates_UCD), self.looks(candidates_UCD)
        found_UCX, counts_UCB = self._found(state.whole, item_UCE, looks_UCP)
        # What was found in a short history is all of it, and so are the newest: their tiers are counted once.
        same = state.newest is state.whole
        newest_UCX = self._newest(state.newest, item_UCE, looks_UCP, counts_UCB if same else None)
        empty_UC1 = state.empty_U[:, None, None].expand(*item_UCE.shape[:2], 1)
        logits_UC = self.head(torch.cat([found_UCX, newest_UCX, item_UCE, empty_UC1], dim=-1))[..., 0]
        if self.found_head is None:
            return logits_UC, None
        return logits_UC, self.found_head(torch.cat([found_UCX, item_UCE], dim=-1))[..., 0]

    def _newest(self, newest: Behaviours, item_UCE: Tensor, looks_UCP: Tensor, counts_UCB: Tensor | None) -> Tensor:
        """Dot attention over the newest behaviours, their mean, and their tiers: ``[U, C, 2 E + B]``."""
        e, amount_U1T = self.config.width, newest.amount_UT[:, None]
        items_UTE = newest.rows_UTX[..., -e:]
        dot_UCT = (item_UCE / e**0.5) @ items_UTE.transpose(1, 2)
        read_UCE = attention_weights(dot_UCT, amount_U1T) @ items_UTE
        mean_U1E = _shares(amount_U1T) @ items_UTE
        if counts_UCB is None:
            counts_UCB = self._counts(looks_UCP @ newest.looks_UTP.transpose(1, 2), amount_U1T)
        return torch.cat([read_UCE, mean_U1E.expand_as(read_UCE), self.tiers_newest(counts_UCB)], dim=-1)

    def _found(self, whole: Behaviours | Searched, item_UCE: Tensor, looks_UCP: Tensor) -> tuple[Tensor, Tensor]:
        """SA-TA over what a search finds, its mean and its tiers ``[U, C, S + E + B]``, and how many are in each."""
        query_UCS = F.silu(self.query(item_UCE))
        if isinstance(whole, Behaviours):
            # Everything would be found, so nothing is searched or gathered.
            cosine_UCT = looks_UCP @ whole.looks_UTP.transpose(1, 2)
            dot_UCT = query_UCS @ whole.keys_UTS.transpose(1, 2)
            return self._read(cosine_UCT, dot_UCT, whole.rows_UTX, whole.amount_UT[:, None])
        step = max(1, _MOST // (len(item_UCE) * self.config.top * 5 * self.config.width))
        parts = []
        for looks, query in zip(looks_UCP.split(step, dim=1), query_UCS.split(step, dim=1), strict=True):
            index_UCK, cosine_UCK = self.search(whole, looks, self.config.top)
            there_UCK, at = index_UCK >= 0, index_UCK.clamp_min(0)
            dot_UCK = (whole.keys_NS[at] @ query[..., None])[..., 0]
            amount_UCK = whole.amount_N[at] * there_UCK
            parts.append(self._read(cosine_UCK.clamp_min(-1), dot_UCK, whole.rows_NX[at], amount_UCK))
        found_UCX, counts_UCB = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
        return found_UCX, counts_UCB

    @torch.no_grad()
    def search(self, whole: Searched, looks_UCP: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """The ``top`` nearest behaviours of each candidate: rows (-1 for none) and cosines, both ``[U, C, K]``.

        What counts for nothing is not found; of equal cosines the newest comes first.
        """
        hidden_N = torch.zeros_like(whole.amount_N).masked_fill(whole.amount_N <= 0, -torch.inf)
        return topk_search(looks_UCP, whole.looks_NP, whole.offsets, top, bias=hidden_N)

    def _counts(self, cosine_UCT: Tensor, amount: Tensor) -> Tensor:
        return tier_sums(tier(cosine_UCT, self.config.step), amount, self.tiers_found.tiers)

    def _read(self, cosine_UCK: Tensor, dot_UCK: Tensor, rows: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
        """As ``_found``; ``rows`` is ``[U, K, S + E]`` or ``[U, C, K, S + E]``."""
        s = 2 * self.config.width
        interest_UCS = _pooled(attention_weights(self.sata(dot_UCK, cosine_UCK), amount), rows[..., :s])
        mean_UCE = _pooled(_shares(amount), rows[..., s:]).expand(*interest_UCS.shape[:2], -1)
        counts_UCB = self._counts(cosine_UCK, amount)
        return torch.cat([interest_UCS, mean_UCE, self.tiers_found(counts_UCB)], dim=-1), counts_UCB

    def sata(self, dot_UCK: Tensor, cosine_UCK: Tensor) -> Tensor:
        """SA-TA's logits: ``b1 dot + b2 r + b3 dot r``, ``r = cosine / tau``."""
        near_UCK = cosine_UCK / self.log_temperature.exp()
        return self.mix_3[0] * dot_UCK + near_UCK * (self.mix_3[1] + self.mix_3[2] * dot_UCK)

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        Only what is read can matter: the newest and the found, and the one behind each that would take a place that
        falls free. The history is cut to those before it is read again without each, so the answer is exact and a long
        history costs little more than a short one.
        """
        history.check(self.width)
        longest = int(history.lengths.max()) if len(history) else 0
        if longest <= self.config.top + self.config.recent or not candidates_UCD.shape[1]:
            return super().explain(history, candidates_UCD)
        ordered = replace(
            history, items_N=torch.arange(len(history.features_ND), device=history.offsets.device)
        ).oldest_first()
        whole, was_N = self._encode(ordered).whole, ordered.items_N
        assert isinstance(whole, Searched) and was_N is not None
        found, _ = self.search(whole, self.looks(candidates_UCD), self.config.top + 1)
        newest = (
            replace(ordered, items_N=torch.arange(len(was_N), device=was_N.device))
            .newest(self.config.recent + 1)
            .items_N
        )
        assert newest is not None
        kept_N = torch.zeros_like(was_N, dtype=torch.bool)
        kept_N[torch.cat([found[found >= 0], newest])] = True
        offsets = torch.cat([kept_N.new_zeros(1, dtype=torch.int64), kept_N.cumsum(0)])[ordered.offsets]
        read = ordered.rows(kept_N.nonzero()[:, 0], offsets)
        parts_MC = super().explain(read, candidates_UCD).transpose(1, 2)[read.real_UT()]
        out_NC = parts_MC.new_zeros(len(was_N), parts_MC.shape[1])
        out_NC[was_N[kept_N]] = parts_MC
        return history.pad(out_NC).transpose(1, 2)


def _shares(amount: Tensor) -> Tensor:
    """Amounts over the last axis as shares of their sum; all 0 if nothing counts."""
    return amount / amount.sum(-1, keepdim=True).clamp_min(1e-30)


def _pooled(weight_UCK: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[U, K, X]`` or ``[U, C, K, X]`` summed by weights -> ``[U, C, X]``."""
    return weight_UCK @ rows if rows.ndim == 3 else (weight_UCK[..., None, :] @ rows)[..., 0, :]
