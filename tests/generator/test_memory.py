"""The estimate against what models of these shapes really hold and keep."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.generator.memory import Memory, Work, estimate, free_bytes, main, require, shape_of
from couturier.components.generator.published import tell_memory

from .conftest import CODEBOOK, tiny_generator
from .published import publish_janus

TARGETS = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def base(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_janus(tiny_generator(catalogue), tmp_path_factory.mktemp("published"))


def opened(base: str, catalogue: Catalogue, **changes: object) -> JanusGenerator:
    config = dataclasses.replace(GeneratorConfig(base=base, history=3, max_words=2), **changes)  # type: ignore[arg-type]
    return JanusGenerator.published(config, catalogue)


def held(generator: JanusGenerator) -> tuple[int, int]:
    """Bytes of the weights, and elements that learn."""
    weights = sum(p.numel() * p.element_size() for p in generator.parameters())
    return weights, sum(p.numel() for p in generator.parameters_to_train())


@pytest.mark.parametrize("rank,dtype", [(0, "float32"), (4, "float32"), (4, "bfloat16")])
def test_weights_are_counted_exactly_before_any_is_read(base: str, catalogue: Catalogue, rank: int, dtype: str) -> None:
    weights, learns = held(opened(base, catalogue, lora_rank=rank, lora_targets=TARGETS, dtype=dtype))
    (Path(base) / "model.safetensors").rename(Path(base) / "away")
    try:
        told = estimate(shape_of(base), Work(lora_rank=rank, lora_targets=TARGETS, dtype=dtype, items=len(catalogue)))
    finally:
        (Path(base) / "away").rename(Path(base) / "model.safetensors")
    assert told.weights == weights
    assert told.gradients == 4 * learns and told.moments == 8 * learns
    assert told.features == 40 * 4 * 16 * (4 if dtype == "float32" else 2)


def test_activations_and_logits_are_of_the_right_size(base: str, catalogue: Catalogue) -> None:
    """What autograd keeps for the gradient of a real step lies within a factor of two of the estimate."""
    generator = opened(base, catalogue).train()
    histories = np.tile(np.arange(3), (16, 1))
    codes = torch.randint(CODEBOOK, (16, 8, 4))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = generator.loss(histories, codes, keep_U=torch.ones(16, dtype=torch.bool), random=torch.Generator())[0]
    loss.backward()
    told = estimate(shape_of(base), Work(windows=16, targets=8, history=3, words=2))
    seen = sum(kept.values())
    assert 0.5 < (told.activations + told.attention + told.logits * 2 / 3) / seen < 2


def test_what_saves_memory_is_told_to_save_it(base: str) -> None:
    shape = shape_of(base)
    plain = Work(windows=32, targets=2)
    whole, thin = estimate(shape, plain), estimate(shape, dataclasses.replace(plain, lora_rank=2, lora_targets=TARGETS))
    assert thin.moments < 0.2 * whole.moments
    again = estimate(shape, dataclasses.replace(plain, checkpointing=True))
    assert again.activations < whole.activations
    halved = estimate(shape, dataclasses.replace(plain, shares=2))
    assert halved.weights < whole.weights and halved.activations == whole.activations
    drawing = estimate(shape, dataclasses.replace(plain, drawn=64, guided=True))
    assert whole.cache == 0 < drawing.cache


def test_what_cannot_fit_is_refused_with_the_way_out(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = Memory(**dict.fromkeys([field.name for field in dataclasses.fields(Memory)], 10**9))
    require(needed, 9 * 10**9, base="small")
    with pytest.raises(ConfigError, match=r"training big takes about 8\.8 GB.*8\.0 GB are free.*lora_rank=16.*fsdp"):
        require(needed, 8 * 10**9, base="big")
    assert free_bytes() > 10**6
    with pytest.raises(ConfigError, match="GB are free"):
        tell_memory(GeneratorConfig(base=base, history=10**5), {"windows": 10**5})
    main([base, "--windows", "4", "--lora-rank", "2"])
    assert "GB: weights" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["nowhere"])
    assert "neither a folder with a model nor a reachable hub name" in capsys.readouterr().err


def test_a_model_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="of type 'llama'; known are janus, emu3"):
        shape_of(str(tmp_path))
