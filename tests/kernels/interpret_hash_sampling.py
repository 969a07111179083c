"""SDIM's Triton kernels, interpreted. Run by ``triton_child.interpret``, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.hash_sampling import append, bucket_table, hash_sampling, lookup, random_planes, signatures

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LENGTHS = [0, 1, 31, 64, 65, 100, 0]


def error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written reads as NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "e", "groups", "bits"), [(16, 16, 16, 3), (24, 80, 5, 2), (3, 2, 1, 1), (8, 8, 7, 4)])
def test_equals_the_definition_with_gradients(dtype: torch.dtype, d: int, e: int, groups: int, bits: int) -> None:
    g = torch.Generator().manual_seed(0)
    offsets, n = torch.tensor([0, *LENGTHS]).cumsum(0), sum(LENGTHS)
    x, values = torch.randn(n, d, generator=g).to(dtype), torch.randn(n, e, generator=g).to(dtype).requires_grad_()
    planes = random_planes(d, groups=groups, bits=bits)
    row_user = torch.tensor([5, 1, 0, 0, 2, 4, 6, 3, 3])
    candidates = torch.randn(len(row_user), d, generator=g).to(dtype)
    exact = values.detach().double().requires_grad_()

    def run(backend: dispatch.Wish, v: Tensor, x: Tensor, c: Tensor, p: Tensor) -> list[Tensor]:
        with dispatch.use(backend):
            table = bucket_table(x, offsets, p, values=v)
            out = [table]
            for normalise in (True, False):
                out.append(lookup(table, c, p, row_user=row_user, normalise=normalise))
                out.append(hash_sampling(c, x, offsets, p, values=v, row_user=row_user, normalise=normalise))
        weight = torch.Generator().manual_seed(1)
        for one in list(out):
            loss = (one * torch.randn(one.shape, generator=weight)).sum()
            out += torch.autograd.grad(loss, v, retain_graph=True)
        return out

    wanted = run("torch", exact, x.double(), candidates.double(), planes.double())
    for got, want in zip(run("triton", values, x, candidates, planes), wanted, strict=True):
        assert error(got, want) < LIMIT[dtype]
    with dispatch.use("triton"):
        got = signatures(x, planes)
    with dispatch.use("reference"):
        assert torch.equal(got, signatures(x, planes))


def test_nothing_in_the_bucket_is_zeros_and_finite_gradients() -> None:
    planes, opposite = random_planes(4), torch.ones(1, 4)
    x = torch.cat([-opposite, torch.zeros(2, 4)]).requires_grad_()
    candidates = torch.cat([opposite, opposite, torch.zeros(1, 4)])
    with dispatch.use("triton"):
        out = hash_sampling(candidates, x, torch.tensor([0, 1, 1, 3]), planes)
        (d_x,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, torch.zeros(3, 4))
    assert torch.equal(d_x, torch.zeros(3, 4))


def test_appending_is_rebuilding() -> None:
    planes = random_planes(8, groups=4)
    x = torch.randint(-8, 9, (40, 8), generator=torch.Generator().manual_seed(5)).float()
    with dispatch.use("triton"):
        table = append(bucket_table(x[:33], torch.tensor([0, 33]), planes), x[33:], torch.tensor([0, 7]), planes)
        assert torch.equal(table, bucket_table(x, torch.tensor([0, 40]), planes))


def test_what_the_kernel_does_not_cover_is_said() -> None:
    x, offsets = torch.zeros(2, 4), torch.tensor([0, 2])
    with dispatch.use("triton"), pytest.raises(ValueError, match="8 groups of 64 buckets"):
        bucket_table(x, offsets, random_planes(4, groups=8, bits=6))
    with dispatch.use("triton"), pytest.raises(ValueError, match="rows wider than 128"):
        bucket_table(torch.zeros(2, 129), offsets, random_planes(129))
