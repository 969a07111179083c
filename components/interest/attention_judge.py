"""The first judge: target attention over the history, by content and by time.

After TIN (arXiv 2308.08487): behaviours and candidate carry a time embedding relative to the candidate's moment, the
attention is a dot product of the two, and each behaviour meets the candidate in an element-wise product

    weight_j = softmax_j( <k_j + p(t_j), q + p(0)> / sqrt(d) + b(t_j, w_j) )      over [nothing, behaviours]
    u        = sum_j weight_j (v_j + p(t_j)) * q

Ours, not the paper's: time enters as a smooth function of age and amount instead of a table of positions; the softmax
has one more entry, a learned "nothing fits", which carries the default state of a user without history and, through
the log of the softmax's sum, lets the *amount* of fitting history count as in DIN (arXiv 1706.06978); several heads;
a content embedding (picture and words) takes the place of ids.

Letters: U users, C candidates, T history length, N rows, D features, P picture and W word width, E inner width, H heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.encoder import EncoderConfig, TileEncoder, embedded, pictures_of, vocabulary_of, word_bags
from couturier.components.interest.types import HistoryBatch, check_finite


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of :class:`AttentionJudge`."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    word_width: int = 32
    """W, the width of a word vector."""
    words: int = 4096
    """The vocabulary's size at most."""
    width: int = 64
    """E, the inner width."""
    heads: int = 4
    hidden: int = 64
    """Units of the scoring layer."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"judge.width is {self.width} and judge.heads {self.heads}; the heads must divide it.")


@dataclass(frozen=True, kw_only=True)
class AttentionState:
    """A history, read once. ``key_UHTe`` and ``value_UHTe`` start with the entry "nothing fits"; ``bias_UHT`` is minus
    infinity where there is padding."""

    key_UHTe: Tensor
    value_UHTe: Tensor
    bias_UHT: Tensor

    def of(self, rows: Tensor) -> AttentionState:
        """The states of some users, in that order."""
        return AttentionState(
            key_UHTe=self.key_UHTe[rows], value_UHTe=self.value_UHTe[rows], bias_UHT=self.bias_UHT[rows]
        )


class AttentionJudge(nn.Module):
    """See the module's text. Fitted by ``fit.run``; loaded by ``judge.load_judge``.

    Args:
        config: sizes.
        items: how many items the catalogue has.
        vocabulary: the words it knows; an item's bag of words is a mean of their vectors.
        word_count: how many words the bags of the catalogue hold in all.
    """

    def __init__(self, config: AttentionConfig, *, items: int, vocabulary: Sequence[str], word_count: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = list(vocabulary)
        picture, inner = config.encoder.width, config.width
        self.tile = TileEncoder(config.encoder)
        self.word = nn.EmbeddingBag(max(1, len(self.vocabulary)), config.word_width, mode="mean")
        self.no_words = nn.Parameter(torch.zeros(config.word_width))
        self.register_buffer("item_picture_IP", torch.zeros(items, picture))
        self.register_buffer("item_words", torch.zeros(word_count, dtype=torch.int64))
        self.register_buffer("item_word_offsets", torch.zeros(items + 1, dtype=torch.int64))
        self.register_buffer("score_mean", torch.zeros(()))
        self.register_buffer("score_sd", torch.ones(()))
        self.to_query = nn.Linear(self.width, inner)
        self.to_key = nn.Linear(self.width, inner)
        self.to_value = nn.Linear(self.width, inner)
        self.time = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 2 * inner + config.heads))
        self.now = nn.Parameter(torch.zeros(inner))
        self.nothing_key = nn.Parameter(torch.zeros(config.heads, 1, inner // config.heads))
        self.nothing_value = nn.Parameter(torch.zeros(config.heads, 1, inner // config.heads))
        self.head = nn.Sequential(
            nn.Linear(2 * inner + 2 * config.heads, config.hidden), nn.GELU(), nn.Linear(config.hidden, 1)
        )
        nn.init.normal_(self.word.weight, std=0.5)

    item_picture_IP: Tensor
    item_words: Tensor
    item_word_offsets: Tensor
    score_mean: Tensor
    score_sd: Tensor

    @classmethod
    def for_catalogue(cls, config: AttentionConfig, catalogue: Catalogue) -> AttentionJudge:
        """An unfitted judge of one catalogue, its bags of words in place; weights from torch's global generator."""
        texts = item_texts(catalogue)
        vocabulary = vocabulary_of(texts, limit=config.words)
        words, offsets = word_bags(texts, vocabulary)
        judge = cls(config, items=len(catalogue), vocabulary=vocabulary, word_count=len(words))
        judge.item_words, judge.item_word_offsets = words, offsets
        return judge

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> AttentionJudge:
        """The judge that :meth:`settings` describes, weights not yet loaded."""
        config = dict(settings["config"])
        return cls(
            AttentionConfig(**{**config, "encoder": EncoderConfig(**config["encoder"])}),
            items=settings["items"],
            vocabulary=settings["vocabulary"],
            word_count=settings["word_count"],
        )

    def settings(self) -> dict[str, Any]:
        """What :meth:`from_settings` needs, as JSON values."""
        return {
            "config": dataclasses.asdict(self.config),
            "items": self.item_picture_IP.shape[0],
            "vocabulary": self.vocabulary,
            "word_count": self.item_words.numel(),
        }

    @property
    def width(self) -> int:
        return self.config.encoder.width + self.config.word_width

    def see_catalogue(self, catalogue: Catalogue) -> None:
        """Look at the catalogue's pictures and keep what the encoder saw."""
        self.item_picture_IP.copy_(embedded(self.tile, pictures_of(catalogue)))

    def features(self, picture_NP: Tensor, words_NW: Tensor | None = None) -> Tensor:
        """Picture embeddings and word vectors side by side, ``[N, D]``; without words, the learned vector for none."""
        words = self.no_words.expand(picture_NP.shape[0], -1) if words_NW is None else words_NW
        return torch.cat([picture_NP, words], dim=-1)

    def words_of_items(self, items_N: Tensor) -> Tensor:
        """Mean word vectors ``[N, W]`` of catalogue items; items without a known word get the vector for none."""
        starts = self.item_word_offsets[items_N]
        counts = self.item_word_offsets[items_N + 1] - starts
        offsets = F.pad(counts.cumsum(0), (1, 0))
        within = torch.arange(int(offsets[-1]), device=items_N.device) - offsets[:-1].repeat_interleave(counts)
        ids = self.item_words[starts.repeat_interleave(counts) + within]
        return torch.where((counts > 0)[:, None], self.word(ids, offsets[:-1]), self.no_words)

    def embed_pictures(self, rgb_N3HW: Tensor) -> Tensor:
        """Float pictures 0..1 ``[N, 3, H, W]`` -> ``[N, D]``.

        Raises:
            DataError: another shape, or a pixel that is no finite number.
        """
        if rgb_N3HW.ndim != 4 or rgb_N3HW.shape[1] != 3:
            raise DataError(f"pictures have shape {list(rgb_N3HW.shape)}; wanted [N, 3, H, W], floats from 0 to 1.")
        check_finite("a picture", rgb_N3HW)
        return self.features(self.tile(rgb_N3HW))

    def embed_items(self, *, words: bool = True) -> Tensor:
        if not words:
            return self.features(self.item_picture_IP)
        everything = torch.arange(self.item_picture_IP.shape[0], device=self.item_picture_IP.device)
        return self.features(self.item_picture_IP, self.words_of_items(everything))

    def encode(self, history: HistoryBatch) -> AttentionState:
        """Keys, values and time biases of every history item, after the entry "nothing fits".

        Raises:
            DataError: see :meth:`HistoryBatch.check`.
        """
        history.check(self.width)
        features_UTD, age_UT, weight_UT, real_UT = history.padded()
        users, longest = real_UT.shape
        clock_UT4 = _clock(age_UT, weight_UT)
        key_time, value_time, bias_UTH = self.time(clock_UT4).split(
            [self.config.width, self.config.width, self.config.heads], dim=-1
        )
        key_UTE = self.to_key(features_UTD) + key_time
        value_UTE = self.to_value(features_UTD) + value_time
        bias_UHT = bias_UTH.transpose(1, 2).masked_fill(~real_UT[:, None], -math.inf)

        def split(x_UTE: Tensor) -> Tensor:
            return x_UTE.view(users, longest, self.config.heads, -1).transpose(1, 2)

        return AttentionState(
            key_UHTe=torch.cat([self.nothing_key.expand(users, -1, -1, -1), split(key_UTE)], dim=2),
            value_UHTe=torch.cat([self.nothing_value.expand(users, -1, -1, -1), split(value_UTE)], dim=2),
            bias_UHT=F.pad(bias_UHT, (1, 0)),
        )

    def score(self, state: AttentionState, candidates_UCD: Tensor) -> Tensor:
        """Logits ``[U, C]``.

        Raises:
            DataError: features that are not finite, or of another shape.
        """
        query_UHCe = self._query(candidates_UCD, users=state.bias_UHT.shape[0])
        match_UHCT = self._match(state, query_UHCe)
        total_UHC = match_UHCT.logsumexp(-1)
        pooled_UHCe = (match_UHCT - total_UHC[..., None]).exp() @ state.value_UHTe
        return self._judge(pooled_UHCe, query_UHCe, total_UHC, match_UHCT[..., 0])

    @torch.no_grad()
    def explain(self, history: HistoryBatch, candidates_UCD: Tensor) -> Tensor:
        """``[U, C, T]``: how much lower the logit would be without each history item, exactly.

        Taking item j out of a softmax subtracts one term from its sum and one from its weighted mean, so no history is
        read twice. T is the longest history of the batch; padding gets 0.
        """
        state = self.encode(history)
        query_UHCe = self._query(candidates_UCD, users=len(history))
        match_UHCT = self._match(state, query_UHCe)
        total_UHC = match_UHCT.logsumexp(-1)
        weight_UHCT = (match_UHCT - total_UHC[..., None]).exp()
        pooled_UHCe = weight_UHCT @ state.value_UHTe
        nothing_UHC = match_UHCT[..., 0]
        whole_UC = self._judge(pooled_UHCe, query_UHCe, total_UHC, nothing_UHC)
        columns = []
        for j in range(1, match_UHCT.shape[-1]):
            share = weight_UHCT[..., j].clamp(max=1 - 1e-6)  # the entry "nothing fits" always keeps a share
            rest_UHCe = (pooled_UHCe - share[..., None] * state.value_UHTe[:, :, j, None]) / (1 - share)[..., None]
            total_without = torch.maximum(total_UHC + torch.log1p(-share), nothing_UHC)
            columns.append(whole_UC - self._judge(rest_UHCe, query_UHCe, total_without, nothing_UHC))
        empty = whole_UC.new_zeros(*whole_UC.shape, 0)
        return torch.stack(columns, dim=-1) if columns else empty

    def standardise(self, logits: Tensor) -> Tensor:
        return (logits - self.score_mean) / self.score_sd

    def _query(self, candidates_UCD: Tensor, *, users: int) -> Tensor:
        shape = candidates_UCD.shape
        if len(shape) != 3 or shape[0] != users or shape[2] != self.width:
            raise DataError(f"candidates have shape {list(shape)}; wanted [{users} users, candidates, {self.width}].")
        check_finite("candidate features", candidates_UCD)
        query = self.to_query(candidates_UCD) + self.now
        return query.view(shape[0], shape[1], self.config.heads, -1).transpose(1, 2)

    def _match(self, state: AttentionState, query_UHCe: Tensor) -> Tensor:
        scale = 1 / math.sqrt(query_UHCe.shape[-1])
        return (query_UHCe * scale) @ state.key_UHTe.transpose(-1, -2) + state.bias_UHT[:, :, None]

    def _judge(self, pooled_UHCe: Tensor, query_UHCe: Tensor, total_UHC: Tensor, nothing_UHC: Tensor) -> Tensor:
        """The logit from the pooled history, its product with the candidate, and how much of it fits."""
        found_UHC = total_UHC - nothing_UHC
        parts = [pooled_UHCe, pooled_UHCe * query_UHCe]
        flat = [part.transpose(1, 2).flatten(2) for part in parts]
        amounts = [found_UHC.transpose(1, 2), torch.exp(-found_UHC).transpose(1, 2)]
        return self.head(torch.cat([*flat, *amounts], dim=-1)).squeeze(-1)


def item_texts(catalogue: Catalogue) -> list[str]:
    """Title and text of every item, one string each."""
    frame = catalogue.items
    columns = [frame[name].fill_null("").to_list() for name in ("title", "text") if name in frame.columns]
    return [" ".join(parts) for parts in zip(*columns, strict=True)] if columns else [""] * len(catalogue)


def _clock(age_days_UT: Tensor, weight_UT: Tensor) -> Tensor:
    """Smooth features of age and amount, ``[U, T, 4]``, all about one in size. A negative age counts as now."""
    age = age_days_UT.clamp(min=0)
    amount = weight_UT.clamp(min=0).log1p()
    return torch.stack([age.log1p() / 3 - 1, torch.exp(-age / 7), torch.exp(-age / 60), amount - 1], dim=-1)
