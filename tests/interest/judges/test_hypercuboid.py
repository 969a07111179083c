"""Boxes: the geometry of their distance, shells and several boxes, and what they say of people."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from couturier.components.errors import ConfigError
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.hypercuboid import HypercuboidConfig, HypercuboidJudge, box_distance
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed, seeded

from ..worlds import hypercuboid as world

ITEMS, WIDTH = 20, 6
SMALL = HypercuboidConfig(width=5, cuboids=2, shells=2, memory=4, length=6)


def judge_of(config: HypercuboidConfig = SMALL, seed: int = 0) -> HypercuboidJudge:
    with global_seed(seed, "test"):
        return HypercuboidJudge(config, FeatureConfig(words=0), Content.of_vectors(torch.randn(ITEMS, WIDTH))).eval()


def history_of(judge: HypercuboidJudge, lengths: list[int], seed: int = 0) -> HistoryBatch:
    random = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    return HistoryBatch(
        features_ND=judge.embed_items()[torch.randint(ITEMS, (n,), generator=random)].detach(),
        age_days_N=50 * torch.rand(n, generator=random),
        weight_N=torch.ones(n),
        offsets=torch.tensor([0, *np.cumsum(lengths)]),
    )


def boxes(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points, centres and offsets in double precision."""
    random = torch.Generator().manual_seed(seed)
    point, centre, offset = (torch.randn(count, 4, generator=random, dtype=torch.float64) for _ in range(3))
    return point, centre, offset.abs()


def test_in_the_box_only_the_centre_counts() -> None:
    _, centre, offset = boxes(500)
    inside = centre + offset * (2 * torch.rand(500, 4, dtype=torch.float64) - 1)
    torch.testing.assert_close(
        box_distance(inside, centre, offset, gamma=0.5), 0.5 * (inside - centre).norm(dim=-1), atol=2e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        box_distance(inside, centre, offset, gamma=0.0), torch.zeros(500, dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_it_is_the_formula_of_the_card() -> None:
    point, centre, offset = boxes(500)
    low, high = centre - offset, centre + offset
    outside = ((point - high).clamp_min(0) + (low - point).clamp_min(0)).norm(dim=-1)
    inside = (centre - torch.minimum(high, torch.maximum(low, point))).norm(dim=-1)
    torch.testing.assert_close(
        box_distance(point, centre, offset, gamma=0.3), outside + 0.3 * inside, atol=3e-6, rtol=1e-5
    )


def test_without_width_it_is_the_plain_distance_and_gamma_is_nothing() -> None:
    point, centre, offset = boxes(100)
    for gamma in (0.0, 0.5):
        torch.testing.assert_close(
            box_distance(point, centre, 0 * offset, gamma=gamma), (point - centre).norm(dim=-1), atol=3e-6, rtol=1e-5
        )
    judge = judge_of(replace(SMALL, points=True))
    assert not judge.encode(history_of(judge, [4, 0])).offset_UKSW.any()


def test_it_is_continuous_and_each_part_moves_no_more_than_the_point() -> None:
    """Together they may move sqrt(1 + gamma^2) times as far, beside a corner: not once, as one might think."""
    point, centre, offset = boxes(4000)
    step = 1e-3 * torch.nn.functional.normalize(torch.randn(4000, 4, dtype=torch.float64), dim=-1)
    for gamma, most in ((0.0, 1.0), (0.5, 1.25**0.5)):
        moved = box_distance(point + step, centre, offset, gamma=gamma) - box_distance(
            point, centre, offset, gamma=gamma
        )
        assert float(moved.abs().max()) <= 1e-3 * most + 1e-5
    face = centre.clone()
    face[:, 0] += offset[:, 0]
    either = [
        box_distance(face + side * torch.tensor([1e-7, 0, 0, 0], dtype=torch.float64), centre, offset, gamma=0.5)
        for side in (-1, 1)
    ]
    torch.testing.assert_close(either[0], either[1], atol=1e-6, rtol=0)


def test_a_gradient_at_the_centre_is_a_number() -> None:
    point = torch.zeros(3, requires_grad=True)
    box_distance(point, torch.zeros(3), torch.ones(3), gamma=0.5).backward()
    assert point.grad is not None and bool(torch.isfinite(point.grad).all())


def test_the_nearest_box_counts_and_shells_are_a_mean_that_nest() -> None:
    judge = judge_of()
    state, shown = judge.encode(history_of(judge, [5, 3])), judge.embed_items()[:4].expand(2, -1, -1)
    assert bool((state.offset_UKSW.diff(dim=2) >= 0).all() and (state.offset_UKSW >= 0).all())
    points = judge.item(shown)
    by_hand = torch.stack(
        [
            torch.stack(
                [
                    box_distance(points, state.centre_UKW[:, k, None], state.offset_UKSW[:, k, s, None], gamma=0.5)
                    for s in range(2)
                ]
            ).mean(0)
            for k in range(2)
        ]
    ).amin(0)
    torch.testing.assert_close(judge.distances(state, shown), by_hand)


def test_the_hinge_is_the_hinge() -> None:
    judge = judge_of(replace(SMALL, objective="hinge", strangers=0.0))
    history, items = history_of(judge, [4, 2]), torch.tensor([[0, 1, 2, 3], [4, 5, 6, -1]])
    shown = judge.embed_items()[items.clamp_min(0)]
    batch = TrainBatch(history=history, items_UC=items, candidates_UCD=shown, positives=2)
    distance = judge.distances(judge.encode(history), shown)
    pairs = [
        (1 + distance[u, p] - distance[u, n]).clamp_min(0)
        for u in range(2)
        for p in range(2)
        for n in (2, 3)
        if items[u, n] >= 0
    ]
    torch.testing.assert_close(judge.loss(batch, seeded(0))[0], torch.stack(pairs).mean())


def test_explain_is_the_score_with_minus_the_score_without() -> None:
    judge = judge_of()
    batch = history_of(judge, [9, 1, 0])
    shown = judge.embed_items()[:3].expand(3, -1, -1)
    parts, whole = judge.explain(batch, shown), judge.score(judge.encode(batch), shown)
    for left_out in range(10):
        kept = torch.arange(10) != left_out
        user = int(left_out == 9)
        ends = [0, 9, 10, 10]
        offsets = torch.tensor([end - (end > left_out) for end in ends])
        without = judge.score(judge.encode(batch.rows(kept.nonzero()[:, 0], offsets)), shown)
        place = left_out if user == 0 else 0
        torch.testing.assert_close(parts[user, :, place], (whole - without)[user], atol=1e-5, rtol=1e-4)
    oldest = batch.age_days_N[:9].argsort(descending=True)[:3]  # beyond the newest six
    assert not parts[0, :, oldest].any() and parts[0].any()


def test_wrong_settings_are_named() -> None:
    for wrong in ({"gamma": 1.0}, {"objective": "least squares"}, {"cuboids": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            HypercuboidConfig(**wrong)


@pytest.mark.slow
def test_width_tracks_planted_breadth(tmp_path: Path) -> None:
    assert world.breadth_correlation(0, tmp_path) > 0.6


@pytest.mark.slow
def test_two_boxes_beat_a_point_where_tastes_have_two_intervals(tmp_path: Path) -> None:
    found = world.compare(0, tmp_path)
    _, low, _ = found.difference()
    assert low > 0
    assert found.best_U is not None and found.ours_U.mean() <= found.best_U.mean() + 0.02
