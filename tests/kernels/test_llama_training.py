"""The compiled layers of a training pass beside the same in float64 with PyTorch's calls, and all their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from couturier.components.runtime import threads
from couturier.kernels import dispatch
from couturier.kernels.llama_layer import training
from couturier.kernels.llama_layer.training import Setting, Weights

pytestmark = pytest.mark.skipif(training.library(16) is None, reason="no C compiler")
EPS = 1e-5


def _weights(random: torch.Generator, heads: int, kv_heads: int, d: int, width: int, wide: int) -> Weights:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random) * size[-1] ** -0.5

    return Weights(
        norm=1 + 0.3 * normal(width),
        mlp_norm=1 + 0.3 * normal(width),
        q=normal(heads * d, width),
        k=normal(kv_heads * d, width),
        v=normal(kv_heads * d, width),
        out=normal(width, heads * d),
        gate=normal(wide, width),
        up=normal(wide, width),
        down=normal(width, wide),
    )


class Case:
    """Layers, prompts of unlike length with samples behind them, and a gradient of what comes out."""

    def __init__(
        self, users: int, samples: int, own: int, prompt: int, heads: int, kv_heads: int, d: int, width: int, wide: int
    ) -> None:
        random = torch.Generator().manual_seed(users)
        tokens = prompt + samples * own
        self.setting = Setting(samples=samples, heads=heads, kv_heads=kv_heads, skip=prompt - 2, eps=EPS)
        self.layers = [_weights(random, heads, kv_heads, d, width, wide) for _ in range(3)]
        self.x_UTD = torch.randn(users, tokens, width, generator=random)
        self.mask_UP = torch.arange(prompt)[None] >= 3 * torch.arange(users)[:, None] % prompt
        angle_UTd = torch.randn(users, tokens, d // 2, generator=random).repeat(1, 1, 2)
        self.cos_UTd, self.sin_UTd = angle_UTd.cos(), angle_UTd.sin()
        self.grad_UQD = torch.randn(users, tokens - prompt + 2, width, generator=random)

    def leaves(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Weights]]:
        def leaf(value: Tensor) -> Tensor:
            return value.to(dtype).clone().requires_grad_()

        return leaf(self.x_UTD), [Weights(*map(leaf, layer)) for layer in self.layers]

    def compiled(self) -> list[Tensor]:
        """What comes out, and the gradients of what came in and of all weights."""
        x, layers = self.leaves()
        out = training.layers(x, layers, self.mask_UP, self.cos_UTd, self.sin_UTd, self.setting)
        return [out.detach(), *torch.autograd.grad(out, [x, *(one for w in layers for one in w)], self.grad_UQD)]

    def expected(self) -> list[Tensor]:
        """The same with PyTorch's calls in float64 over whole rows."""
        leaf, layers = self.leaves(torch.float64)
        x, keep_UTT = leaf, self.visible()
        for weights in layers:
            x = self.layer(x, weights, keep_UTT)
        out = x[:, self.setting.skip :]
        grads = torch.autograd.grad(out, [leaf, *(one for w in layers for one in w)], self.grad_UQD.double())
        return [out.detach(), *grads]

    def visible(self) -> Tensor:
        """Who may look at whom ``[U, T, T]``."""
        users, tokens, _ = self.x_UTD.shape
        prompt, samples = self.mask_UP.shape[1], self.setting.samples
        sample_T = torch.full((tokens,), -1)
        sample_T[prompt:] = torch.arange(samples).repeat_interleave((tokens - prompt) // samples)
        real_UT = torch.cat([self.mask_UP, torch.ones(users, tokens - prompt, dtype=torch.bool)], 1)
        same = (sample_T[:, None] == sample_T) | (sample_T == -1)
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        return (causal & same & real_UT[:, None]) | torch.eye(tokens, dtype=torch.bool)

    def layer(self, x: Tensor, w: Weights, keep_UTT: Tensor) -> Tensor:
        d, width = self.cos_UTd.shape[-1], x.shape[2]
        y = F.rms_norm(x, (width,), w.norm, EPS)
        q, k, v = ((y @ part.T).unflatten(-1, (-1, d)).transpose(1, 2) for part in (w.q, w.k, w.v))
        q, k = (self.turned(part) for part in (q, k))
        k, v = (part.repeat_interleave(self.setting.heads // self.setting.kv_heads, 1) for part in (k, v))
        score = (q @ k.transpose(-1, -2) * d**-0.5).masked_fill(~keep_UTT[:, None], float("-inf"))
        x = x + (score.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w.out.T
        y = F.rms_norm(x, (width,), w.mlp_norm, EPS)
        return x + (F.silu(y @ w.gate.T) * (y @ w.up.T)) @ w.down.T

    def turned(self, x_UHTd: Tensor) -> Tensor:
        one, two = x_UHTd.chunk(2, -1)
        cos, sin = (table[:, None].double() for table in (self.cos_UTd, self.sin_UTd))
        return x_UHTd * cos + torch.cat([-two, one], -1) * sin


CASES = {
    "eight heads of samples in eights": (2, 8, 16, 16, 8, 8, 16, 128, 96),
    "grouped heads, nothing divides": (3, 3, 5, 7, 4, 2, 16, 64, 96),
    "a gate narrower than rows, more than sixteen tokens": (5, 2, 19, 21, 2, 1, 32, 96, 32),
    "one sample a user, more tokens than a block": (2, 1, 150, 33, 2, 2, 16, 32, 64),
}


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_layers_and_all_their_gradients(name: str, cores: int) -> None:
    case = Case(*CASES[name])
    with threads(cores):
        found = case.compiled()
    expected = case.expected()
    assert len(found) == len(expected) == 2 + 3 * len(Weights._fields)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= 2e-5 * other.abs().max()


@pytest.mark.parametrize("cores", [1, 2])
def test_the_same_bits_every_time_and_without_a_gradient(cores: int) -> None:
    case = Case(*CASES["grouped heads, nothing divides"])
    with threads(cores), torch.no_grad():
        plain = training.layers(case.x_UTD, case.layers, case.mask_UP, case.cos_UTd, case.sin_UTd, case.setting)
    with threads(cores):
        first, second = case.compiled(), case.compiled()
    assert torch.equal(plain, first[0])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_user_does_not_depend_on_the_others() -> None:
    case = Case(*CASES["grouped heads, nothing divides"])
    both = [case.compiled()[:2]]
    for name in ("x_UTD", "mask_UP", "cos_UTd", "sin_UTd", "grad_UQD"):
        setattr(case, name, getattr(case, name)[1:2])
    both.append(case.compiled()[:2])
    assert all(torch.equal(whole[1:2], alone) for whole, alone in zip(*both, strict=True))


def test_only_what_learns_gets_a_gradient_and_changed_weights_are_noticed() -> None:
    case = Case(*CASES["grouped heads, nothing divides"])
    expected = case.compiled()
    given = (case.mask_UP, case.cos_UTd, case.sin_UTd, case.setting)
    x, layers = case.x_UTD.clone().requires_grad_(), case.layers
    (found,) = torch.autograd.grad(training.layers(x, layers, *given), [x], case.grad_UQD)
    assert torch.equal(found, expected[1])
    down = layers[0].down.clone().requires_grad_()
    layers = [layers[0]._replace(down=down), *layers[1:]]
    (found,) = torch.autograd.grad(training.layers(case.x_UTD, layers, *given), [down], case.grad_UQD)
    assert torch.equal(found, expected[2 + Weights._fields.index("down")])
    out = training.layers(case.x_UTD, layers, *given)
    with torch.no_grad():
        down.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_is_covered() -> None:
    weights = _weights(torch.Generator(), 4, 2, 16, 64, 96)
    assert training.covers(weights, head=16)
    assert not training.covers(weights, head=24)
    assert not training.covers(weights._replace(down=weights.down.bfloat16()), head=16)
    assert not training.covers(weights._replace(down=weights.down.t().contiguous().t()), head=16)
    assert not training.covers(_weights(torch.Generator(), 4, 2, 16, 64, 80), head=16)
    with dispatch.use("torch"):
        assert not training.covers(weights, head=16)
