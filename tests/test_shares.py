"""Work in shares is the same work: values, gradients, errors; and the number of threads is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from couturier.components.runtime import threads
from couturier.components.shares import how_many, shared_out, side_by_side


def test_side_by_side_keeps_the_order_and_gives_every_part_its_share_of_the_threads() -> None:
    with threads(2):
        found = side_by_side([lambda i=i: (i, torch.get_num_threads()) for i in range(2)])  # type: ignore[misc]
        assert found == [(0, 1), (1, 1)]
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_in_a_part_comes_out_and_the_threads_are_put_back(bad: int) -> None:
    def part(i: int) -> int:
        if i == bad:
            raise ValueError(f"part {i}")
        return i

    with threads(2):
        with pytest.raises(ValueError, match=f"part {bad}"):
            side_by_side([lambda i=i: part(i) for i in range(2)])  # type: ignore[misc]
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_gradients_are_those_of_the_whole(shares: int) -> None:
    random = torch.Generator().manual_seed(0)
    rows_UD = torch.randn(5, 4, generator=random, dtype=torch.float64)
    weight_DD, unused = torch.randn(4, 4, generator=random, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    scale_U = torch.rand(5, generator=random, dtype=torch.float64)

    def work(x_UD: Tensor, by_U: Tensor) -> Tensor:
        return (x_UD @ weight_DD).tanh() * by_U[:, None]

    leaves = [rows_UD.requires_grad_(), weight_DD.requires_grad_(), unused.requires_grad_()]
    expected = work(rows_UD, scale_U)
    expected.square().sum().backward()
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    found = shared_out(work, [rows_UD, scale_U], [weight_DD, unused], shares)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    for leaf, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


def test_a_batch_is_split_only_where_that_pays() -> None:
    small = nn.Linear(8, 8)
    with threads(2):
        assert how_many(small, users=8, samples=64) == 2
        assert how_many(small, users=1, samples=64) == 1
        assert how_many(small, users=8, samples=40) == 1
        assert how_many(nn.Linear(4096, 2048), users=8, samples=64) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert how_many(small, users=8, samples=64) == 1
    with threads(1):
        assert how_many(small, users=8, samples=64) == 1
