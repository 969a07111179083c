"""Picture codecs: a picture becomes a short list of discrete codes and back.

Shapes: N pictures, H W pixels, L codes a picture (row-major grid), K codebook entries, D width of a code.
``rgb_N3HW`` is float32 in [0, 1] everywhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, LineageError
from couturier.components.files import read_json, write_json


class Codec(Protocol):
    """What the generator, RL, evaluation and serving need of a codec. Frozen once trained."""

    @property
    def codebook_size(self) -> int: ...
    @property
    def codes_per_picture(self) -> int: ...
    @property
    def picture_size(self) -> int: ...

    def encode(self, rgb_N3HW: Tensor) -> Tensor:
        """``[N, 3, H, W]`` → codes int64 ``[N, L]``."""
        ...

    def decode(self, codes_NL: Tensor) -> Tensor:
        """Codes int64 ``[N, L]`` → ``[N, 3, H, W]`` in [0, 1]."""
        ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class PatchVQConfig:
    """The shape of the tiny recipe's own codec."""

    size: int = 32
    """Picture edge in pixels; a multiple of 8."""
    codebook: int = 512
    """K."""
    width: int = 96
    """Channels at the 8x8-pixel and 4x4-pixel grids."""
    code_width: int = 32
    """D, the width in which codes are compared."""
    blocks: int = 2
    """Residual blocks at each of the two grids, in the encoder and in the decoder."""


class PatchVQ(nn.Module):
    """A VQ autoencoder that never convolves at full resolution: pixels are folded into channels 4x4 first.

    One code stands for 8x8 pixels, so a 32x32 picture is 16 codes. The codebook follows an exponential moving average
    of what falls on each entry (van den Oord et al. 2017, appendix A.1), which needs no gradient.
    """

    cluster_size_K: Tensor
    cluster_sum_KD: Tensor
    codebook_KD: Tensor

    def __init__(self, config: PatchVQConfig) -> None:
        super().__init__()
        if config.size % 8:
            raise ConfigError(f"tokenise.codec.size is {config.size}; it must be a multiple of 8. Try 32.")
        self.config = config
        c, d = config.width, config.code_width
        # Each code is read off its own 8x8 pixels alone, so tiles that share a part share its codes: what the generator
        # must learn is then a few free choices, not a thousand unrelated strings. The decoder sees all codes at once.
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(8),
            nn.Conv2d(192, 2 * c, 1),
            *[_Residual(2 * c, kernel=1) for _ in range(config.blocks)],
            nn.Conv2d(2 * c, d, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(d, c, 3, padding=1),
            *[_Residual(c) for _ in range(config.blocks)],
            nn.Conv2d(c, 4 * c, 1),
            nn.PixelShuffle(2),
            *[_Residual(c) for _ in range(config.blocks)],
            nn.GroupNorm(1, c),
            nn.SiLU(),
            nn.Conv2d(c, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )
        self.register_buffer("codebook_KD", torch.randn(config.codebook, d))
        self.register_buffer("cluster_size_K", torch.ones(config.codebook))
        self.register_buffer("cluster_sum_KD", self.codebook_KD.clone())

    @property
    def codebook_size(self) -> int:
        return self.config.codebook

    @property
    def codes_per_picture(self) -> int:
        return (self.config.size // 8) ** 2

    @property
    def picture_size(self) -> int:
        return self.config.size

    def latents(self, rgb_N3HW: Tensor) -> Tensor:
        """``[N, 3, H, W]`` → what is to be quantised, ``[N, L, D]``."""
        return self.encoder(rgb_N3HW * 2 - 1).flatten(2).transpose(1, 2)

    def nearest(self, z_NLD: Tensor) -> Tensor:
        """Index of the nearest codebook entry, int64 ``[N, L]``."""
        e_KD = self.codebook_KD
        return (e_KD.square().sum(1) - 2 * z_NLD @ e_KD.T).argmin(-1)

    def pixels(self, z_NLD: Tensor) -> Tensor:
        """Code vectors ``[N, L, D]`` → pictures, unclamped."""
        grid = self.config.size // 8
        return (self.decoder(z_NLD.transpose(1, 2).unflatten(2, (grid, grid))) + 1) / 2

    @torch.no_grad()
    def encode(self, rgb_N3HW: Tensor) -> Tensor:
        return self.nearest(self.latents(rgb_N3HW))

    @torch.no_grad()
    def decode(self, codes_NL: Tensor) -> Tensor:
        return self.pixels(self.codebook_KD[codes_NL]).clamp(0, 1)

    def loss(self, rgb_N3HW: Tensor, *, commitment: float) -> dict[str, Tensor]:
        """Reconstruction and commitment losses, and the codes that were chosen (for the codebook's average)."""
        z_NLD = self.latents(rgb_N3HW)
        codes_NL = self.nearest(z_NLD.detach())
        q_NLD = self.codebook_KD[codes_NL]
        out = self.pixels(z_NLD + (q_NLD - z_NLD).detach())
        reconstruction = F.mse_loss(out, rgb_N3HW)
        return {
            "loss": reconstruction + commitment * F.mse_loss(z_NLD, q_NLD),
            "mse": reconstruction.detach(),
            "z": z_NLD.detach(),
            "codes": codes_NL,
        }

    @torch.no_grad()
    def follow(self, z_NLD: Tensor, codes_NL: Tensor, *, decay: float, generator: torch.Generator) -> None:
        """Move the codebook towards what fell on it; entries that nothing falls on restart on a random latent."""
        z, codes = z_NLD.flatten(0, 1), codes_NL.flatten()
        hits_K = torch.bincount(codes, minlength=self.config.codebook).to(z.dtype)
        sums_KD = torch.zeros_like(self.codebook_KD).index_add_(0, codes, z)
        self.cluster_size_K.lerp_(hits_K, 1 - decay)
        self.cluster_sum_KD.lerp_(sums_KD, 1 - decay)
        dead_K = self.cluster_size_K < 0.02
        if bool(dead_K.any()):
            picks = torch.randint(len(z), (int(dead_K.sum()),), generator=generator)
            self.cluster_sum_KD[dead_K] = z[picks]
            self.cluster_size_K[dead_K] = 1.0
        self.codebook_KD.copy_(self.cluster_sum_KD / self.cluster_size_K[:, None])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "codec.safetensors")
        write_json(folder / "codec.json", {"kind": "patch_vq", "config": asdict(self.config)})


class _Residual(nn.Module):
    """Pre-activation residual block; with ``kernel=1`` it mixes channels only."""

    def __init__(self, channels: int, *, kernel: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(1, channels) if kernel > 1 else nn.Identity(),
            nn.SiLU(),
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + self.body(x_NCHW)


def load_codec(folder: Path) -> Codec:
    """The codec saved in ``folder``.

    Raises:
        LineageError: the folder holds no codec that this version knows.
    """
    path = folder / "codec.json"
    if not path.exists():
        raise LineageError(f"{folder} holds no codec.json. Run `couturier retrain` to train a codec.")
    facts = read_json(path)
    if facts["kind"] == "patch_vq":
        codec = PatchVQ(PatchVQConfig(**facts["config"]))
        codec.load_state_dict(load_file(folder / "codec.safetensors"))
        return codec.eval().requires_grad_(False)
    if facts["kind"] == "janus_vq":
        from couturier.components.generator.janus_codec import JanusCodec

        return JanusCodec.load(folder)
    if facts["kind"] == "emu3_vq":
        from couturier.components.generator.emu3 import Emu3Codec

        return Emu3Codec.load(folder)
    raise LineageError(
        f"codec kind {facts['kind']!r} in {path} is unknown; known are 'patch_vq', 'janus_vq' and 'emu3_vq'."
    )


def pictures(catalogue: Catalogue, size: int) -> Tensor:
    """Catalogue pictures float ``[I, 3, size, size]`` in [0, 1]."""
    rgb = torch.from_numpy(np.array(catalogue.rgb_IHWC)).permute(0, 3, 1, 2).float() / 255
    if rgb.shape[-1] != size:
        rgb = F.interpolate(rgb, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return rgb


def psnr_db(a_N3HW: Tensor, b_N3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in decibels, ``[N]``, for pixels in [0, 1]."""
    return -10 * (a_N3HW - b_N3HW).square().flatten(1).mean(1).clamp_min(1e-10).log10()
