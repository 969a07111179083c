"""The judge's own eyes: a small convolutional encoder of pictures, trained to read a catalogue's attributes.

It shares no weight with the generator's encoders: a judge that looks through the eyes of what it judges can be fooled
by it. Training pictures are degraded (noise, blur, blocks, shift, colour), because what it scores is drawn by a codec.

Letters: N pictures, S side in pixels, P embedding width, I catalogue items, A augmented views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, TrainingError


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Size and training of the picture encoder."""

    side: int = 32
    """Pixels the encoder works at; other sizes are resampled at its door. A multiple of 8."""
    width: int = 64
    """P, the embedding width."""
    channels: int = 32
    """Channels of the first layer; the second has twice as many."""
    steps: int = 280
    """Training steps."""
    batch: int = 128
    learning_rate: float = 4e-3
    """Peak of a one-cycle schedule (AdamW)."""
    max_classes: int = 4096
    """An attribute with more values than this is left out; item identity is folded into that many classes."""

    def __post_init__(self) -> None:
        if self.side % 8 or self.side < 8:
            raise ConfigError(f"judge.encoder.side is {self.side}; it must be a multiple of 8.")


class TileEncoder(nn.Module):
    """Pictures ``[N, 3, H, W]`` in 0..1 -> embeddings ``[N, P]`` of unit length times sqrt(P).

    It works on 8 x 8 patches of pixels moved into channels, where convolutions are cheap on a processor.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        fold, wide = config.side // 8, 2 * config.channels
        self.body = nn.Sequential(
            nn.PixelUnshuffle(fold),
            nn.Conv2d(3 * fold * fold, config.channels, 3, padding=1),
            nn.GroupNorm(1, config.channels),
            nn.GELU(),
            nn.Conv2d(config.channels, wide, 2, stride=2),
            nn.GroupNorm(1, wide),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(wide * 16, config.width),
        )

    def forward(self, rgb_N3HW: Tensor) -> Tensor:
        side = self.config.side
        if rgb_N3HW.shape[-2:] != (side, side):
            rgb_N3HW = F.interpolate(rgb_N3HW, size=(side, side), mode="bilinear", antialias=True)
        return F.layer_norm(self.body(rgb_N3HW * 2 - 1), (self.config.width,))


def pictures_of(catalogue: Catalogue) -> Tensor:
    """The catalogue's pictures, float ``[I, 3, H, W]`` in 0..1."""
    return torch.tensor(catalogue.rgb_IHWC).permute(0, 3, 1, 2).float() / 255


def attribute_targets(catalogue: Catalogue, config: EncoderConfig) -> dict[str, Tensor]:
    """Class indices ``[I]`` by head: each attribute with at least two and at most ``max_classes`` values, and the
    item's own identity (folded), so that a catalogue without attributes trains an encoder too."""
    targets: dict[str, Tensor] = {"item": torch.arange(len(catalogue)) % config.max_classes}
    for name in catalogue.attributes:
        codes = catalogue.items[name].fill_null("").rank("dense").cast(pl.Int64).to_torch() - 1
        if 1 <= int(codes.max()) < config.max_classes:
            targets[f"attribute {name}"] = codes
    return targets


class AttributeHeads(nn.Module):
    """One linear classifier an attribute, used in training and to say what the encoder sees."""

    def __init__(self, width: int, targets: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(targets)
        self.heads = nn.ModuleList(nn.Linear(width, int(target.max()) + 1) for target in targets.values())

    def loss(self, embedding_NP: Tensor, target_of: Mapping[str, Tensor]) -> Tensor:
        """Mean over heads of cross-entropy."""
        losses = [
            F.cross_entropy(head(embedding_NP), target_of[name])
            for name, head in zip(self.names, self.heads, strict=True)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def accuracy(self, embedding_NP: Tensor, target_of: Mapping[str, Tensor]) -> dict[str, float]:
        """Share of pictures read right, by head."""
        return {
            name: float((head(embedding_NP).argmax(-1) == target_of[name]).float().mean())
            for name, head in zip(self.names, self.heads, strict=True)
        }


def degraded(rgb_N3HW: Tensor, generator: torch.Generator) -> Tensor:
    """What a codec and a generator do to a picture, at random strength: noise, blur, blocks, shift, tint.

    Each picture draws its own strengths; about one in five stays nearly clean. Values stay in 0..1.
    """
    n, _, height, width = rgb_N3HW.shape

    def draw(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator)

    out = rgb_N3HW
    soft = F.avg_pool2d(out, 3, stride=1, padding=1, count_include_pad=False)
    out = torch.lerp(out, soft, draw(1, 1, 1).pow(2))
    # Blocks: a coarse grid shines through, as when a codec spends no bits on detail.
    coarse = F.interpolate(F.adaptive_avg_pool2d(out, (max(1, height // 4), max(1, width // 4))), size=(height, width))
    out = torch.lerp(out, coarse, 0.7 * draw(1, 1, 1).pow(3))
    shift = torch.randint(-1, 2, (2,), generator=generator)
    shifted = F.pad(out, (1, 1, 1, 1), mode="replicate")
    top, left = 1 + int(shift[0]), 1 + int(shift[1])
    moved = shifted[:, :, top : top + height, left : left + width]
    out = torch.where(draw(1, 1, 1) < 0.3, moved, out)
    out = out * (1 + 0.3 * (draw(3, 1, 1) - 0.5)) + 0.2 * (draw(3, 1, 1) - 0.5)
    strength = 0.12 * draw(1, 1, 1).pow(2)
    return (out + strength * torch.randn(out.shape, generator=generator)).clamp(0, 1)


def encoder_step(
    encoder: TileEncoder,
    heads: AttributeHeads,
    rgb_I3HW: Tensor,
    targets: Mapping[str, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """The loss of one training step on a random batch of degraded catalogue pictures.

    Raises:
        TrainingError: the loss is not a number; the message lists the catalogue rows of the batch.
    """
    rows = torch.randint(rgb_I3HW.shape[0], (encoder.config.batch,), generator=generator)
    embedding = encoder(degraded(rgb_I3HW[rows], generator))
    loss = heads.loss(embedding, {name: target[rows] for name, target in targets.items()})
    if not torch.isfinite(loss):
        raise TrainingError(
            f"the judge's picture encoder lost its footing (loss {loss.item()}) on catalogue rows {rows.tolist()}. "
            "Lower judge.encoder.learning_rate, or look at those pictures."
        )
    return loss


@torch.no_grad()
def embedded(encoder: Callable[[Tensor], Tensor], rgb_N3HW: Tensor, *, batch: int = 512) -> Tensor:
    """Embeddings ``[N, P]`` of many pictures, a batch at a time."""
    return torch.cat([encoder(part) for part in rgb_N3HW.split(batch)])


def embedded_views(encoder: TileEncoder, rgb_I3HW: Tensor, views: int, generator: torch.Generator) -> Tensor:
    """Embeddings ``[I, A, P]`` of each picture as it is (view 0) and degraded ``views - 1`` times."""
    banks = [embedded(encoder, rgb_I3HW)]
    banks += [embedded(encoder, degraded(rgb_I3HW, generator)) for _ in range(views - 1)]
    return torch.stack(banks, dim=1)


def vocabulary_of(texts: Sequence[str], *, limit: int) -> list[str]:
    """The ``limit`` most frequent words of ``texts``, then by alphabet."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in words_of(text):
            counts[word] = counts.get(word, 0) + 1
    return sorted(sorted(counts), key=lambda word: -counts[word])[:limit]


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and digits.

    Example:
        >>> words_of("Soft Drinks, 2-litre")
        ['soft', 'drinks', '2', 'litre']
    """
    return "".join(sign if sign.isalnum() else " " for sign in text.lower()).split()


def word_bags(texts: Sequence[str], vocabulary: Sequence[str]) -> tuple[Tensor, Tensor]:
    """``(word ids, offsets [N + 1])``, int64 and jagged: the distinct known words of each text."""
    index = {word: i for i, word in enumerate(vocabulary)}
    bags = [sorted({index[word] for word in words_of(text) if word in index}) for text in texts]
    offsets = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)
    return torch.tensor([word for bag in bags for word in bag], dtype=torch.int64), offsets
