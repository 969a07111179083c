"""What should be drawn, against its definition; the imitation's loss, against the plain one it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from couturier.components.alignment.distil import (
    DistilConfig,
    draw_evenly,
    imitation_loss,
    prefixes,
    wanted,
)

PROSPECT = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
HISTORY = torch.tensor([[True, True, False, False]])


def test_favourites_get_their_share_and_each_part_is_the_closed_form() -> None:
    config = DistilConfig(sharpness=1.5, sharpness_new=0.5, copies=0.4)
    p = wanted(PROSPECT, torch.zeros(4), HISTORY, config)[0]
    assert p.sum() == pytest.approx(1)
    assert p[:2].sum() == pytest.approx(0.4)
    # Within a part, log odds between two items are sharpness times the difference of their rewards.
    assert (p[0] / p[1]).log() == pytest.approx(1.5 * 2)
    assert (p[2] / p[3]).log() == pytest.approx(0.5 * 2)


def test_somebody_without_a_history_gets_new_items_alone() -> None:
    p = wanted(
        PROSPECT,
        torch.zeros(4),
        torch.zeros(1, 4, dtype=torch.bool),
        DistilConfig(copies=0.4),
    )
    assert p.sum() == pytest.approx(1)
    assert torch.isfinite(p).all()


def test_of_two_equally_likely_items_the_rarer_one_is_wanted_more() -> None:
    base = torch.tensor([0.0, 0.0, -1.0, -3.0])
    level = torch.zeros(1, 4)
    p = wanted(level, base, HISTORY, DistilConfig(contrast=0.5, contrast_new=0.5))[0]
    assert p[3] > p[2]
    assert p[0] == pytest.approx(p[1])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=12),
    st.integers(1, 20),
    st.integers(0, 10**6),
)
def test_every_item_comes_up_as_often_as_it_should_to_within_one(weights: list[float], count: int, seed: int) -> None:
    p = torch.tensor([weights])
    items = draw_evenly(p, count, torch.Generator().manual_seed(seed))
    seen = torch.bincount(items[0], minlength=len(weights))
    assert (seen - count * p[0] / p.sum()).abs().max() < 1 + 1e-4


# Four items; the first two begin alike, so do the first three at the first place.
CODES = torch.tensor([[0, 1, 2], [0, 1, 0], [0, 2, 2], [1, 1, 1]])


def test_prefixes_say_who_begins_alike() -> None:
    first, second, third = prefixes(CODES).tolist()
    assert len(set(first)) == 1
    assert second[0] == second[1] == second[2] != second[3]
    assert third[0] == third[1] and len({third[0], third[2], third[3]}) == 3


def _table() -> dict[tuple[int, ...], torch.Tensor]:
    """Random logits of the next code after every beginning."""
    random = torch.Generator().manual_seed(0)
    beginnings = {tuple(row[:t].tolist()) for row in CODES for t in range(3)}
    return {beginning: torch.randn(3, generator=random) for beginning in sorted(beginnings)}


def _logits(item: int) -> torch.Tensor:
    table, row = _table(), CODES[item].tolist()
    return torch.stack([table[tuple(row[:t])] for t in range(3)])


def test_the_loss_is_the_plain_one_in_expectation() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    plain, smooth = [], []
    for item in range(4):
        logits = _logits(item)
        plain.append(-logits.log_softmax(-1).gather(-1, CODES[item][:, None]).mean())
        items = torch.tensor([[item]])
        smooth.append(imitation_loss(logits[None, None], items, p[None], CODES, prefixes(CODES)))
    plain_I, smooth_I = torch.stack(plain), torch.stack(smooth)
    assert (p * smooth_I).sum() == pytest.approx(float((p * plain_I).sum()), abs=1e-6)
    assert not torch.allclose(smooth_I, plain_I, atol=1e-2)


def test_the_loss_is_lowest_where_the_model_gives_items_what_is_wanted() -> None:
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    logits = torch.zeros(1, 1, 3, 3, requires_grad=True)
    imitation_loss(logits, torch.tensor([[0]]), p, CODES, prefixes(CODES)).backward()
    assert logits.grad is not None
    # At the first place three items of four begin with 0: the pull towards it is 0.9 - 1/3, whichever was drawn.
    assert (-3 * logits.grad[0, 0, 0, 0]).item() == pytest.approx(0.9 - 1 / 3, abs=1e-6)
    # After (0, 1) only the first two are left, 4 to 3.
    assert (-3 * logits.grad[0, 0, 2, 2]).item() == pytest.approx(4 / 7 - 1 / 3, abs=1e-6)
