"""The statistics' Triton kernels against the reference; ``test_triton.py`` runs this, interpreted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.attention_stats import attention_stats

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written reads as NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, salt: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(salt)).to(dtype)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "keys", "heads", "groups", "width"), [(70, 70, 2, 1, 16), (33, 90, 2, 2, 24)])
def test_equals_the_definition(dtype: torch.dtype, rows: int, keys: int, heads: int, groups: int, width: int) -> None:
    q, k = normal(2, heads, rows, width, salt=1, dtype=dtype), normal(2, groups, keys, width, salt=2, dtype=dtype)
    start = torch.tensor([0, keys - rows + 3])
    with dispatch.use("triton"):
        found = attention_stats(q, k, start=start, window=7, near=5, far=30)
    with dispatch.use("reference"):
        wanted = attention_stats(q.double(), k.double(), start=start, window=7, near=5, far=30)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        assert error(got, want) < LIMIT[dtype]
    assert not found.waad_BHR[1, :, :3].any() and not found.span_BHR[1, :, :3].any()
    assert not found.influence_BHS[1, :, : int(start[1])].any()


@pytest.mark.parametrize("far", [None, 12])
def test_a_sum_that_is_given_is_used(far: int | None) -> None:
    q, k = normal(1, 2, 20, 16, salt=1), normal(1, 2, 70, 16, salt=2)
    score = torch.einsum("bhrd,bhsd->bhrs", q, k) / 4
    lse = score.masked_fill(torch.ones(20, 70, dtype=torch.bool).triu(51), float("-inf")).logsumexp(-1)
    with dispatch.use("triton"):
        plain = attention_stats(q, k, far=far)
        given = attention_stats(q, k, lse=lse, far=far)
        halved = attention_stats(q, k, lse=lse + torch.log(torch.tensor(2.0)), far=far)
    for one, two, half in zip(plain, given, halved, strict=True):
        assert error(two, one) < 1e-6
        assert error(2 * half, one) < 1e-6


def test_what_the_kernel_does_not_cover_is_said() -> None:
    wide = torch.zeros(1, 1, 2, 256)
    with dispatch.use("triton"), pytest.raises(ValueError, match="heads wider than 128"):
        attention_stats(wide, wide)
