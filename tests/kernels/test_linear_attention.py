"""Linear attention against its definition: values, every gradient, chunks, states, limits, jagged lists, causality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.checks import KernelError, KernelTypeError
from couturier.kernels.linear_attention import linear_attention, slopes_by_layer, slopes_tnl
from couturier.kernels.linear_attention.reference import quadratic

Triple = tuple[Tensor, Tensor, Tensor]
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written reads as NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, NaN if anything is."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


def each(x: Triple, change: Callable[[Tensor], Tensor]) -> Triple:
    return change(x[0]), change(x[1]), change(x[2])


def case(*lead: int, d: int, e: int, heads: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Triple:
    g = torch.Generator().manual_seed(seed)

    def normal(width: int) -> Tensor:
        return torch.randn(*lead, heads, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return normal(d), normal(d), normal(e)


def grads(out: Tensor, leaves: Sequence[Tensor], *more: Tensor) -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    loss = sum((one * torch.randn(one.shape, generator=g, dtype=torch.float64)).sum() for one in (out, *more))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100])
@pytest.mark.parametrize(("d", "e", "chunk"), [(16, 16, 16), (32, 24, 32), (64, 64, 64), (128, 128, 32), (5, 3, 7)])
def test_equals_the_square_with_all_gradients(length: int, d: int, e: int, chunk: int) -> None:
    leaves = case(2, length, d=d, e=e)
    slopes = torch.tensor([0.0, 0.05, 2.0], dtype=torch.float64)
    wanted = quadratic(*leaves, slopes)
    out, _ = linear_attention(*leaves, slopes, chunk=chunk)
    assert error(out, wanted) < LIMIT[torch.float64]
    for got, want in zip(grads(out, leaves), grads(wanted, leaves), strict=True):
        assert error(got, want) < LIMIT[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [65, 512])
def test_in_few_bits_stays_near(dtype: torch.dtype, length: int) -> None:
    leaves = case(2, length, d=32, e=32, dtype=dtype)
    exact = each(leaves, lambda x: x.detach().double().requires_grad_())
    slopes = slopes_tnl(3)
    out, _ = linear_attention(*leaves, slopes)
    wanted = quadratic(*exact, slopes.double())
    assert out.dtype == dtype
    assert error(out, wanted) < LIMIT[dtype]
    for got, want in zip(grads(out, leaves), grads(wanted, exact), strict=True):
        assert got.dtype == dtype
        assert error(got, want) < LIMIT[dtype]


def test_the_written_backward_is_the_derivative() -> None:
    q, k, v = case(1, 7, d=3, e=2, heads=2)
    state = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    slopes = torch.tensor([0.1, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v, state: linear_attention(q, k, v, slopes, initial_state=state, chunk=3), (q, k, v, state)
    )


def test_the_chunk_changes_nothing() -> None:
    leaves = case(2, 50, d=8, e=8)
    slopes = slopes_by_layer(3).double()
    want, state = linear_attention(*leaves, slopes, chunk=1)
    wanted = grads(want, leaves, state)
    for chunk in (2, 7, 25, 50, 999):
        out, final = linear_attention(*leaves, slopes, chunk=chunk)
        assert error(out, want) < 1e-13
        assert error(final, state) < 1e-13
        assert all(error(got, one) < 1e-13 for got, one in zip(grads(out, leaves, final), wanted, strict=True))


@pytest.mark.parametrize("cut", [0, 1, 31, 32, 33, 69, 70])
def test_a_cut_history_and_its_state_are_the_whole(cut: int) -> None:
    leaves = case(2, 70, d=8, e=6)
    slopes = slopes_tnl(3).double()
    want, state = linear_attention(*leaves, slopes)
    first, kept = linear_attention(*each(leaves, lambda x: x[:, :cut]), slopes)
    second, final = linear_attention(*each(leaves, lambda x: x[:, cut:]), slopes, initial_state=kept)
    out = torch.cat([first, second], 1)
    assert error(out, want) < 1e-13
    assert error(final, state) < 1e-13
    pairs = zip(grads(out, leaves, final), grads(want, leaves, state), strict=True)
    assert all(error(got, one) < 1e-13 for got, one in pairs)


def test_limits_of_decay() -> None:
    q, k, v = (x.detach() for x in case(1, 40, d=8, e=8, heads=1))
    everything, _ = linear_attention(q, k, v, torch.zeros(1, dtype=torch.float64))
    sums = (k[..., :, None] * v[..., None, :]).cumsum(1)
    assert error(everything, (sums * q[..., None]).sum(-2)) < 1e-13
    only_now, state = linear_attention(q, k, v, torch.full((1,), 1e4, dtype=torch.float64))
    assert error(only_now, (q * k).sum(-1, keepdim=True) * v) < 1e-13
    assert error(state, k[:, -1, :, :, None] * v[:, -1, :, None, :]) < 1e-13
    infinite, _ = linear_attention(q, k, v, torch.full((1,), 1e38, dtype=torch.float64))
    assert torch.equal(infinite, only_now)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(0, 10_000),
)
def test_a_jagged_batch_is_a_loop(lengths: list[int], heads: int, d: int, e: int, chunk: int, seed: int) -> None:
    leaves = case(sum(lengths), d=d, e=e, heads=heads, seed=seed)
    g = torch.Generator().manual_seed(seed)
    slopes = torch.rand(heads, generator=g, dtype=torch.float64) * 2
    state = torch.randn(len(lengths), heads, d, e, generator=g, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    out, final = linear_attention(*leaves, slopes, initial_state=state, offsets=offsets, chunk=chunk)
    with dispatch.use("reference"):
        want, end = linear_attention(*leaves, slopes, initial_state=state, offsets=offsets)
    assert error(final, end) < 1e-12
    assert error(out, want) < 1e-12 or not out.numel()
    everything = [*leaves, state]
    for got, one in zip(grads(out, everything, final), grads(want, everything, end), strict=True):
        assert torch.allclose(got, one, atol=1e-11, rtol=1e-11)


def test_an_empty_sequence_keeps_its_state() -> None:
    q, k, v = (x.detach() for x in case(3, d=4, e=4))
    state = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    _, final = linear_attention(q, k, v, slopes_tnl(3), initial_state=state, offsets=torch.tensor([0, 0, 3, 3]))
    assert torch.equal(final[0], state[0])
    assert torch.equal(final[2], state[2])
    assert not torch.equal(final[1], state[1])


@pytest.mark.parametrize("t", [0, 1, 31, 32, 50, 64, 69])
def test_the_future_does_not_leak(t: int) -> None:
    leaves = each(case(1, 70, d=16, e=16), lambda x: x.detach().float())
    before, _ = linear_attention(*leaves, slopes_tnl(3))
    for x in leaves:
        x[:, t] += 1
    after, _ = linear_attention(*leaves, slopes_tnl(3))
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])


def test_strides_and_autocast_do_not_matter() -> None:
    q, k, v = (x.detach().float() for x in case(2, 40, d=8, e=8))
    want, _ = linear_attention(q, k, v, slopes_tnl(3))
    turned = each((q, k, v), lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    out, _ = linear_attention(*turned, slopes_tnl(3))
    assert torch.equal(out, want)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = linear_attention(q, k, v, slopes_tnl(3))
    assert torch.equal(again, want)


def test_schedules() -> None:
    first, last = slopes_tnl(8, layer=0, layers=12), slopes_tnl(8, layer=11, layers=12)
    assert first.tolist() == pytest.approx([2.0**-h * (1 + 1e-5) for h in range(1, 9)])
    assert last.tolist() == pytest.approx([2.0**-h * 1e-5 for h in range(1, 9)])
    # ALiBi's order where heads are no power of two: those of 4, then every second of 8.
    assert slopes_tnl(6).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], rel=1e-4)
    assert slopes_by_layer(4, layer=0, layers=4).tolist() == [0, 2, 4, 6]
    assert slopes_by_layer(4, layer=3, layers=4).tolist() == [0, 0.5, 1, 1.5]
    with pytest.raises(KernelError, match="layer is 4 of 4 layers; wanted 0 to 3"):
        slopes_by_layer(4, layer=4, layers=4)


def test_what_does_not_fit_is_said() -> None:
    q, k, v = (x.detach().float() for x in case(2, 5, d=4, e=4))
    slopes = slopes_tnl(3)
    with pytest.raises(KernelError, match="k .*axis T has size 3, but q has T = 5"):
        linear_attention(q, k.transpose(1, 2), v, slopes)
    with pytest.raises(KernelTypeError, match="k has dtype torch.float64"):
        linear_attention(q, k.double(), v, slopes)
    with pytest.raises(KernelError, match="slopes has the value -1"):
        linear_attention(q, k, v, -torch.ones(3))
    with pytest.raises(KernelError, match="slopes has the value nan"):
        linear_attention(q, k, v, torch.full((3,), torch.nan))
    with pytest.raises(KernelError, match="slopes wants a gradient"):
        linear_attention(q, k, v, slopes.requires_grad_())
    with pytest.raises(KernelError, match="ends at 7, but q has 10 rows"):
        linear_attention(*each((q, k, v), lambda x: x.flatten(0, 1)), slopes_tnl(3), offsets=torch.tensor([0, 7]))
    with pytest.raises(KernelTypeError, match="initial_state has dtype torch.float64"):
        linear_attention(q, k, v, slopes_tnl(3), initial_state=torch.zeros(2, 3, 4, 4, dtype=torch.float64))
    with pytest.raises(KernelError, match="chunk is 0"):
        linear_attention(q, k, v, slopes_tnl(3), chunk=0)
