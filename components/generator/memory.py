"""What training a published model takes, in bytes, from its ``config.json`` alone: asked before any weight is read.

    weights      every parameter in the type it is held in
    gradients    one a learned parameter
    moments      Adam's two a learned parameter
    activations  what a layer keeps for its gradient; with checkpointing only what enters it, and one layer's rest
    attention    the mask of a packed batch
    logits       of the codes, their log-softmax and the gradient
    cache        keys and values of prompts and samples, while pictures are drawn
    features     what the eyes saw of every catalogue picture

Parameters are counted on a model without memory (torch's meta device), so they are exact. Activations follow the count
of Korthikanti et al. (arXiv 2205.05198, section 4) for attention that keeps no map; which terms a gated feed-forward
and rotary positions add is ours. Real runs differ by what the allocator wastes: a tenth is added.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from couturier.components.errors import ConfigError, CouturierError

BYTES = {"float32": 4, "bfloat16": 2}
PUBLISHED = ("janus", "emu3")
_WASTE = 1.1


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process does in a step."""

    dtype: str = "float32"
    """Of frozen weights and of products; learned weights are float32."""
    lora_rank: int = 0
    """0: every weight of the language model is learned."""
    lora_targets: tuple[str, ...] = ()
    checkpointing: bool = False
    windows: int = 8
    """Prompts a step."""
    targets: int = 1
    """Pictures learned a prompt."""
    history: int = 5
    """Pictures a prompt shows."""
    words: int = 16
    """Text tokens beside each."""
    items: int = 0
    """Catalogue pictures whose features are kept."""
    drawn: int = 0
    """Pictures drawn at once; 0 for fine-tuning alone."""
    guided: bool = False
    """Whether they are drawn with guidance: two prompts each."""
    shares: int = 1
    """Processes that each keep a share of the layers (FSDP)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes."""

    weights: int
    gradients: int
    moments: int
    activations: int
    attention: int
    logits: int
    cache: int
    features: int

    @property
    def total(self) -> int:
        """With what an allocator wastes."""
        return int(_WASTE * sum(vars(self).values()))

    def told(self) -> str:
        """In words.

        Example:
            >>> Memory(**dict.fromkeys([f.name for f in fields(Memory)], 10**9)).told()
            '8.8 GB: weights 1.0, gradients 1.0, moments 1.0, activations 1.0, attention 1.0, logits 1.0, \
cache 1.0, features 1.0'
        """
        parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in vars(self).items())
        return f"{self.total / 1e9:.1f} GB: {parts}"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that the estimate needs, read off a config."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_width: int
    codes: int
    codebook: int
    picture_tokens: int
    feature_width: int
    """Of one kept feature token; 0 where history pictures are codes."""
    counts: tuple[tuple[str, bool, int, int], ...]
    """Every parameter: name, whether full fine-tuning learns it, elements, and the sum of a matrix's two sizes."""


def estimate(shape: Shape, work: Work) -> Memory:
    """Bytes that ``work`` takes with a model of that shape."""
    base, full = BYTES[work.dtype], BYTES["float32"]
    learned, learned_layers, frozen, frozen_layers = 0, 0, 0, 0
    for name, learns, count, sizes in shape.counts:
        layer = _LAYER.search(name) is not None
        if learns and not work.lora_rank:
            learned, learned_layers = learned + count * (not layer), learned_layers + count * layer
            continue
        frozen, frozen_layers = frozen + count * (not layer), frozen_layers + count * layer
        if layer and name.split(".")[-2] in work.lora_targets:
            learned_layers += work.lora_rank * sizes
    learned += learned_layers // work.shares
    frozen += frozen_layers // work.shares
    prompt = work.history * (shape.picture_tokens + work.words) + 8
    length = prompt + work.targets * (shape.codes - 1)
    tokens = work.windows * length
    inside = tokens * (6 * shape.width + 2 * shape.kv_width + 4 * shape.ffn) * base
    entering = tokens * shape.width * base
    rows = work.drawn * (2 if work.guided else 1)
    slots = rows * (prompt + shape.codes)
    return Memory(
        weights=frozen * base + learned * full,
        gradients=learned * full,
        moments=2 * learned * full,
        activations=inside + shape.layers * entering if work.checkpointing else shape.layers * inside,
        attention=work.windows * length**2 * (1 + full),
        logits=3 * work.windows * work.targets * shape.codes * shape.codebook * full,
        cache=2 * shape.layers * slots * shape.kv_width * base,
        features=work.items * shape.picture_tokens * shape.feature_width * base,
    )


def config_of(base: str) -> Any:
    """``config.json`` of a published model; no weights are touched.

    Raises:
        ConfigError: nothing there, or a model of a family that is not known.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"sft.generator.base is {base!r}, which is neither a folder with a model nor a reachable hub name "
            f"({str(error).splitlines()[0]}). Give a folder, or leave it empty for the tiny model."
        ) from error
    if config.model_type not in PUBLISHED:
        raise ConfigError(
            f"sft.generator.base {base!r} holds a model of type {config.model_type!r}; known are "
            f"{', '.join(PUBLISHED)}, in the layout of transformers (their names end in -hf or begin with "
            "deepseek-community)."
        )
    return config


def shape_of(base: str, *, edge: int = 16) -> Shape:
    """Read off ``config.json`` of a hub name or a folder; no weights are touched.

    Args:
        edge: codes an edge of a picture; of use for Emu3 only, which draws pictures of any size.

    Raises:
        ConfigError: nothing there, or a model of a family that is not known.
    """
    from transformers import Emu3ForConditionalGeneration, JanusForConditionalGeneration

    config = config_of(base)
    kinds: dict[str, Any] = {"janus": JanusForConditionalGeneration, "emu3": Emu3ForConditionalGeneration}
    with torch.device("meta"):
        model = kinds[config.model_type](config)
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    common = {
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
        "ffn": text.intermediate_size,
        "heads": text.num_attention_heads,
        "kv_width": head * (text.num_key_value_heads or text.num_attention_heads),
        "counts": tuple(_counted(model, config.model_type)),
    }
    if config.model_type == "janus":
        codes, vision = config.vq_config.num_patches**2, config.vision_config
        return Shape(
            **common,
            codes=codes,
            codebook=config.vq_config.num_embeddings,
            picture_tokens=vision.num_image_tokens,
            feature_width=vision.hidden_size,
        )
    return Shape(
        **common,
        codes=edge * edge,
        codebook=config.vq_config.codebook_size,
        picture_tokens=edge * (edge + 1),
        feature_width=0,
    )


def free_bytes() -> int:
    """Memory that this process may still take: the GPU's where there is one, else the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require(needed: Memory, free: int, *, base: str) -> None:
    """Refuse what cannot fit.

    Raises:
        ConfigError: more is needed than is free; names the settings that lower it.

    Example:
        >>> require(Memory(**dict.fromkeys([f.name for f in fields(Memory)], 1)), 10**6, base="m")
    """
    if needed.total <= free:
        return
    raise ConfigError(
        f"training {base} takes about {needed.told()}; {free / 1e9:.1f} GB are free. Lower it with "
        "sft.generator.lora_rank=16 (adapters instead of all weights), sft.generator.dtype=bfloat16, "
        "sft.generator.checkpointing=true, a smaller sft.batch, sft.targets or sft.generator.history, or share the "
        "layers out: torchrun … -m couturier.components.alignment.distributed --strategy fsdp."
    )


_LAYER = re.compile(r"(language_model|text_model)\.layers\.")


def _counted(model: Any, kind: str) -> list[tuple[str, bool, int, int]]:
    """Eyes and codec stay as they are, and the text head of a model that has another one for codes. The codec is not
    counted at all: it is loaded apart, and not by who trains."""
    unused = {id(value) for value in model.lm_head.parameters()} if kind == "janus" else set()
    found = []
    for name, value in model.named_parameters():
        if "vqmodel" not in name:
            learns = "vision_model" not in name and id(value) not in unused
            found.append((name, learns, value.numel(), sum(value.shape) if value.ndim == 2 else 0))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m couturier.components.generator.memory BASE``: the estimate of some work, in words."""
    parser = argparse.ArgumentParser(
        prog="python -m couturier.components.generator.memory", description="What training a published model takes."
    )
    parser.add_argument("base", help="hub name or folder of a Janus or Emu3; only its config.json is read")
    parser.add_argument("--edge", type=int, default=16, help="codes an edge of a picture (Emu3)")
    for field in fields(Work):
        name = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(name, action="store_true")
        elif isinstance(field.default, tuple):
            parser.add_argument(name, type=lambda text: tuple(text.split(",")), default=("q_proj", "v_proj"))
        else:
            parser.add_argument(name, type=type(field.default), default=field.default)
    given = vars(parser.parse_args(arguments))
    try:
        needed = estimate(shape_of(given.pop("base"), edge=given.pop("edge")), Work(**given))
    except CouturierError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(1)
    sys.stdout.write(f"{needed.told()}; free here: {free_bytes() / 1e9:.1f} GB\n")


if __name__ == "__main__":
    main()
