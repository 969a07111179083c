"""causal_attention, compiled and with PyTorch's calls, beside its definition, and what it must not see."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from couturier.kernels import compiled, dispatch
from couturier.kernels.causal_attention import causal_attention, native
from couturier.kernels.checks import KernelError, KernelTypeError
from couturier.kernels.verify import error

LENGTHS = (0, 1, 2, 15, 16, 17, 50, 0, 63, 64, 65, 200, 0)
LIMIT = 2e-6

compiles = pytest.mark.skipif(native.library(16) is None, reason="no C compiler (cc or gcc) here")
ways = pytest.mark.parametrize("way", [pytest.param("auto", marks=compiles), "torch"])


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls are compiled, too."""
    monkeypatch.setattr(native, "_LEAST", 0)


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def made(rows: int, heads: int, width: int, *, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values and what the answer's gradient is, in float64."""
    g = torch.Generator().manual_seed(seed)
    scales = (3.0, 1.0, 1.0, 1.0)
    return [scale * torch.randn(rows, heads, width, generator=g, dtype=torch.float64) for scale in scales]


def attend(leaves: Sequence[Tensor], offsets: Tensor) -> Tensor:
    q, k, v = leaves
    return causal_attention(q, k, v, offsets)


def results(way: dispatch.Wish, tensors: list[Tensor], offsets: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The answer and the gradients of queries, keys and values."""
    *leaves, grad = (one.to(dtype).detach().requires_grad_() for one in tensors)
    with dispatch.use(way):
        out = attend(leaves, offsets)
    assert out.dtype == dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.detach())]


@ways
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("width", [8, 16, 32, 48, 64])
def test_equals_the_definition(way: dispatch.Wish, heads: int, width: int) -> None:
    offsets = offsets_of(LENGTHS)
    tensors = made(int(offsets[-1]), heads, width)
    wanted = results("reference", tensors, offsets, torch.float64)
    found = results(way, tensors, offsets, torch.float32)
    far = [error(one, two) for one, two in zip(found, wanted, strict=True)]
    assert max(far) < LIMIT, far


@ways
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 50, 64, 65])
def test_lists_of_one_length(way: dispatch.Wish, length: int) -> None:
    offsets = offsets_of((length,) * 3)
    tensors = made(3 * length, 2, 16)
    wanted = results("reference", tensors, offsets, torch.float64)
    far = [error(a, b) for a, b in zip(results(way, tensors, offsets, torch.float32), wanted, strict=True)]
    # The only row of a list has one weight, 1, whatever it asks for.
    assert max(far[:1] + far[-1:] if length == 1 else far) < LIMIT, far


@pytest.mark.parametrize("way", ["reference", "torch"])
def test_gradients_are_slopes(way: dispatch.Wish) -> None:
    offsets = offsets_of((3, 0, 1, 5))
    leaves = [one.requires_grad_() for one in made(9, 2, 4)[:3]]
    with dispatch.use(way):
        assert torch.autograd.gradcheck(lambda *some: attend(some, offsets), leaves)


@compiles
def test_compiled_gradients_are_slopes() -> None:
    """Steps as large as float32 wants, along some direction of all tensors at once."""
    offsets = offsets_of((3, 0, 1, 18))
    *leaves, grad = made(22, 2, 16)
    directions = made(22, 2, 16, seed=1)[:3]
    _, *slopes = results("auto", [*leaves, grad], offsets, torch.float32)
    wanted = sum(float((one.double() * two).sum()) for one, two in zip(slopes, directions, strict=True))
    ends = []
    for step in (-1e-4, 1e-4):
        moved = [one + step * two for one, two in zip(leaves, directions, strict=True)]
        ends.append(results("reference", [*moved, grad], offsets, torch.float64)[0])
    assert float(((ends[1] - ends[0]) * grad).sum()) / 2e-4 == pytest.approx(wanted, rel=1e-4)


@ways
def test_nothing_is_seen_of_the_future(way: dispatch.Wish) -> None:
    offsets = offsets_of((50, 7))
    tensors = made(57, 2, 16)
    before = results(way, tensors, offsets, torch.float32)[0]
    for row in (1, 15, 16, 33, 49):
        later = [one.clone() for one in tensors]
        for one in later[:3]:
            one[row:50] = 9 * one[row:50].flip(0)
        after = results(way, later, offsets, torch.float32)[0]
        assert torch.equal(after[:row], before[:row])
        assert torch.equal(after[50:], before[50:])
        assert not torch.isclose(after[row:50], before[row:50]).all()


@compiles
def test_rows_that_come_later_leave_the_bits() -> None:
    tensors = made(200, 1, 32)
    whole = results("auto", tensors, offsets_of((200,)), torch.float32)[0]
    for length in (1, 7, 8, 9, 16, 47, 65):
        some = results("auto", [one[:length] for one in tensors], offsets_of((length,)), torch.float32)[0]
        assert torch.equal(some, whole[:length])


@compiles
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["queries", "keys", "values", "gradient"])
def test_what_is_no_number_stays_where_it_is_looked_at(bad: float, which: int) -> None:
    lengths, row = (5, 0, 40, 20), 5 + 21
    offsets = offsets_of(lengths)
    tensors = made(65, 2, 16)
    before = results("auto", tensors, offsets, torch.float32)
    tensors[which][row, 1] = bad
    out, *grads = results("auto", tensors, offsets, torch.float32)
    theirs = torch.ones(65, dtype=torch.bool)
    theirs[5:45] = False
    for found, was in zip((out, *grads), before, strict=True):
        assert torch.equal(found[theirs], was[theirs])
        assert torch.equal(found[:, 0], was[:, 0])
    assert torch.equal(out[:row], before[0][:row])
    if which == 3:
        # What row 21 gives reaches the keys and values up to it.
        assert torch.equal(grads[2][row + 1 : 45], before[3][row + 1 : 45])
        assert not grads[2][5 : row + 1, 1].isfinite().any()
    else:
        assert not out[row, 1].isfinite().all()


@ways
def test_large_scores(way: dispatch.Wish) -> None:
    offsets = offsets_of((20, 3))
    tensors = made(23, 1, 16)
    tensors[0] *= 300
    wanted = results("reference", tensors, offsets, torch.float64)
    found = results(way, tensors, offsets, torch.float32)
    assert error(found[0], wanted[0]) < 1e-4
    assert all(one.isfinite().all() for one in found)


@compiles
def test_compiled_and_not_agree_on_rows_that_lie_apart() -> None:
    """Keys and values are halves of one product, as a block makes them; gradients come back through them."""
    offsets = offsets_of((30, 2, 17))
    q_NW, kv_NX, grad = (one.float() for one in (*(x.flatten(1) for x in made(49, 4, 32)[:2]), made(49, 2, 32)[3]))
    found = []
    both: tuple[dispatch.Wish, ...] = ("auto", "torch")
    for way in both:
        leaves = [q_NW[:, :64].clone().requires_grad_(), kv_NX.clone().requires_grad_()]
        parts = [one.unflatten(-1, (2, 32)) for one in (leaves[0], *leaves[1].chunk(2, -1))]
        with dispatch.use(way):
            out = attend(parts, offsets)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert max(error(one, two) for one, two in zip(*found, strict=True)) < LIMIT


@compiles
def test_threads_do_not_matter() -> None:
    offsets = offsets_of(LENGTHS)
    tensors = made(int(offsets[-1]), 2, 16)
    threads, found = torch.get_num_threads(), []
    try:
        for many in (1, 2, 3):
            torch.set_num_threads(many)
            found.append(results("auto", tensors, offsets, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@ways
def test_autocast_takes_its_dtype_and_gives_gradients_in_theirs(way: dispatch.Wish) -> None:
    offsets = offsets_of((20, 3))
    leaves = [one.float().requires_grad_() for one in made(23, 1, 16)[:3]]
    with dispatch.use(way):
        exact = attend(leaves, offsets)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = attend([leaves[0].bfloat16(), *leaves[1:]], offsets)
            grads = torch.autograd.grad(narrow.float().sum(), leaves)
    assert narrow.dtype == torch.bfloat16
    assert error(narrow, exact) < 3e-2
    assert all(one.dtype == torch.float32 for one in grads)


@ways
def test_backward_inside_autocast(way: dispatch.Wish) -> None:
    offsets = offsets_of((20, 3))
    leaves = [one.float().requires_grad_() for one in made(23, 1, 16)[:3]]
    with dispatch.use(way):
        out = attend(leaves, offsets)
    wanted = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out.sum(), leaves)
    assert max(error(one, two) for one, two in zip(found, wanted, strict=True)) < LIMIT


@ways
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_nobody_and_nothing(way: dispatch.Wish, lengths: tuple[int, ...]) -> None:
    out, *grads = results(way, made(0, 2, 16), offsets_of(lengths), torch.float32)
    assert out.shape == (0, 2, 16)
    assert all(one.shape == (0, 2, 16) for one in grads)


@compiles
def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(40, 2, 16)
    assert native.covers(q)
    assert not native.covers(q[..., :8])
    assert not native.covers(q.double())
    assert not native.covers(q.to("meta"))
    with dispatch.use("torch"):
        assert not native.covers(q)
    monkeypatch.setattr(native, "_LEAST", q.numel() + 1)
    assert not native.covers(q)
    monkeypatch.setattr(native, "_LEAST", 0)
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(compiled, "library", compiled.library.__wrapped__)
    assert not native.covers(q)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = (one.float() for one in made(5, 2, 16))
    offsets = offsets_of((2, 3))
    with pytest.raises(KernelError, match=r"k \[N, A, E\]: axis N has size 4, but q has N = 5"):
        causal_attention(q, k[:4], v, offsets)
    with pytest.raises(KernelError, match="axis A has size 1"):
        causal_attention(q, k, v[:, :1], offsets)
    with pytest.raises(KernelError, match="axis E has size 8"):
        causal_attention(q, k[..., :8], v, offsets)
    with pytest.raises(KernelError, match="wants 3 axes"):
        causal_attention(q.flatten(1), k.flatten(1), v.flatten(1), offsets)
    with pytest.raises(KernelError, match="offsets ends at 4, but q has 5 rows"):
        causal_attention(q, k, v, offsets_of((2, 2)))
    with pytest.raises(KernelError, match="offsets falls"):
        causal_attention(q, k, v, torch.tensor([0, 3, 2, 5]))
    with pytest.raises(KernelTypeError, match="offsets has dtype"):
        causal_attention(q, k, v, offsets.int())
    with pytest.raises(KernelTypeError, match="k has dtype"):
        causal_attention(q, k.double(), v, offsets)
    with pytest.raises(KernelError, match="wanted a head and a width"):
        causal_attention(q[:, :0], k[:, :0], v[:, :0], offsets)
