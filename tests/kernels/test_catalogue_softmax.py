"""The cross-entropy over a catalogue beside the same in float64 with all its logits, with every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from couturier.kernels import compiled, dispatch
from couturier.kernels.catalogue_softmax import cross_entropy, native, reference, torch_impl
from couturier.kernels.checks import KernelError

compiles = pytest.mark.skipif(native.library(64) is None, reason="no C compiler")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]


def inputs(seed: int, rows: int, items: int, width: int, *, pool: bool = False, scale: float = 0.3) -> Inputs:
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return scale * torch.randn(size, generator=random)

    catalogue = 2 * items
    pool_S = torch.randint(catalogue, (items,), generator=random) if pool else None
    own = torch.randint(catalogue if pool else items, (rows,), generator=random)
    bias_S = normal(items) if pool else torch.zeros(items)
    share_K = torch.rand(rows, generator=random)
    return normal(rows, width), normal(rows), normal(items, width), bias_S, pool_S, own, share_K


def both(given: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients for states, own scores and items: as called, and of the reference in float64."""
    found: list[list[Tensor]] = []
    calls: list[tuple[Callable[..., Tensor], torch.dtype]] = [
        (cross_entropy, torch.float32),
        (reference.cross_entropy, torch.float64),
    ]
    for call, dtype in calls:
        states, own, items, bias, pool, items_of, share = given
        leaves = [one.to(dtype).requires_grad_() for one in (states, own, items)]
        loss = call(*leaves, bias.to(dtype), pool, items_of, share.to(dtype))
        found.append([loss.detach(), *torch.autograd.grad(3 * loss, leaves)])
    return found[0], found[1]


def assert_alike(found: list[Tensor], wanted: list[Tensor], scale: float = 1.0) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5 * scale, atol=2e-5 * scale)


@compiles
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "items", "width", "pool"), [(67, 997, 64, False), (129, 1056, 32, True)])
def test_compiled(monkeypatch: pytest.MonkeyPatch, threads: int, rows: int, items: int, width: int, pool: bool) -> None:
    """Rows and items that fill no whole tiles, drawn pools with doubles and biases, threads that each add up."""
    monkeypatch.setattr(native, "_LEAST", 0)
    called: list[int] = []
    work = native.loss_and_gradients

    def counted(*given: Any) -> Any:
        called.append(1)
        return work(*given)

    monkeypatch.setattr(native, "loss_and_gradients", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_alike(*both(inputs(rows, rows, items, width, pool=pool)))
    finally:
        torch.set_num_threads(before)
    assert called


@compiles
def test_few_rows_and_large_catalogues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_LEAST", 0)
    assert_alike(*both(inputs(0, 1, 40, 32)))
    assert_alike(*both(inputs(1, 19, 20_001, 32)))


@pytest.mark.parametrize("scale", [0.3, 6.0])  # the larger one's exponentials overflow
@pytest.mark.parametrize("pool", [False, True])
def test_in_pieces(monkeypatch: pytest.MonkeyPatch, scale: float, pool: bool) -> None:
    monkeypatch.setattr(torch_impl, "_PIECE", 7 * 31)
    with dispatch.use("torch"):
        assert_alike(*both(inputs(0, 40, 31, 5, pool=pool, scale=scale)), 10 * scale)


@compiles
def test_what_could_overflow_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_LEAST", 0)
    monkeypatch.setattr(native, "loss_and_gradients", None)
    assert_alike(*both(inputs(0, 40, 64, 32, scale=6.0)), 60.0)
    given = inputs(0, 40, 64, 32)
    given[0][3, 5] = torch.nan
    assert cross_entropy(*given).isnan()


@compiles
def test_what_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    states, items = torch.zeros(1024, 64), torch.zeros(100, 64)
    assert native.covers(states, items)
    assert not native.covers(states[:5], items)
    assert not native.covers(torch.zeros(4096, 40), torch.zeros(100, 40))
    assert not native.covers(states.to("meta"), items)
    with dispatch.use("torch"):
        assert not native.covers(states, items)
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(compiled, "library", compiled.library.__wrapped__)
    assert not native.covers(states, items)


def test_nothing_to_learn_from() -> None:
    found = cross_entropy(*inputs(0, 0, 31, 5))
    assert float(found) == 0.0


def test_mixed_precision_keeps_the_sum_in_full_width() -> None:
    states, own, items, bias, pool, items_of, share = inputs(0, 40, 31, 5)
    leaf = states.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(leaf, own, items, bias, pool, items_of, share)
    loss.backward()
    assert loss.dtype == torch.float32
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
    wanted = reference.cross_entropy(leaf.float(), own, items, bias, pool, items_of, share)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)


def test_bad_input_is_named() -> None:
    states, own, items, bias, pool, items_of, share = inputs(0, 4, 9, 8)
    with pytest.raises(KernelError, match="axis W has size 7"):
        cross_entropy(states, own, items[:, :7], bias, pool, items_of, share)
    with pytest.raises(KernelError, match="items_K has values"):
        cross_entropy(states, own, items, bias, pool, items_of + 9, share)
    with pytest.raises(KernelError, match="nothing to tell"):
        cross_entropy(states, own, items[:0], bias[:0], None, items_of, share)
    with pytest.raises(KernelError, match="pool"):
        cross_entropy(states, own, items, bias, torch.arange(5), items_of, share)
