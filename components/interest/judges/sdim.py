"""Long histories at the price of short ones: a hash table a user for all they did, attention for what they did last.

    all behaviours ─▶ e_j ─▶ signatures ─▶ table [G, 2^b, W] ─▶ the candidate's buckets ─▶ long ──┐
    newest S       ─▶ e_j ─▶ keys, values ──▶ attention of the candidate ────────────────▶ short ─┼▶ head ─▶ logit
    candidate      ─▶ e ──────────────────────────────────────────────────────────────────────────┘

Cao et al. 2022, "Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction" (arXiv 2205.10249):
behaviours that share the candidate's random signature are summed and normalised, and the mean over groups of
signatures is attention with a kernel that is the sharper the more bits there are. The state is the paper's serving
split: the table and the newest S behaviours, of one size whatever the length of the history; ``update`` adds what
happened since without reading the rest. The body of the paper was unavailable; formula and sizes follow a translation
and the LongCTR code.

Ours: items are a projection of their content features; a behaviour of weight w is w times in its bucket and has log w
added to its attention score; attention over the newest has one learned row, so that an empty history has an answer; the
head sees the products with the candidate beside what it multiplies.

Letters: U users, C candidates of a user, T longest history, N history rows, S newest ones kept, R rows of candidates,
W width, A heads, E width of a head, G groups, b bits, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.base import ContentJudge, JudgeConfig
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.layers import centre_inputs, mlp
from couturier.components.interest.types import HistoryBatch
from couturier.kernels.hash_sampling import append, bucket_table, lookup, random_planes, signatures

_PAIRS = 1 << 21  # (candidate, newest behaviour) pairs scored at a time
_EXPLAINED = 1 << 22  # numbers held at a time when explaining
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True, kw_only=True)
class SdimConfig(JudgeConfig):
    """Size of the judge. A state is ``groups 2^bits + short`` vectors of ``width`` numbers."""

    width: int = 32
    """W."""
    groups: int = 16
    """G, signatures of every vector; 16 of 3 bits are the 48 hashes the paper runs online."""
    bits: int = 3
    """b: a behaviour at angle theta shares a signature with chance (1 - theta / pi)^b."""
    short: int = 50
    """S, the newest behaviours that attention reads."""
    heads: int = 4
    """A, of that attention."""
    hidden: int = 80
    """First hidden layer of the head."""
    hidden_2: int = 40
    """Its second."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(f"SdimConfig.width is {self.width}; it must be a multiple of heads ({self.heads}).")
        if self.bits > 16:
            raise ConfigError(f"SdimConfig.bits is {self.bits}; at most 16, or a table has more buckets than events.")


@dataclass(frozen=True, kw_only=True)
class SdimState:
    """What is kept of a user, whatever the length of the history. The newest behaviour stands at place S - 1."""

    table: Tensor
    """``[U, G, 2^b, W]``, sums that are not yet normalised, so that more can be added."""
    short_USW: Tensor
    weight_US: Tensor
    real_US: Tensor

    def __len__(self) -> int:
        return len(self.table)


class SdimJudge(ContentJudge):
    """The judge ``sdim``; see the module."""

    Config = SdimConfig
    name = "sdim"

    def __init__(self, config: SdimConfig, features: FeatureConfig, content: Content) -> None:
        super().__init__(config, features, content)
        self.config = config
        w = config.width
        self.embedding = nn.Linear(self.width, w)
        nn.init.normal_(self.embedding.weight)
        nn.init.zeros_(self.embedding.bias)
        # Angles are those between differences from the mean: without it all behaviours would share their signatures.
        centre_inputs(self.embedding, content.pictures_IP)
        self.planes: Tensor
        self.register_buffer("planes", random_planes(w, groups=config.groups, bits=config.bits))
        self.query, self.key_value = nn.Linear(w, w), nn.Linear(w, 2 * w)
        self.nothing = nn.Parameter(0.1 * torch.randn(w))
        self.head = mlp([5 * w, config.hidden, config.hidden_2, 1], lambda width: nn.GELU())

    def _encode(self, history: HistoryBatch) -> SdimState:
        rows_NW, weight_N = self._embedded(history.features_ND), history.weight_N.clamp_min(0)
        table = bucket_table(rows_NW, history.offsets, self.planes, values=rows_NW * weight_N[:, None])
        short_USW, weight_US, real_US = self._newest(history, rows_NW)
        return SdimState(table=table, short_USW=short_USW, weight_US=weight_US, real_US=real_US)

    def _embedded(self, features_XD: Tensor) -> Tensor:
        """In full width even in mixed precision: a signature must be the same in training and in serving."""
        with torch.autocast(features_XD.device.type, enabled=False):
            rows_XW: Tensor = self.embedding(features_XD.float())
        return rows_XW

    def _newest(self, history: HistoryBatch, rows_NW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The newest S rows of each user, their weights, and where there is one; the newest stands last."""
        users, short = len(history), self.config.short
        order_N = torch.arange(len(rows_NW), device=rows_NW.device)
        if not history.in_time_order:
            by_age = history.age_days_N.argsort(descending=True, stable=True)
            order_N = by_age[history.users_N[by_age].argsort(stable=True)]
        back_N = history.offsets[1:][history.users_N] - 1 - torch.arange(len(rows_NW), device=rows_NW.device)
        kept_N = back_N < short
        place = (history.users_N * short + short - 1 - back_N)[kept_N]
        rows = order_N[kept_N]
        short_XW = rows_NW.new_zeros(users * short, rows_NW.shape[1]).index_copy(0, place, rows_NW[rows])
        weight_X = history.weight_N.new_zeros(users * short).index_copy(0, place, history.weight_N[rows])
        real_X = torch.zeros(users * short, dtype=torch.bool, device=rows_NW.device)
        real_X[place] = True
        return short_XW.view(users, short, rows_NW.shape[1]), weight_X.view(users, short), real_X.view(users, short)

    def update(self, state: SdimState, more: HistoryBatch) -> SdimState:
        """The state after further behaviours, newer than all before; the rest of the history is not read again.

        Equal to encoding the whole history anew, up to the order in which floats are added.

        Raises:
            DataError: other users, shapes that do not agree or values that are not finite.
        """
        more.check(self.width)
        if len(more) != len(state):
            raise DataError(f"the state is of {len(state)} users and the further behaviours of {len(more)}.")
        rows_NW, weight_N = self._embedded(more.features_ND), more.weight_N.clamp_min(0)
        table = append(state.table, rows_NW, more.offsets, self.planes, values=rows_NW * weight_N[:, None])
        short_USW, weight_US, real_US = self._newest(more, rows_NW)
        real_UX = torch.cat([state.real_US, real_US], dim=1)
        # Empty places first, real ones in their order, of which the last S are kept.
        order_US = real_UX.long().argsort(dim=1, stable=True)[:, -self.config.short :]
        rows_UXW = torch.cat([state.short_USW, short_USW], dim=1)
        return SdimState(
            table=table,
            short_USW=rows_UXW.gather(1, order_US[..., None].expand(-1, -1, rows_UXW.shape[2])),
            weight_US=torch.cat([state.weight_US, weight_US], dim=1).gather(1, order_US),
            real_US=real_UX.gather(1, order_US),
        )

    def _score(self, state: SdimState, candidates_UCD: Tensor) -> Tensor:
        users, count = candidates_UCD.shape[:2]
        step = max(1, _PAIRS // max(1, users * self.config.short))
        if not torch.is_grad_enabled() and step < count:
            return torch.cat([self._score(state, part) for part in candidates_UCD.split(step, dim=1)], dim=1)
        query_UCW = self._embedded(candidates_UCD)
        row_user = torch.arange(users, device=query_UCW.device).repeat_interleave(count)
        long_UCW = lookup(state.table, query_UCW.flatten(0, 1), self.planes, row_user=row_user).view_as(query_UCW)
        short_UCW = self._attended(query_UCW, state.short_USW, state.weight_US, state.real_US)
        return self._logit(query_UCW, long_UCW, short_UCW)

    def _attended(self, query_UCW: Tensor, rows_UTW: Tensor, weight_UT: Tensor, real_UT: Tensor) -> Tensor:
        """Multi-head attention of candidates over the newest behaviours and the learned row, ``[U, C, W]``."""
        users, heads = len(rows_UTW), self.config.heads
        rows_UTW = torch.cat([self.nothing.expand(users, 1, -1), rows_UTW], dim=1)
        bias_UT = weight_UT.clamp_min(_LEAST_WEIGHT).log().masked_fill(~real_UT, -torch.inf)
        bias_U11T = F.pad(bias_UT, (1, 0))[:, None, None]
        query, key, value = (
            x.unflatten(-1, (heads, -1)).transpose(1, 2)
            for x in (self.query(query_UCW), *self.key_value(rows_UTW).chunk(2, -1))
        )
        found_UACE = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_U11T.to(query.dtype))
        return found_UACE.transpose(1, 2).flatten(2)

    def _logit(self, query_XW: Tensor, long_XW: Tensor, short_XW: Tensor) -> Tensor:
        """From the candidate and what it found; any leading axes. Entries of ``long`` are made about as large."""
        long_XW = long_XW * self.config.width**0.5
        found = [query_XW, long_XW, short_XW, long_XW * query_XW, short_XW * query_XW]
        out: Tensor = self.head(torch.cat(found, dim=-1))
        return out[..., 0]

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """Contributions ``[U, C, T]``: the logit minus the logit without that history item; 0 where padded.

        Exact: an item leaves its buckets, and when it is among the newest S the next older one takes its place. The
        cost grows with T, not with its square.
        """
        history.check(self.width)
        real_UT = history.real_UT()
        out_UCT = candidates_UCD.new_zeros(*candidates_UCD.shape[:2], real_UT.shape[1])
        rows_NW, query_UCW = self._embedded(history.features_ND), self._embedded(candidates_UCD)
        state = self.encode(history)
        whole_UC = self.score(state, candidates_UCD)
        for user in range(len(history)):
            begin, end = history.offsets[user : user + 2].tolist()
            own = history.rows(torch.arange(begin, end), torch.tensor([0, end - begin]))
            without_CT = self._without(own, rows_NW[begin:end], query_UCW[user], state.table[user])
            out_UCT[user, :, : end - begin] = whole_UC[user, :, None] - without_CT
        return out_UCT

    def _without(self, own: HistoryBatch, rows_TW: Tensor, query_CW: Tensor, table: Tensor) -> Tensor:
        """Logits ``[C, T]`` of one user without each of their items; ``table`` is ``[G, 2^b, W]``."""
        (length, w), count, groups = rows_TW.shape, len(query_CW), self.config.groups
        short_CTW = self._short_without(own, rows_TW, query_CW)
        sign_TG, sign_CG = signatures(rows_TW, self.planes), signatures(query_CW, self.planes)
        sums_CGW = table[torch.arange(groups, device=table.device), sign_CG]
        found_CGW = F.normalize(sums_CGW, dim=-1)
        values_TW = rows_TW * own.weight_N.clamp_min(0)[:, None]
        out_CT, step = query_CW.new_zeros(count, length), max(1, _EXPLAINED // max(1, count * groups * w))
        for start in range(0, length, step):
            part = slice(start, start + step)
            meets_CTG = sign_CG[:, None] == sign_TG[part]
            rest_CTGW = sums_CGW[:, None] - values_TW[part][None, :, None]
            # What an item leaves of a bucket that it had for itself is rounding, not a direction.
            noise_CTG = rest_CTGW.square().sum(-1) < 1e-10 * values_TW[part].square().sum(-1)[None, :, None]
            rest_CTGW = F.normalize(rest_CTGW.masked_fill(noise_CTG[..., None], 0.0), dim=-1)
            long_CTGW = torch.where(meets_CTG[..., None], rest_CTGW, found_CGW[:, None])
            shown_CTW = query_CW[:, None].expand(-1, long_CTGW.shape[1], -1)
            out_CT[:, part] = self._logit(shown_CTW, long_CTGW.mean(2), short_CTW[:, part])
        return out_CT

    def _short_without(self, own: HistoryBatch, rows_TW: Tensor, query_CW: Tensor) -> Tensor:
        """What attention over the newest finds without each of one user's items, ``[C, T, W]``."""
        length, short = len(rows_TW), self.config.short
        order_T = torch.arange(length) if own.in_time_order else own.age_days_N.argsort(descending=True, stable=True)
        near = order_T[-short - 1 :].to(rows_TW.device)  # the newest, and the one that would take a place
        all_ = torch.arange(len(near), device=near.device)
        # Row 0 leaves nothing out; row k + 1 leaves out the k-th of the newest.
        kept_KT = all_ != (torch.arange(len(near) + 1, device=near.device) - 1)[:, None]
        if length > short:
            kept_KT[0, 0] = False
        query_KCW = query_CW.expand(len(kept_KT), -1, -1)
        weight_KT, rows_KTW = own.weight_N[near].expand(kept_KT.shape), rows_TW[near].expand(len(kept_KT), -1, -1)
        found_KCW = self._attended(query_KCW, rows_KTW, weight_KT, kept_KT)
        out_CTW = found_KCW[0][:, None].expand(-1, length, -1).clone()
        out_CTW[:, near] = found_KCW[1:].transpose(0, 1)
        return out_CTW
