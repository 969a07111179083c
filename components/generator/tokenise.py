"""Stage ``tokenise``: train the picture codec and the eyes, and turn every catalogue picture into codes.

Both see catalogue pictures only: no user, no event, no target. What a person took next never reaches them.
A published Janus brings both; then nothing is trained here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import JanusVisionConfig, JanusVisionModel

from couturier.components.data.formats import Catalogue
from couturier.components.files import write_json
from couturier.components.generator.codec import Codec, PatchVQ, PatchVQConfig, pictures, psnr_db
from couturier.components.lineage.checkpoints import (
    Checkpoints,
    generator_tensor,
    load_module,
    load_optimiser,
    module_tensors,
    optimiser_tensors,
)
from couturier.components.lineage.stages import StageContext
from couturier.components.runtime import global_seed, seeded, threads


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the codec and the eyes learn."""

    seed: int = 0
    threads: int = 2
    """Torch threads; one gives the same bits on every machine of a kind."""
    codec: PatchVQConfig = field(default_factory=PatchVQConfig)
    base: str = ""
    """A hub name or folder of a published Janus or Emu3 whose codec is used as it is; empty: train one."""
    base_pixels: int = 128
    """An edge of pictures under the codec of an Emu3, which takes any size; a Janus has its own."""
    steps: int = 1200
    batch: int = 32
    lr: float = 3e-3
    commitment: float = 0.25
    decay: float = 0.98
    """Of the codebook's moving average."""
    eyes_width: int = 128
    eyes_layers: int = 2
    eyes_steps: int = 250
    eyes_batch: int = 128
    eyes_lr: float = 1e-3
    checkpoint_every: int = 300


def run(ctx: StageContext) -> None:
    """``sequences`` → ``codec/``, ``eyes/``, ``codes.safetensors`` (``codes_IL``), ``curves.parquet``."""
    config: Config = ctx.config
    catalogue = Catalogue.load(ctx.inputs["sequences"])
    if config.base:
        codec: Codec = published_codec(config.base, pixels=config.base_pixels)
        curves: list[tuple[int, str, float]] = []
    else:
        with threads(config.threads):
            codec, curves = train_codec(ctx, catalogue, config)
            eyes, eye_curves, accuracy = train_eyes(ctx, catalogue, config)
        curves += eye_curves
        save_eyes(eyes, ctx.out / "eyes")
        ctx.facts["eyes_attribute_accuracy"] = accuracy
    codec.save(ctx.out / "codec")
    rgb = pictures(catalogue, codec.picture_size)
    codes_IL = torch.cat([codec.encode(part) for part in rgb.split(256)])
    save_file({"codes_IL": codes_IL}, ctx.out / "codes.safetensors")
    ctx.facts.update(codec_quality(codec, codes_IL, rgb))
    ctx.tracker.metrics({k: v for k, v in ctx.facts.items() if isinstance(v, float)}, step=config.steps)
    frame = pl.DataFrame(curves, schema={"step": pl.Int64, "name": pl.String, "value": pl.Float64}, orient="row")
    frame.write_parquet(ctx.out / "curves.parquet")


def published_codec(base: str, *, pixels: int) -> Codec:
    """The codec of a published Janus or Emu3.

    Raises:
        ConfigError: no such model, or one of another family.
    """
    from couturier.components.generator.published import family_of

    if family_of(base) == "emu3":
        from couturier.components.generator.emu3 import Emu3Codec

        return Emu3Codec.published(base, pixels=pixels)
    from couturier.components.generator.janus_codec import JanusCodec

    return JanusCodec.published(base)


def codec_quality(codec: Codec, codes_IL: Tensor, rgb_I3HW: Tensor) -> dict[str, float]:
    """PSNR in decibels, share of codes used, and how often a reconstruction's nearest picture is its own."""
    back = torch.cat([codec.decode(part) for part in codes_IL.split(256)])
    db_I = psnr_db(back, rgb_I3HW)
    nearest_I = torch.cdist(back.flatten(1), rgb_I3HW.flatten(1)).argmin(1)
    return {
        "psnr_db": float(db_I.mean()),
        "psnr_db_lowest": float(db_I.min()),
        "codes_used_share": codes_IL.unique().numel() / codec.codebook_size,
        "retrieval_top1": float((nearest_I == torch.arange(len(rgb_I3HW))).float().mean()),
        "distinct_code_rows": float(len(codes_IL.unique(dim=0))),
    }


def train_codec(
    ctx: StageContext, catalogue: Catalogue, config: Config
) -> tuple[PatchVQ, list[tuple[int, str, float]]]:
    """Fit the codec on catalogue pictures; resumes from the newest checkpoint to the same bits."""
    rgb = pictures(catalogue, config.codec.size)
    generator = seeded(config.seed, "codec", "batches")
    with global_seed(config.seed, "codec"):
        codec = PatchVQ(config.codec)
    optimiser = torch.optim.AdamW(codec.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoints = Checkpoints(ctx.scratch / "codec")
    curves: list[tuple[int, str, float]] = []
    start = 0
    if (saved := checkpoints.newest()) is not None:
        load_module("codec", codec, saved.tensors)
        load_optimiser("optimiser", optimiser, saved.tensors, saved.facts["optimiser"])
        generator.set_state(saved.tensors["generator"])
        start, curves = saved.step, [tuple(row) for row in saved.facts["curves"]]
    else:
        _first_codebook(codec, rgb, generator)
    codec.train()
    ctx.progress.start("codec", config.steps, done=start, unit="steps")
    for step in range(start, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * one_cycle(step, config.steps)
        batch = rgb[torch.randint(len(rgb), (config.batch,), generator=generator)]
        parts = codec.loss(batch, commitment=config.commitment)
        optimiser.zero_grad(set_to_none=True)
        parts["loss"].backward()
        optimiser.step()
        codec.follow(parts["z"], parts["codes"], decay=config.decay, generator=generator)
        if step % 25 == 0 or step + 1 == config.steps:
            db = float(-10 * parts["mse"].log10())
            curves.append((step, "codec_psnr_db", db))
            ctx.tracker.metrics({"codec_psnr_db": db}, step=step)
            ctx.progress.advance(0, note=f"{db:.1f} dB")
        ctx.progress.advance()
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            tensors, facts = optimiser_tensors("optimiser", optimiser)
            tensors |= module_tensors("codec", codec) | {"generator": generator_tensor(generator)}
            checkpoints.save(step + 1, tensors, {"optimiser": facts, "curves": curves})
    ctx.progress.stop()
    return codec.eval().requires_grad_(False), curves


@torch.no_grad()
def _first_codebook(codec: PatchVQ, rgb: Tensor, generator: torch.Generator) -> None:
    """Start the codebook on real latents, so that every entry is in play from the first step."""
    some = rgb[torch.randperm(len(rgb), generator=generator)[:256]]
    z = codec.latents(some).flatten(0, 1)
    rows = torch.randint(len(z), (codec.codebook_size,), generator=generator)
    codec.codebook_KD.copy_(z[rows])
    codec.cluster_sum_KD.copy_(codec.codebook_KD)


def one_cycle(step: int, steps: int, warm: float = 0.05) -> float:
    """Learning-rate factor: linear warm-up over the first share, then a cosine to a hundredth.

    Example:
        >>> round(one_cycle(5, 100), 3), round(one_cycle(99, 100), 3)
        (1.0, 0.01)
    """
    at = step / max(1, steps)
    if at < warm:
        return (step + 1) / max(1.0, warm * steps + 1)
    return 0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * (at - warm) / (1 - warm))))


def train_eyes(
    ctx: StageContext, catalogue: Catalogue, config: Config
) -> tuple[JanusVisionModel, list[tuple[int, str, float]], float]:
    """Fit the understanding tower to read every attribute, and which item it is, from a disturbed picture.

    Returns the tower, its curves, and its accuracy over attributes on clean pictures. It takes seconds, so a kill
    starts it again; its random numbers are its own, so it ends on the same bits.
    """
    rgb = pictures(catalogue, config.codec.size) * 2 - 1
    labels = _labels(catalogue)
    generator = seeded(config.seed, "eyes", "batches")
    with global_seed(config.seed, "eyes"):
        eyes = JanusVisionModel(
            JanusVisionConfig(
                hidden_size=config.eyes_width,
                num_hidden_layers=config.eyes_layers,
                num_attention_heads=4,
                image_size=config.codec.size,
                patch_size=config.codec.size,
                num_image_tokens=1,
                mlp_ratio=2.0,
            )
        )
        heads = nn.ModuleList([nn.Linear(config.eyes_width, int(y.max()) + 1) for y in labels])
    parameters = [*eyes.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=config.eyes_lr, weight_decay=0.01)
    curves: list[tuple[int, str, float]] = []
    ctx.progress.start("eyes", config.eyes_steps, unit="steps")
    for step in range(config.eyes_steps):
        for group in optimiser.param_groups:
            group["lr"] = config.eyes_lr * one_cycle(step, config.eyes_steps)
        rows = torch.randint(len(rgb), (config.eyes_batch,), generator=generator)
        noise = torch.randn(rgb[rows].shape, generator=generator) * 0.1
        seen = eyes(rgb[rows] + noise).last_hidden_state.mean(1)
        losses = [F.cross_entropy(head(seen), y[rows], ignore_index=-1) for head, y in zip(heads, labels, strict=True)]
        loss = torch.stack(losses).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 25 == 0 or step + 1 == config.eyes_steps:
            curves.append((step, "eyes_loss", float(loss.detach())))
            ctx.tracker.metrics({"eyes_loss": float(loss.detach())}, step=step)
        ctx.progress.advance()
    ctx.progress.stop()
    eyes.eval().requires_grad_(False)
    with torch.no_grad():
        seen = torch.cat([eyes(part).last_hidden_state.mean(1) for part in rgb.split(256)])
        right = [
            (head(seen).argmax(-1) == y)[y >= 0].float().mean() for head, y in zip(heads[:-1], labels[:-1], strict=True)
        ]
    return eyes, curves, float(torch.stack(right).mean()) if right else 1.0


def _labels(catalogue: Catalogue) -> list[Tensor]:
    """Class index of each attribute (-1 where null), and last the item itself."""
    columns = [catalogue.items[name] for name in catalogue.attributes]
    labels = []
    for column in columns:
        names = {name: i for i, name in enumerate(sorted(column.drop_nulls().unique().to_list()))}
        labels.append(torch.tensor([names.get(value, -1) for value in column.to_list()]))
    return [*labels, torch.arange(len(catalogue))]


def save_eyes(eyes: JanusVisionModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in eyes.state_dict().items()}, folder / "eyes.safetensors")
    write_json(folder / "config.json", eyes.config.to_dict())


def load_eyes(folder: Path) -> JanusVisionModel:
    """The understanding tower saved by this stage, frozen."""
    eyes = JanusVisionModel(JanusVisionConfig.from_pretrained(folder))
    eyes.load_state_dict(load_file(folder / "eyes.safetensors"))
    return eyes.eval().requires_grad_(False)
