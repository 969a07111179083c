"""SDIM against its definition: collisions, tables, appending, gradients, and what empty buckets must not do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.checks import KernelError, KernelTypeError
from couturier.kernels.hash_sampling import append, bucket_table, hash_sampling, lookup, random_planes, signatures


def error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, NaN if anything is."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


def whole_numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: their sums have no rounding, so "equal" can mean equal."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
@pytest.mark.parametrize("degrees", [15, 60, 90, 140])
def test_vectors_collide_as_often_as_their_angle_says(bits: int, degrees: int) -> None:
    theta = math.radians(degrees)
    planes = random_planes(2, groups=20_000, bits=bits, seed=degrees)
    a, b = signatures(torch.tensor([[1.0, 0.0], [math.cos(theta), math.sin(theta)]]), planes)
    chance = (1 - theta / math.pi) ** bits
    sigma = math.sqrt(chance * (1 - chance) / planes.shape[1])
    assert float((a == b).double().mean()) == pytest.approx(chance, abs=3 * sigma)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.lists(st.integers(0, 4), max_size=12),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_table_direct_and_definition_are_equal(
    lengths: list[int], rows: list[int], groups: int, bits: int, normalise: bool, seed: int
) -> None:
    x, candidates = whole_numbers(sum(lengths), 5, seed=seed), whole_numbers(len(rows), 5, seed=seed + 1)
    values = whole_numbers(sum(lengths), 3, seed=seed + 2)
    planes, offsets = random_planes(5, groups=groups, bits=bits, seed=seed), torch.tensor([0, *lengths]).cumsum(0)
    row_user = torch.tensor([row % len(lengths) for row in rows], dtype=torch.int64)
    with dispatch.use("reference"):
        wanted_table = bucket_table(x, offsets, planes, values=values)
        wanted = hash_sampling(candidates, x, offsets, planes, values=values, row_user=row_user, normalise=normalise)
    table = bucket_table(x, offsets, planes, values=values)
    assert torch.equal(table, wanted_table)
    served = lookup(table, candidates, planes, row_user=row_user, normalise=normalise)
    direct = hash_sampling(candidates, x, offsets, planes, values=values, row_user=row_user, normalise=normalise)
    for got in (served, direct):
        assert torch.allclose(got, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_on_long_lists(each: int, dtype: torch.dtype, limit: float, normalise: bool) -> None:
    g = torch.Generator().manual_seed(3)
    lengths = [0, 1, 2, 63, 64, 65, 200]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(sum(lengths), 16, generator=g).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    planes = random_planes(16)
    row_user = torch.arange(len(lengths)).repeat(each)
    candidates = torch.randn(len(row_user), 16, generator=g).to(dtype)
    weights = torch.randn(len(row_user), 16, generator=g)
    with dispatch.use("reference"):
        wanted = hash_sampling(
            candidates.double(), exact, offsets, planes.double(), row_user=row_user, normalise=normalise
        )
        (d_wanted,) = torch.autograd.grad((wanted * weights).sum(), exact)
    if dtype == torch.float64:
        planes = planes.double()
    for got in (
        hash_sampling(candidates, x, offsets, planes, row_user=row_user, normalise=normalise),
        lookup(bucket_table(x, offsets, planes), candidates, planes, row_user=row_user, normalise=normalise),
        torch.cat(
            [
                lookup(bucket_table(x, offsets, planes), one, planes, row_user=user, normalise=normalise)
                for one, user in zip(candidates.split(len(lengths)), row_user.split(len(lengths)), strict=True)
            ]
        ),
    ):
        (d_got,) = torch.autograd.grad((got * weights).sum(), x)
        assert error(got, wanted) < limit
        assert error(d_got, d_wanted) < limit


def test_the_gradient_is_the_derivative_and_stops_at_the_bits() -> None:
    g = torch.Generator().manual_seed(4)
    x, candidates = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (9, 4))
    values = torch.randn(9, 2, generator=g, dtype=torch.float64, requires_grad=True)
    planes, offsets = random_planes(3, groups=3, bits=2).double(), torch.tensor([0, 5, 9])
    row_user = torch.tensor([1, 0, 0, 1])

    def direct(v: Tensor) -> Tensor:
        return hash_sampling(candidates, x, offsets, planes, values=v, row_user=row_user)

    def served(v: Tensor) -> Tensor:
        return lookup(bucket_table(x, offsets, planes, values=v), candidates, planes, row_user=row_user)

    assert torch.autograd.gradcheck(direct, (values,))
    assert torch.autograd.gradcheck(served, (values,))
    x.requires_grad_()
    candidates.requires_grad_()
    loss = hash_sampling(candidates, x, offsets, planes, values=values, row_user=row_user).sum()
    assert all(one is None for one in torch.autograd.grad(loss, (x, candidates), allow_unused=True))


@pytest.mark.parametrize("batches", [1, 3, 10])
def test_appending_is_rebuilding(batches: int) -> None:
    lengths = torch.randint(0, 9, (batches, 4), generator=torch.Generator().manual_seed(batches))
    planes = random_planes(6, groups=5)
    parts = [whole_numbers(int(one.sum()), 6, seed=i) for i, one in enumerate(lengths)]
    offsets = [torch.cat([one.new_zeros(1), one.cumsum(0)]) for one in lengths]
    table = bucket_table(parts[0], offsets[0], planes)
    for part, at in zip(parts[1:], offsets[1:], strict=True):
        table = append(table, part, at, planes)
    mine = [part[at[u] : at[u + 1]] for u in range(4) for part, at in zip(parts, offsets, strict=True)]
    total = lengths.sum(0)
    rebuilt = bucket_table(torch.cat(mine), torch.cat([total.new_zeros(1), total.cumsum(0)]), planes)
    assert torch.equal(table, rebuilt)


def test_the_error_falls_with_the_root_of_the_rounds() -> None:
    """Without normalisation the mean over groups estimates the sum weighted by the chance to collide."""
    g = torch.Generator().manual_seed(5)
    x, candidate = torch.randn(300, 16, generator=g), torch.randn(1, 16, generator=g)
    cosine = torch.cosine_similarity(x, candidate)
    wanted = ((1 - torch.arccos(cosine) / math.pi)[:, None] ** 3 * x).sum(0)

    def miss(groups: int) -> float:
        squares = []
        for seed in range(24):
            planes = random_planes(16, groups=groups, bits=3, seed=seed)
            found = hash_sampling(candidate, x, torch.tensor([0, 300]), planes, normalise=False)[0]
            squares.append(float((found - wanted).square().sum()))
        return math.sqrt(sum(squares) / len(squares))

    misses = [miss(groups) for groups in (16, 64, 256, 1024)]
    for coarse, fine in zip(misses, misses[1:], strict=False):
        assert fine / coarse == pytest.approx(0.5, rel=0.2)


def test_length_of_vectors_does_not_matter() -> None:
    g = torch.Generator().manual_seed(6)
    x, candidates, planes = torch.randn(50, 8, generator=g), torch.randn(3, 8, generator=g), random_planes(8)
    offsets, user = torch.tensor([0, 50]), torch.zeros(3, dtype=torch.int64)
    out = hash_sampling(candidates, x, offsets, planes, row_user=user)
    assert error(hash_sampling(candidates * 1e3, x * 64, offsets, planes, row_user=user), out) < 1e-6


def test_nobody_elses_behaviours_collide() -> None:
    g = torch.Generator().manual_seed(7)
    x, planes, offsets = torch.randn(30, 8, generator=g), random_planes(8), torch.tensor([0, 10, 20, 30])
    candidates = x[[3, 14]]
    user = torch.tensor([0, 1])
    out = hash_sampling(candidates, x, offsets, planes, row_user=user)
    other = x.clone()
    other[20:] = x[3]  # the next list is full of what collides surely
    assert torch.equal(hash_sampling(candidates, other, offsets, planes, row_user=user), out)


def test_nothing_in_the_bucket_is_zeros_and_finite_gradients() -> None:
    planes = random_planes(4)
    opposite = torch.ones(1, 4)
    x = torch.cat([-opposite, torch.zeros(2, 4)]).requires_grad_()
    offsets = torch.tensor([0, 1, 1, 3])  # opposite, nobody, two behaviours that are zero
    candidates = torch.cat([opposite, opposite, torch.zeros(1, 4)])
    for out in (
        hash_sampling(candidates, x, offsets, planes),
        lookup(bucket_table(x, offsets, planes), candidates, planes),
    ):
        assert torch.equal(out, torch.zeros(3, 4))
        (d_x,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(d_x, torch.zeros(3, 4))


def test_one_behaviour_is_found_as_its_direction() -> None:
    x, planes = torch.tensor([[3.0, 4.0]]), random_planes(2)
    out = hash_sampling(x, x, torch.tensor([0, 1]), planes)
    assert torch.allclose(out, x / 5)


def test_as_many_candidates_for_everyone() -> None:
    g = torch.Generator().manual_seed(9)
    x, candidates, planes = torch.randn(9, 4, generator=g), torch.randn(3, 2, 4, generator=g), random_planes(4)
    offsets = torch.tensor([0, 4, 4, 9])
    rows = hash_sampling(candidates.flatten(0, 1), x, offsets, planes, row_user=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert torch.equal(hash_sampling(candidates, x, offsets, planes), rows.view(3, 2, 4))
    served = lookup(bucket_table(x, offsets, planes), candidates, planes)
    assert torch.allclose(served, rows.view(3, 2, 4), atol=1e-6)
    assert hash_sampling(candidates[:, :0], x, offsets, planes).shape == (3, 0, 4)
    with pytest.raises(KernelError, match="row_user goes with candidates"):
        hash_sampling(candidates, x, offsets, planes, row_user=torch.tensor([0, 1, 2]))


def test_automatic_casting_changes_no_bit() -> None:
    g = torch.Generator().manual_seed(8)
    x, planes = torch.randn(4000, 8, generator=g), random_planes(8)
    wanted = signatures(x, planes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(signatures(x, planes), wanted)


def test_what_does_not_fit_is_said() -> None:
    x, planes, offsets = torch.randn(4, 3), random_planes(3, groups=2, bits=2), torch.tensor([0, 4])
    table = bucket_table(x, offsets, planes)
    with pytest.raises(KernelError, match="behaviours .*axis d has size 5"):
        bucket_table(torch.randn(4, 5), offsets, planes)
    with pytest.raises(KernelError, match="there are 4 candidates and 1 users; say whose each is with row_user"):
        lookup(table, x, planes)
    with pytest.raises(KernelError, match="row_user has values from 0 to 1; wanted 0 to 0"):
        lookup(table, x, planes, row_user=torch.tensor([0, 1, 0, 0]))
    with pytest.raises(KernelError, match=r"table .*axis 2\^b has size 4"):
        lookup(table, x, random_planes(3, groups=2, bits=3), row_user=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(KernelTypeError, match="table has dtype torch.bfloat16"):
        lookup(table.bfloat16(), x, planes, row_user=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(KernelError, match="these behaviours and planes make"):
        append(table, x, torch.tensor([0, 2, 4]), planes)
    with pytest.raises(KernelError, match="bits <= 16"):
        random_planes(3, bits=17)
