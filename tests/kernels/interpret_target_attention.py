"""Target attention's Triton kernels against the reference in float64; ``test_triton.py`` runs this, interpreted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.checks import BackendError
from couturier.kernels.target_attention import Pooling, dot_attention, mlp_attention

from .jagged_cases import Lists, dot_results, error, mlp_results, shuffled_rows

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHORT = (0, 1, 2, 33, 17)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def compare(lists: Lists, results: Callable[[Lists], dict[str, Tensor]]) -> None:
    with dispatch.use("triton"):
        found = results(lists)
    with dispatch.use("reference"):
        # The same numbers, rounded the same way, computed in float64.
        exact = Rounded(lengths=lists.lengths, row_user=lists.row_user, width=lists.width, rounded=lists.dtype)
        wanted = results(exact)
    far = {name: round(error(found[name], wanted[name]), 7) for name in wanted}
    assert max(far.values()) < LIMIT[lists.dtype], far


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounded(Lists):
    """Float64 tensors that hold what a narrower dtype can."""

    rounded: torch.dtype

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.rounded).double().requires_grad_()


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("rows", [None, 7], ids=["row a list", "rows in no order"])
@pytest.mark.parametrize("pooling", ["din_code", "din_paper"])
def test_mlp(dtype: torch.dtype, rows: int | None, pooling: Pooling) -> None:
    row_user = None if rows is None else shuffled_rows(len(SHORT), rows)
    lists = Lists(lengths=SHORT, row_user=row_user, dtype=dtype, width=12)
    compare(lists, lambda one: mlp_results(one, pooling, 10, 6))


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("rows", [None, 25], ids=["row a list", "rows in no order"])
def test_dot(dtype: torch.dtype, rows: int | None) -> None:
    lengths = (*SHORT, 65)
    row_user = None if rows is None else shuffled_rows(len(lengths), rows)
    compare(Lists(lengths=lengths, row_user=row_user, dtype=dtype, width=20), dot_results)


def test_nobody_and_nothing() -> None:
    offsets = torch.zeros(3, dtype=torch.int64)
    layers = Lists(lengths=(), dtype=torch.float32).layers(4, 4)
    with dispatch.use("triton"):
        assert not dot_attention(torch.ones(2, 6), torch.ones(0, 6), offsets).any()
        assert not mlp_attention(torch.ones(2, 6), torch.ones(0, 6), offsets, layers).any()
        assert dot_attention(torch.ones(0, 6), torch.ones(0, 6), offsets[:1]).shape == (0, 6)


def test_what_it_does_not_cover_is_refused_by_name() -> None:
    lists = Lists(lengths=(3,), dtype=torch.float32)
    q, k, _ = lists.tensors(6)
    with dispatch.use("triton"):
        with pytest.raises(BackendError, match="1 hidden layers"):
            mlp_attention(q, k, lists.offsets, lists.layers(4))
        with pytest.raises(BackendError, match="float64"):
            dot_attention(q.double(), k.double(), lists.offsets)
