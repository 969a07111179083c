"""The compiled layers beside the same in float64 with PyTorch's calls, and what happens without a compiler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from couturier.kernels import compiled, dispatch, llama_layer
from couturier.kernels.shared_prefix import reference

compiles = pytest.mark.skipif(llama_layer.library(16) is None, reason="no C compiler")
EPS = 1e-5


def normal(random: torch.Generator, *size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(size, generator=random, dtype=torch.float64)


def rotated(x_XHd: Tensor, cos_Xd: Tensor, sin_Xd: Tensor) -> Tensor:
    one, two = x_XHd.chunk(2, -1)
    return x_XHd * cos_Xd[..., None, :] + torch.cat([-two, one], -1) * sin_Xd[..., None, :]


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


@compiles
@pytest.mark.parametrize(("samples", "heads", "kv_heads", "d"), [(5, 2, 2, 16), (1, 4, 2, 16), (9, 2, 1, 32)])
def test_steps_are_layers(samples: int, heads: int, kv_heads: int, d: int) -> None:
    """Grouped heads, prompts of unlike length, samples that do not divide into blocks, more than sixteen tokens."""
    random = torch.Generator().manual_seed(samples)
    layers, prompts, prompt, tokens, width, wide = 2, 3, 21, 18, 64, 96
    row_R = torch.tensor([0, 2, 1, 0])
    rows, joined = len(row_R), (heads + 2 * kv_heads) * d
    mask_NP = torch.ones(prompts, prompt, dtype=torch.bool)
    mask_NP[1, :9] = mask_NP[2, :20] = False
    sizes = ((width, joined), (heads * d, width), (width, 2 * wide), (wide, width))
    weights = [[normal(random, *size, scale=size[0] ** -0.5) for size in sizes] for _ in range(layers)]
    angle_RTd = normal(random, rows, tokens, d // 2).repeat(1, 1, 2)
    cos, sin = angle_RTd.cos(), angle_RTd.sin()
    k, v = normal(random, layers, prompts, prompt, kv_heads, d), normal(random, layers, prompts, prompt, kv_heads, d)
    steps = llama_layer.Steps(
        [llama_layer.Weights.of(*(one.float() for one in layer), head=d) for layer in weights],
        mask_NP,
        row_R,
        samples=samples,
        heads=heads,
        kv_heads=kv_heads,
        cos_RTd=cos.float(),
        sin_RTd=sin.float(),
        eps=EPS,
    )
    for i in range(layers):
        steps.keep(i, k[i].float(), v[i].float())
    own: list[list[Tensor]] = [[] for _ in range(2 * layers)]
    for t in range(tokens):
        x = normal(random, rows, samples, width)
        found = steps.step(x.float().flatten(0, 1), t)
        for i, (qkv, out, gate_up, down) in enumerate(weights):
            parts = (unit(x) @ qkv).unflatten(-1, (-1, d)).split([heads, kv_heads, kv_heads], 2)
            q, key = (rotated(part, cos[:, None, t], sin[:, None, t]) for part in parts[:2])
            own[2 * i].append(key)
            own[2 * i + 1].append(parts[2])
            mine = [torch.stack(kept, 3) for kept in own[2 * i : 2 * i + 2]]
            shared = (k[i][row_R].transpose(1, 2), v[i][row_R].transpose(1, 2))
            x = x + reference(q, *shared, mask_NP[row_R], *mine).flatten(2) @ out
            gate, up = (unit(x) @ gate_up).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ down
        torch.testing.assert_close(found.double(), x.flatten(0, 1), rtol=1e-4, atol=2e-5)


@compiles
@pytest.mark.parametrize("rows", [1, 7, 8, 21])
def test_products(rows: int) -> None:
    random = torch.Generator().manual_seed(rows)
    x, weight = normal(random, rows, 48), normal(random, 48, 96)
    packed = llama_layer.packed(weight.float(), head=16)
    found = llama_layer.product(x.float(), packed, torch.empty(rows, 96), head=16)
    torch.testing.assert_close(found.double(), x @ weight, rtol=1e-4, atol=1e-4)


@compiles
def test_norm_and_gate() -> None:
    random = torch.Generator().manual_seed(0)
    x, gate, up = normal(random, 3, 7, 64), normal(random, 5, 96, scale=4.0), normal(random, 5, 96)
    found = llama_layer.norm(x.float(), EPS, head=16)
    torch.testing.assert_close(found.double(), unit(x), rtol=1e-5, atol=1e-6)
    found = llama_layer.swiglu(torch.cat([gate, up], -1).float(), head=16)
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=1e-5, atol=1e-5)


@compiles
def test_what_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(1)
    assert llama_layer.covers(64, 96, head=16, like=like)
    assert not llama_layer.covers(64, 100, head=16, like=like)
    assert not llama_layer.covers(64, 96, head=24, like=like)
    assert not llama_layer.covers(64, 96, head=16, like=like.bfloat16())
    assert not llama_layer.covers(64, 96, head=16, like=like.to("meta"))
    with dispatch.use("torch"):
        assert not llama_layer.covers(64, 96, head=16, like=like)
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(compiled, "library", compiled.library.__wrapped__)
    monkeypatch.setattr(llama_layer, "library", llama_layer.library.__wrapped__)
    assert not llama_layer.covers(64, 96, head=16, like=like)
    with pytest.raises(RuntimeError, match="covers"):
        llama_layer.norm(torch.ones(2, 16), EPS, head=16)
