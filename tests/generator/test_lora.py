"""Adapters beside a published model: nothing moves at first, they alone learn, and both ways of saving give it back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from couturier.components.alignment.sharding import frozen_copy, learned_state, load_whole
from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.generator.language import LanguageGenerator
from couturier.components.generator.published import check_settings
from couturier.components.generator.types import load_generator

from .conftest import CODEBOOK, tiny_generator
from .published import publish_janus

HISTORY = np.array([[1, 2, 3], [4, 5, -1]])
CODES = torch.randint(CODEBOOK, (2, 3, 4), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_janus(tiny_generator(catalogue), tmp_path_factory.mktemp("published"))


def opened(base: str, catalogue: Catalogue, **changes: object) -> JanusGenerator:
    config = GeneratorConfig(base=base, history=3, max_words=2, lora_targets=("q_proj", "down_proj"))
    return JanusGenerator.published(dataclasses.replace(config, **changes), catalogue)  # type: ignore[arg-type]


def learn(generator: JanusGenerator, steps: int = 12) -> list[float]:
    parameters = generator.parameters_to_train()
    optimiser = torch.optim.AdamW(parameters, lr=0.03)
    losses = []
    for _ in range(steps):
        loss, _ = generator.loss(HISTORY, CODES, keep_U=torch.ones(2, dtype=torch.bool), random=torch.Generator())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def nats(generator: LanguageGenerator) -> torch.Tensor:
    return generator.eval().nats(HISTORY, CODES)


def test_adapters_start_at_the_published_model_and_learn_alone(base: str, catalogue: Catalogue) -> None:
    plain, adapted = opened(base, catalogue), opened(base, catalogue, lora_rank=2)
    torch.testing.assert_close(nats(plain), nats(adapted))
    again = opened(base, catalogue, lora_rank=2).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in adapted.state_dict().items())
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    losses = learn(adapted.train())
    assert losses[-1] < losses[0] - 0.05
    after = adapted.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and all(".lora_" in name and "language_model.layers" in name for name in moved)
    assert len(adapted.parameters_to_train()) == 2 * 2 * 2  # two layers, two projections, two matrices each


@pytest.mark.parametrize("save", ["adapter", "merged"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_of_saving_give_the_tuned_model_back(
    base: str, catalogue: Catalogue, save: str, dtype: str, tmp_path: Path
) -> None:
    tuned = opened(base, catalogue, lora_rank=2, lora_save=save, dtype=dtype, checkpointing=True)
    learn(tuned.train())
    tuned.eval().save(tmp_path)
    again = load_generator(tmp_path)
    assert isinstance(again, JanusGenerator)
    atol, rtol = (1e-4, 1e-5) if dtype == "float32" else (0.5, 0.05)
    torch.testing.assert_close(nats(again), nats(tuned), atol=atol, rtol=rtol)
    assert (nats(again) - nats(opened(base, catalogue, dtype=dtype))).abs().max() > 1
    if dtype == "float32":
        drawn = [each.sample(HISTORY, 3, seeds=[1, 2], guidance=1.5) for each in (again, tuned)]
        assert torch.equal(*drawn)
    if save == "adapter":
        names = load_file(tmp_path / "adapter.safetensors")
        assert all(".lora_" in name for name in names) and not (tmp_path / "model.safetensors").exists()
        assert len(again.parameters_to_train()) == len(tuned.parameters_to_train())  # alignment goes on with them
    else:
        assert not any(".lora_" in name for name in again.state_dict())


def test_bfloat16_halves_what_is_held_and_still_learns(base: str, catalogue: Catalogue) -> None:
    tuned = opened(base, catalogue, lora_rank=2, dtype="bfloat16")
    kinds = {name: value.dtype for name, value in tuned.named_parameters()}
    assert all(kind == (torch.float32 if ".lora_" in name else torch.bfloat16) for name, kind in kinds.items())
    losses = learn(tuned.train())
    assert losses[-1] < losses[0] - 0.05
    full = opened(base, catalogue, dtype="bfloat16")
    assert {value.dtype for value in full.parameters()} == {torch.float32}
    assert learn(full.train(), steps=3)[-1] < losses[0]
    assert int(tuned.eval().sample(HISTORY, 2, seeds=[1, 2]).max()) < CODEBOOK


def test_checkpointing_changes_no_gradient(base: str, catalogue: Catalogue) -> None:
    grads = []
    for checkpointing in (False, True):
        generator = opened(base, catalogue, checkpointing=checkpointing).train()
        generator.loss(HISTORY, CODES, keep_U=torch.ones(2, dtype=torch.bool), random=torch.Generator())[0].backward()
        grads.append([p.grad for p in generator.parameters_to_train()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_copy_shares_what_never_learns_and_a_checkpoint_leaves_it_out(base: str, catalogue: Catalogue) -> None:
    policy = opened(base, catalogue, lora_rank=2).train()
    reference = frozen_copy(policy)
    own = dict(policy.named_parameters())
    for name, value in reference.named_parameters():
        assert (value.data_ptr() == own[name].data_ptr()) == (".lora_" not in name)
    first = nats(reference)
    learn(policy)
    assert torch.equal(nats(reference), first) and not torch.equal(nats(policy), first)
    kept = learned_state(policy)
    assert kept and all(".lora_" in name for name in kept)
    fresh = opened(base, catalogue, lora_rank=2)
    load_whole(fresh, kept)
    torch.testing.assert_close(nats(fresh), nats(policy))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_whole(opened(base, catalogue), kept)


@pytest.mark.parametrize(
    "wrong,told",
    [
        ({"dtype": "float8"}, "choose one of float32, bfloat16"),
        ({"lora_rank": 2, "lora_targets": ()}, "at least one projection"),
        ({"lora_save": "both"}, "choose adapter or merged"),
        ({"base": "", "lora_rank": 2}, "for a published model"),
    ],
)
def test_settings_that_cannot_be_are_told(base: str, wrong: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_settings(dataclasses.replace(GeneratorConfig(base=base), **wrong))


def test_a_projection_that_is_not_there_is_told(base: str, catalogue: Catalogue) -> None:
    with pytest.raises(ConfigError, match="no such projections"):
        opened(base, catalogue, lora_rank=2, lora_targets=("c_attn",))
