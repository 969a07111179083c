"""Windows are drawn alike for every user, and the targets are what came next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from couturier.components.alignment.batches import WindowSampler, picture_codes
from couturier.components.alignment.sft import other_users
from couturier.components.data.formats import Windows


def test_targets_are_items_of_the_next_basket_and_distinct_while_it_lasts(world: Path) -> None:
    windows = Windows.load(world / "sequences", "train")
    rows, targets = WindowSampler(windows, torch.Generator().manual_seed(0), targets=2).draw(200)
    for row, items in zip(rows, targets, strict=True):
        assert sorted(items) == sorted(windows.basket_of(row))


def test_every_user_is_drawn_alike(world: Path) -> None:
    windows = Windows.load(world / "sequences", "train")
    rows, _ = WindowSampler(windows, torch.Generator().manual_seed(0), targets=1).draw(12_000)
    counts = np.bincount(windows.user_W[rows], minlength=len(windows.users))
    assert counts.min() > 130 and counts.max() < 270  # 200 expected, five standard deviations either way


def test_the_generator_state_is_the_data_position(world: Path) -> None:
    windows = Windows.load(world / "sequences", "train")
    generator = torch.Generator().manual_seed(3)
    sampler = WindowSampler(windows, generator, targets=2)
    sampler.draw(5)
    state = generator.get_state()
    expected = sampler.draw(5)
    generator.set_state(state)
    again = sampler.draw(5)
    assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))


def test_a_wrong_user_is_never_the_right_one(world: Path) -> None:
    windows = Windows.load(world / "sequences", "test")
    wrong = other_users(windows)
    assert (windows.user_W[wrong] != windows.user_W).all()
    assert len(wrong) == len(windows)


def test_codes_of_items_keep_their_shape() -> None:
    codes = torch.arange(12).view(4, 3)
    assert picture_codes(codes, np.array([[0, 1], [3, 3]])).tolist() == [[[0, 1, 2], [3, 4, 5]], [[9, 10, 11]] * 2]
