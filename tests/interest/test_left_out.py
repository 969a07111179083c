"""Attention without one behaviour: what summing the others anew would give, also where one of them is nearly all."""

from __future__ import annotations

import pytest
import torch

from couturier.components.interest.left_out import each_left_out


@pytest.mark.parametrize("sharpness", [0.1, 5.0, 60.0])
def test_agrees_with_summing_the_others(sharpness: float) -> None:
    random = torch.Generator().manual_seed(0)
    score_UCT, values_UTE = torch.randn(2, 3, 150, generator=random), torch.randn(2, 150, 4, generator=random)
    score_UCT[1, :, 90:] = -torch.inf  # a shorter history
    values_UTE[1, 90:] = 0
    score_UCT = sharpness * score_UCT
    parts = [pooled for _, pooled in each_left_out(score_UCT.softmax(-1), values_UTE)]
    without_UCTE = torch.cat(parts, dim=2)
    for place in range(90):
        masked_UCT = score_UCT.clone()
        masked_UCT[..., place] = -torch.inf
        torch.testing.assert_close(without_UCTE[:, :, place], masked_UCT.softmax(-1) @ values_UTE, rtol=1e-3, atol=1e-5)


def test_without_the_only_one_nothing_is_left() -> None:
    ((places, pooled),) = each_left_out(torch.ones(1, 1, 1), torch.full((1, 1, 3), 7.0))
    assert places == slice(0, 1) and pooled.eq(0).all()


def test_an_empty_history_has_no_places() -> None:
    assert list(each_left_out(torch.zeros(2, 3, 0), torch.zeros(2, 0, 4))) == []
