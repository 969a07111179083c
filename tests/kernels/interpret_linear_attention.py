"""Linear attention's Triton kernel, interpreted. Run by ``triton_child.interpret``, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.linear_attention import linear_attention, slopes_by_layer, slopes_tnl

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LENGTHS = [0, 1, 63, 64, 65, 100, 0]


def error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


def run(backend: dispatch.Wish, leaves: list[Tensor], slopes: Tensor, offsets: Tensor) -> list[Tensor]:
    """Output, final state and all gradients."""
    q, k, v, state = leaves
    with dispatch.use(backend):
        out, final = linear_attention(q, k, v, slopes, initial_state=state, offsets=offsets)
    g = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=g)).sum() + (final * torch.randn(final.shape, generator=g)).sum()
    return [out, final, *torch.autograd.grad(loss, leaves)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written reads as NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "d", "e"), [(1, 16, 16), (3, 24, 40), (2, 5, 3)])
def test_equals_the_definition_with_all_gradients(dtype: torch.dtype, heads: int, d: int, e: int) -> None:
    g = torch.Generator().manual_seed(0)
    n, users = sum(LENGTHS), len(LENGTHS)
    leaves = [torch.randn(n, heads, width, generator=g).to(dtype).requires_grad_() for width in (d, d, e)]
    leaves.append(torch.randn(users, heads, d, e, generator=g).requires_grad_())
    exact = [x.detach().double().requires_grad_() for x in leaves]
    slopes, offsets = slopes_by_layer(heads) + 0.01, torch.tensor([0, *LENGTHS]).cumsum(0)
    wanted = run("torch", exact, slopes.double(), offsets)
    for got, want in zip(run("triton", leaves, slopes, offsets), wanted, strict=True):
        assert error(got, want) < LIMIT[dtype]


@pytest.mark.parametrize("slope", [0.0, 50.0, 1e30])
def test_limits_of_decay(slope: float) -> None:
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 70, 1, 16, generator=g) for _ in range(3))
    with dispatch.use("triton"):
        got, state = linear_attention(q, k, v, torch.tensor([slope]))
    with dispatch.use("reference"):
        want, final = linear_attention(q, k, v, torch.tensor([slope]))
    assert error(got, want) < 1e-5
    assert error(state, final) < 1e-5


def test_a_state_that_is_kept_continues() -> None:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 50, 2, 16, generator=g) for _ in range(3))
    slopes = slopes_tnl(2)
    with dispatch.use("triton"):
        whole, state = linear_attention(q, k, v, slopes)
        first, kept = linear_attention(q[:, :33], k[:, :33], v[:, :33], slopes)
        second, final = linear_attention(q[:, 33:], k[:, 33:], v[:, 33:], slopes, initial_state=kept)
    assert error(torch.cat([first, second], 1), whole) < 1e-6
    assert error(final, state) < 1e-6


def test_the_future_does_not_leak() -> None:
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 70, 1, 16, generator=g) for _ in range(3))
    with dispatch.use("triton"):
        before, _ = linear_attention(q, k, v, slopes_tnl(1))
        for x in (q, k, v):
            x[:, 40] += 1
        after, _ = linear_attention(q, k, v, slopes_tnl(1))
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


def test_what_the_kernel_does_not_cover_is_said() -> None:
    wide = torch.zeros(1, 2, 1, 256)
    with dispatch.use("triton"), pytest.raises(ValueError, match="heads wider than 128"):
        linear_attention(wide, wide, wide, slopes_tnl(1))
