"""The codec of a published Janus: its own VQ model, taken from the checkpoint and frozen."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import JanusForConditionalGeneration, JanusVQVAE, JanusVQVAEConfig

from couturier.components.files import read_json, write_json


class JanusCodec:
    """Wraps a ``JanusVQVAE``; pictures of any size are resized to the one it was trained on."""

    def __init__(self, vq: JanusVQVAE) -> None:
        self.vq = vq.eval().requires_grad_(False)

    @classmethod
    def published(cls, base: str) -> JanusCodec:
        """From a hub name or folder of a Janus model."""
        return cls(JanusForConditionalGeneration.from_pretrained(base).model.vqmodel)

    @property
    def codebook_size(self) -> int:
        return int(self.vq.config.num_embeddings)

    @property
    def codes_per_picture(self) -> int:
        return int(self.vq.config.num_patches) ** 2

    @property
    def picture_size(self) -> int:
        """Pixels an edge: every level of the encoder but the last halves the grid."""
        return int(self.vq.config.num_patches) * 2 ** (len(self.vq.config.channel_multiplier) - 1)

    @torch.no_grad()
    def encode(self, rgb_N3HW: Tensor) -> Tensor:
        size = self.picture_size
        if rgb_N3HW.shape[-1] != size:
            rgb_N3HW = F.interpolate(rgb_N3HW, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
        return self.vq.encode(rgb_N3HW * 2 - 1).image_tokens.view(len(rgb_N3HW), -1)

    @torch.no_grad()
    def decode(self, codes_NL: Tensor) -> Tensor:
        return ((self.vq.decode(codes_NL) + 1) / 2).clamp(0, 1)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.vq.state_dict().items()}, folder / "codec.safetensors")
        write_json(folder / "codec.json", {"kind": "janus_vq", "config": self.vq.config.to_dict()})

    @classmethod
    def load(cls, folder: Path) -> JanusCodec:
        """What :meth:`save` wrote."""
        vq = JanusVQVAE(JanusVQVAEConfig(**read_json(folder / "codec.json")["config"]))
        vq.load_state_dict(load_file(folder / "codec.safetensors"))
        return cls(vq)
