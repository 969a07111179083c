"""Opening a published model: the memory it will take is told first, then weights are read in the wanted type, and
adapters are laid beside them if the model is to learn by adapters.

LoRA (Hu et al., arXiv 2106.09685) through peft: the published weights stay as they are, in ``dtype``; beside each
chosen projection W two thin matrices learn, W x + (alpha / rank) B A x, in float32. B begins at nought, so that the
first step starts from the published model. Without LoRA every weight learns: then weights are float32, and products are
made in ``dtype``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from couturier.components.errors import ConfigError, LineageError, MissingExtraError
from couturier.components.generator.memory import (
    BYTES,
    PUBLISHED,
    Memory,
    Work,
    config_of,
    estimate,
    free_bytes,
    require,
    shape_of,
)
from couturier.components.runtime import global_seed

if TYPE_CHECKING:
    from couturier.components.generator.janus import GeneratorConfig

log = logging.getLogger(__name__)
ADAPTER = "adapter.safetensors"
_NAME = "default"


def check_settings(config: GeneratorConfig) -> None:
    """Settings of a published model that cannot be.

    Raises:
        ConfigError: an unknown dtype or way of saving, or adapters for a model that is built here.
    """
    if config.dtype not in BYTES:
        raise ConfigError(f"sft.generator.dtype is {config.dtype!r}; choose one of {', '.join(BYTES)}.")
    if config.lora_save not in ("adapter", "merged"):
        raise ConfigError(f"sft.generator.lora_save is {config.lora_save!r}; choose adapter or merged.")
    if config.lora_rank < 0 or (config.lora_rank and not config.lora_targets):
        raise ConfigError(
            f"sft.generator.lora_rank is {config.lora_rank} and lora_targets {config.lora_targets}; the rank must not "
            "be negative (0: no adapters), and adapters need at least one projection."
        )
    if config.base and config.family in PUBLISHED and family_of(config.base) != config.family:
        kind = family_of(config.base)
        raise ConfigError(
            f"sft.generator.base {config.base!r} holds a model of family {kind!r}, and sft.generator.family is "
            f"{config.family!r}; set it to {kind}."
        )
    if config.family == "emu3" and not config.base:
        raise ConfigError(
            "sft.generator.family is 'emu3', which is always a published model; name one as sft.generator.base and "
            "tokenise.base."
        )
    if not config.base and (config.lora_rank or config.dtype != "float32" or config.checkpointing):
        raise ConfigError(
            "sft.generator.lora_rank, dtype and checkpointing are for a published model; name one as "
            "sft.generator.base, or leave them out for the tiny one."
        )


def tell_memory(config: GeneratorConfig, work: Mapping[str, Any], *, edge: int = 16) -> Memory:
    """What training with these settings takes, logged before any weight is read.

    Args:
        work: fields of :class:`~couturier.components.generator.memory.Work` that the settings do not hold.
        edge: codes an edge of a picture; of use for Emu3 only.

    Raises:
        ConfigError: it cannot fit into the memory that is free.
    """
    done = Work(
        dtype=config.dtype,
        lora_rank=config.lora_rank,
        lora_targets=config.lora_targets,
        checkpointing=config.checkpointing,
        history=config.history,
        words=config.max_words,
        **work,
    )
    needed = estimate(shape_of(config.base, edge=edge), done)
    log.warning("training %s takes about %s", config.base, needed.told())
    require(needed, free_bytes(), base=config.base)
    return needed


def family_of(base: str) -> str:
    """ "janus" or "emu3", as ``config.json`` says.

    Raises:
        ConfigError: no such model, or one of another family.
    """
    return str(config_of(base).model_type)


def open_published(kind: Any, config: GeneratorConfig, *, seed: int = 0) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model and tokenizer of ``config.base``, the model ready to learn.

    Args:
        kind: a class of transformers with ``from_pretrained``.
        seed: of fresh adapters.

    Raises:
        ConfigError: neither a folder with such a model nor a reachable hub name.
        MissingExtraError: adapters are wanted and peft is not installed.
    """
    held = config.dtype if config.lora_rank else "float32"
    try:
        model = kind.from_pretrained(config.base, dtype=dtype_of(held))
        tokenizer = AutoTokenizer.from_pretrained(config.base)
    except OSError as error:
        raise ConfigError(
            f"sft.generator.base is {config.base!r}, which is neither a folder with such a model nor a reachable hub "
            f"name ({str(error).splitlines()[0]}). Give a folder, or leave it empty for the tiny model."
        ) from error
    prepare(model, config, seed=seed)
    return model, tokenizer


def prepare(model: Any, config: GeneratorConfig, *, seed: int = 0) -> None:
    """Adapters and checkpointing as the settings say, in place; a published model goes to the GPU if there is one."""
    if config.base and torch.cuda.is_available():
        model.to(torch.device("cuda", torch.cuda.current_device()))
    if config.lora_rank:
        model.to(dtype_of(config.dtype))
        with global_seed(seed, "adapters"):
            add_adapters(model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets)
    if config.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})


def dtype_of(name: str) -> torch.dtype:
    """The type of that name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def add_adapters(model: nn.Module, *, rank: int, alpha: int, targets: tuple[str, ...]) -> None:
    """Lay adapters beside the chosen projections of the language model, in place; nothing else learns from then on.

    Raises:
        ConfigError: the model has no projection of such a name.
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("peft", extra="train", needed_for="sft.generator.lora_rank") from error
    chosen = rf".*(language_model|text_model)\.layers\..*\.({'|'.join(targets)})"
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, lora_dropout=0.0)
    try:
        inject_adapter_in_model(lora, model)
    except ValueError as error:
        raise ConfigError(
            f"sft.generator.lora_targets is {', '.join(targets)}, but the model has no such projections "
            "(q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj are usual)."
        ) from error
    for name, value in model.named_parameters():
        value.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            value.data = value.data.float()


def given(module: nn.Module, prefix: str) -> frozenset[str]:
    """Names in a module's state, under ``prefix``, that are no adapters'."""
    return frozenset(name for name in module.state_dict() if name.startswith(prefix) and ".lora_" not in name)


def merged(state: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """A state with adapters → one of a plain model: W + scale * B A, under the names it was published with."""
    plain = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        key = name.replace(".base_layer.", ".")
        a, b = (state.get(name.replace("base_layer.weight", f"lora_{part}.{_NAME}.weight")) for part in "AB")
        if key != name and a is not None and b is not None:
            value = (value.float() + scale * (b.float() @ a.float())).to(value.dtype)
        plain[key] = value
    return plain


def save_weights(state: Mapping[str, Tensor], config: GeneratorConfig, folder: Path) -> GeneratorConfig:
    """Adapters alone, or a whole model, in safetensors. Returns the settings to open it with."""
    if config.lora_rank and config.lora_save == "adapter":
        save_file({name: value for name, value in state.items() if ".lora_" in name}, folder / ADAPTER)
        return config
    if config.lora_rank:
        state = merged(state, scale=config.lora_alpha / config.lora_rank)
        config = replace(config, lora_rank=0)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    return config


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Into a model that has adapters of the same shape.

    Raises:
        LineageError: the file fits another model.
    """
    state = load_file(folder / ADAPTER)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(".lora_" in name for name in missing):
        raise LineageError(f"{folder / ADAPTER} holds adapters of another model than the base it names.")
