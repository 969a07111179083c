"""What a judge knows of an item: its picture through the judge's eyes, its words, and, if asked for, which item it is.

    D features = [ P picture | W words | 1 are there words | E identity | 1 is there an identity ]

The identity is an addition, not the base: it is gated by how often the item was met in training, so it vanishes for a
new item, and it is absent (zeros) for a picture that never existed. With ``ids = 0`` the last two parts do not exist.

Letters: N rows, I catalogue items, P picture width, W word width, E identity width, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.encoder import TileEncoder, embedded
from couturier.components.interest.types import check_finite


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which parts an item's features have."""

    words: int = 32
    """W, the width of the word embedding; 0 for none."""
    ids: int = 0
    """E, the width of the identity embedding; 0 for none."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ConfigError(f"judge.features.{name} is {value}; it must be at least 0.")


@dataclass(frozen=True, kw_only=True)
class Content:
    """What there is to see and read of a catalogue.

    Args:
        pictures_IP: what the eyes see of each item, or any other content vectors.
        word_ids, word_offsets: jagged distinct words of each item, as ``encoder.word_bags`` gives.
        vocabulary: how many words there are.
        counts_I: how often each item was met in training, for the gate of its identity.
        eyes: the frozen encoder behind ``pictures_IP``; None where content vectors were given, and then no new
            picture can be judged.
    """

    pictures_IP: Tensor
    word_ids: Tensor
    word_offsets: Tensor
    vocabulary: int
    counts_I: Tensor
    eyes: TileEncoder | None = None

    @classmethod
    def of_vectors(cls, vectors_IP: Tensor, counts_I: Tensor | None = None) -> Content:
        """Content vectors alone: no words, no eyes."""
        items = len(vectors_IP)
        return cls(
            pictures_IP=vectors_IP,
            word_ids=torch.zeros(0, dtype=torch.int64),
            word_offsets=torch.zeros(items + 1, dtype=torch.int64),
            vocabulary=0,
            counts_I=torch.ones(items) if counts_I is None else counts_I,
        )


class ItemFeatures(nn.Module):
    """Features of items and of pictures; see the module."""

    def __init__(self, config: FeatureConfig, content: Content) -> None:
        super().__init__()
        self.config, self.encoder = config, content.eyes
        self.pictures_IP: Tensor
        self.word_ids: Tensor
        self.word_offsets: Tensor
        self.gate_I: Tensor
        self._kept: tuple[int, tuple[Tensor, Tensor]] | None = None
        self.register_buffer("pictures_IP", content.pictures_IP)
        self.register_buffer("word_ids", content.word_ids)
        self.register_buffer("word_offsets", content.word_offsets)
        if config.words:
            self.word_bag = nn.EmbeddingBag(max(1, content.vocabulary), config.words, mode="mean")
        if config.ids:
            self.identity = nn.Embedding(len(content.pictures_IP), config.ids)
            nn.init.normal_(self.identity.weight, std=config.ids**-0.5)
            met = content.counts_I.float().log1p()
            self.register_buffer("gate_I", met / met.max().clamp_min(1e-6))

    @property
    def items(self) -> int:
        """I."""
        return len(self.pictures_IP)

    @property
    def picture_width(self) -> int:
        """P."""
        return self.pictures_IP.shape[1]

    @property
    def width(self) -> int:
        """D."""
        words = self.config.words + 1 if self.config.words else 0
        return self.picture_width + words + (self.config.ids + 1 if self.config.ids else 0)

    def embed_pictures(self, rgb_N3HW: Tensor) -> Tensor:
        """Float pictures 0..1, without words or identity -> features ``[N, D]``.

        Raises:
            DataError: not ``[N, 3, H, W]``, a value that is not finite, or a judge without eyes.
        """
        if rgb_N3HW.ndim != 4 or rgb_N3HW.shape[1] != 3:
            raise DataError(f"pictures have shape {list(rgb_N3HW.shape)}, wanted [N, 3, H, W] of floats in 0..1.")
        check_finite("pictures", rgb_N3HW)
        if self.encoder is None:
            raise DataError("this judge was fitted on given content vectors, so it has no eyes for a new picture.")
        if not len(rgb_N3HW):
            return rgb_N3HW.new_zeros(0, self.width)
        return self.of_pictures(embedded(self.encoder, rgb_N3HW))

    def of_pictures(self, pictures_XP: Tensor) -> Tensor:
        """Picture embeddings ``[..., P]`` -> features ``[..., D]`` no words or identity."""
        rest = pictures_XP.new_zeros(*pictures_XP.shape[:-1], self.width - self.picture_width)
        return torch.cat([pictures_XP, rest], dim=-1)

    def described(self, pictures_NP: Tensor, word_ids: Tensor, word_offsets: Tensor) -> Tensor:
        """Picture embeddings with words of one's own (jagged, as ``encoder.word_bags`` gives) -> features ``[N, D]``;
        no identity. Without a width for words they are pictures alone."""
        if not self.config.words:
            return self.of_pictures(pictures_NP)
        words_NW = self._words(word_ids, word_offsets)
        rest = pictures_NP.new_zeros(len(pictures_NP), self.config.ids + 1 if self.config.ids else 0)
        return torch.cat([pictures_NP, words_NW, pictures_NP.new_ones(len(pictures_NP), 1), rest], dim=-1)

    def _words(self, word_ids: Tensor, word_offsets: Tensor) -> Tensor:
        """The mean embedding of each jagged bag of words, ``[N, W]``; zeros for an empty one."""
        if word_ids.is_cuda:
            bagged: Tensor = self.word_bag(word_ids, word_offsets[:-1])
            return bagged
        turned = self._turned() if word_ids is self.word_ids else turned_bags(word_ids, word_offsets, self._vocabulary)
        found: Tensor = _Bags.apply(self.word_bag.weight, word_ids, word_offsets, *turned)
        return found

    def _turned(self) -> tuple[Tensor, Tensor]:
        """The catalogue's bags of each word, made anew where a checkpoint has changed its words."""
        version = self.word_ids._version + self.word_offsets._version
        if self._kept is None or self._kept[0] != version:
            self._kept = (version, turned_bags(self.word_ids, self.word_offsets, self._vocabulary))
        return self._kept[1]

    @property
    def _vocabulary(self) -> int:
        return int(self.word_bag.num_embeddings)

    def embed_items(self, *, words: bool = True) -> Tensor:
        """The catalogue -> features ``[I, D]``; ``words=False`` shows it as drawn pictures, no words or identity."""
        if not words:
            return self.of_pictures(self.pictures_IP)
        parts = [self.pictures_IP]
        if self.config.words:
            words_IW = self._words(self.word_ids, self.word_offsets)
            parts += [words_IW, self.pictures_IP.new_ones(self.items, 1)]
        if self.config.ids:
            gate_I1 = self.gate_I[:, None]
            parts += [self.identity.weight * gate_I1, (gate_I1 > 0).float()]
        return torch.cat(parts, dim=-1)


class _Bags(torch.autograd.Function):
    """Means of rows over jagged bags on a CPU. PyTorch's own gradient of a bag sorts its words anew in every step, and
    adding rows one by one takes one core; here both ways are sums over bags."""

    @staticmethod
    def forward(
        ctx: Any, weight_VW: Tensor, word_ids: Tensor, offsets: Tensor, bags_K: Tensor, begins: Tensor
    ) -> Tensor:
        ctx.save_for_backward(offsets, bags_K, begins)
        return F.embedding_bag(word_ids, weight_VW, offsets, mode="mean", include_last_offset=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NW: Tensor) -> tuple[Tensor | None, ...]:
        offsets, bags_K, begins = ctx.saved_tensors
        share_NW = grad_NW / offsets.diff().clamp_min(1)[:, None]
        grad_VW = F.embedding_bag(bags_K, share_NW, begins, mode="sum", include_last_offset=True)
        return grad_VW, None, None, None, None


def turned_bags(word_ids: Tensor, offsets: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """For each of V words the bags it is in, one word after another, and where they begin ``[V + 1]``.

    Example:
        >>> turned_bags(torch.tensor([0, 2, 2]), torch.tensor([0, 2, 3]), 3)
        (tensor([0, 0, 1]), tensor([0, 1, 1, 3]))
    """
    owner_K = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    counts_V = torch.bincount(word_ids, minlength=words)
    return owner_K[word_ids.argsort(stable=True)], torch.cat([counts_V.new_zeros(1), counts_V.cumsum(0)])
