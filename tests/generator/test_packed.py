"""The short way through a plain Llama equals the model's own forward under a mask, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from couturier.components.generator import packed
from couturier.components.generator.packed import packed_hidden, rms_norm
from couturier.components.runtime import global_seed, threads
from couturier.kernels import dispatch
from couturier.kernels.llama_layer import training

USERS, SAMPLES, OWN, PROMPT, WIDTH, COMPILED_WIDTH = 4, 3, 5, 7, 16, 64

compiles = pytest.mark.skipif(training.library(16) is None, reason="no C compiler")


def _llama(kv_heads: int = 4, width: int = WIDTH, **more: Any) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        **more,
    )
    with global_seed(0, "packed"):
        model = LlamaModel(config)
        for name, weight in model.named_parameters():
            nn.init.normal_(weight, mean=float("norm" in name), std=1.2 * width**-0.5)
    return model


def _batch(model: LlamaModel) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    mask_UP = torch.arange(PROMPT)[None] >= torch.tensor([0, 3, 6, 1])[:, None]
    width = model.config.hidden_size
    prompt_UPD = torch.randn(USERS, PROMPT, width, generator=random, requires_grad=True)
    own_UnSD = torch.randn(USERS, SAMPLES, OWN, width, generator=random, requires_grad=True)
    return [prompt_UPD, own_UnSD, mask_UP, (mask_UP.long().cumsum(1) - 1).clamp_min(0)]


def _both(model: LlamaModel, batch: list[Tensor]) -> dict[str, Tensor]:
    """What comes out, and the gradient of all that learns."""
    last_UD, rest_UnSD = packed_hidden(model, *batch)
    assert rest_UnSD.shape == (USERS, SAMPLES, OWN, last_UD.shape[1])
    leaves: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters() if "embed" not in name}
    leaves |= {"prompt": batch[0], "own": batch[1]}
    random = torch.Generator().manual_seed(1)
    loss = (last_UD * torch.randn(last_UD.shape, generator=random)).sum()
    loss = loss + (rest_UnSD * torch.randn(rest_UnSD.shape, generator=random)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True)) | {"last": last_UD.detach(), "rest": rest_UnSD.detach()}


def _own_forward(model: LlamaModel, batch: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    with monkeypatch.context() as patched:
        patched.setattr(packed, "_is_plain", lambda lm, x: False)
        return _both(model, batch)


@pytest.mark.parametrize(("kv_heads", "cores"), [(4, 1), (2, 1), (4, 2)])
def test_equals_the_models_own_forward(kv_heads: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama(kv_heads)
    batch = _batch(model)
    expected = _own_forward(model, batch, monkeypatch)
    calls: list[int] = []
    short = packed._plain_layers

    def counted(lm: LlamaModel, n: int, x_UTD: Tensor, mask_UP: Tensor, position_UT: Tensor) -> Tensor:
        calls.append(len(x_UTD))
        return short(lm, n, x_UTD, mask_UP, position_UT)

    monkeypatch.setattr(packed, "_plain_layers", counted)
    with threads(cores):
        found = _both(model, batch)
    assert sorted(calls) == [USERS // cores] * cores
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 2e-5 * value.abs().max(), name


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many users each call of the compiled layers had."""
    calls: list[int] = []
    run = training.layers

    def counted(x_UTD: Tensor, *given: Any) -> Tensor:
        calls.append(len(x_UTD))
        return run(x_UTD, *given)

    monkeypatch.setattr(packed, "_COMPILE_FROM", 1)
    monkeypatch.setattr(training, "layers", counted)
    return calls


@compiles
@pytest.mark.parametrize(("kv_heads", "cores"), [(4, 1), (2, 2)])
def test_compiled_layers_equal_the_models_own_forward(
    kv_heads: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = _llama(kv_heads, COMPILED_WIDTH), _calls(monkeypatch)
    batch = _batch(model)
    expected = _own_forward(model, batch, monkeypatch)
    assert not calls
    with threads(cores):
        found, again = _both(model, batch), _both(model, batch)
    assert calls == [USERS] * 2
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 2e-5 * value.abs().max(), name
        assert torch.equal(found[name], again[name])


@compiles
@pytest.mark.parametrize("why", ["adapter", "hook", "bias", "gelu", "small", "few users", "asked"])
def test_what_is_more_than_small_matrices_is_not_compiled(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapter(nn.Linear):
        """More than its weight, for all one knows."""

    more: dict[str, Any] = {"attention_bias": why == "bias", "hidden_act": "gelu" if why == "gelu" else "silu"}
    model, calls = _llama(4, COMPILED_WIDTH, **more), _calls(monkeypatch)
    down = model.layers[1].get_submodule("mlp.down_proj")
    if why == "adapter":
        model.layers[1].get_submodule("mlp").down_proj = Adapter(3 * COMPILED_WIDTH // 2, COMPILED_WIDTH, bias=False)
    if why == "hook":
        down.register_forward_hook(lambda *_: None)
    if why == "small":
        monkeypatch.setattr(packed, "_COMPILE_FROM", 1 << 18)
    with threads(USERS + 1 if why == "few users" else 1), dispatch.use("torch" if why == "asked" else "auto"):
        packed_hidden(model, *_batch(model))
    assert not calls


def test_shares_give_the_same_bits_every_time() -> None:
    model = _llama()
    with threads(2):
        first, second = _both(model, _batch(model)), _both(model, _batch(model))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_are_called_and_keep_the_batch_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Linear):
        """Stands for an adapter: more than its weight."""

        rows = 0

        def forward(self, x: Tensor) -> Tensor:
            Twice.rows = len(x)
            return 2 * super().forward(x)

    model = _llama()
    for layer in model.layers:
        layer.get_submodule("mlp").up_proj = Twice(WIDTH, 24, bias=False)
    batch = _batch(model)
    expected = _own_forward(model, batch, monkeypatch)
    with threads(2):
        found = _both(model, batch)
    assert Twice.rows == USERS
    torch.testing.assert_close(found["rest"], expected["rest"], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("why", ["checkpointing", "dropout", "dtype", "autocast"])
def test_what_is_not_plain_goes_through_the_models_own_forward(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama()
    batch = _batch(model)
    if why == "checkpointing":
        model.activation_checkpointing_enable()
    if why == "dropout":
        model.config.attention_dropout = 0.5
    if why == "dtype":
        model.bfloat16()
        batch[:2] = [x.bfloat16() for x in batch[:2]]
    calls: list[object] = []
    monkeypatch.setattr(packed, "_plain_layers", lambda *given: calls.append(given))
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        packed_hidden(model, *batch)
    assert not calls


def test_norm_and_its_gradient_are_torchs() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((3, 5, 8), 8, (3, 5, 8)))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(nn.functional.rms_norm(x, (8,), weight, 1e-3), [x, weight], grad)
    found = torch.autograd.grad(rms_norm(x, weight, 1e-3), [x, weight], grad)
    torch.testing.assert_close(found, expected)
