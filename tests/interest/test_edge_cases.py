"""What every judge must do at the edges: a defined answer or a clear error, whatever the model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from couturier.components.data.formats import Windows
from couturier.components.errors import DataError
from couturier.components.interest.judge import history_batch
from couturier.components.interest.types import HistoryBatch, Judge

from .planted import World


def history(judge: Judge, lengths: list[int], *, seed: int = 0) -> HistoryBatch:
    """Random catalogue items of random ages."""
    random = torch.Generator().manual_seed(seed)
    items_ID, n = judge.embed_items(), sum(lengths)
    return HistoryBatch(
        features_ND=items_ID[torch.randint(len(items_ID), (n,), generator=random)],
        age_days_N=100 * torch.rand(n, generator=random),
        weight_N=3 * torch.rand(n, generator=random),
        offsets=torch.tensor([0, *np.cumsum(lengths)]),
    )


def candidates(judge: Judge, users: int, count: int = 5) -> torch.Tensor:
    return judge.embed_items(words=False)[:count].expand(users, -1, -1)


@pytest.mark.parametrize(
    "lengths",
    [[0], [1], [0, 0, 0], [1, 0, 7], [0, 3], [10_000], [10_000, 0, 1], []],
    ids=lambda lengths: "-".join(map(str, lengths)) or "nobody",
)
def test_any_length_has_finite_scores_and_explanations(judge: Judge, lengths: list[int]) -> None:
    batch, shown = history(judge, lengths), candidates(judge, len(lengths))
    logits = judge.score(judge.encode(batch), shown)
    assert logits.shape == (len(lengths), 5) and bool(torch.isfinite(logits).all())
    parts = judge.explain(batch, shown)
    assert parts.shape == (len(lengths), 5, max(lengths, default=0)) and bool(torch.isfinite(parts).all())
    for user, length in enumerate(lengths):
        assert bool((parts[user, :, length:] == 0).all())


def test_an_empty_history_is_a_default_state_the_same_for_everyone(judge: Judge) -> None:
    shown = candidates(judge, 2)
    alone = judge.score(judge.encode(HistoryBatch.empty(users=2, width=judge.width)), shown)
    beside = judge.score(judge.encode(history(judge, [0, 4, 0])), candidates(judge, 3))
    torch.testing.assert_close(alone[0], alone[1])
    torch.testing.assert_close(beside[[0, 2]], alone, rtol=1e-4, atol=1e-5)


def test_who_else_is_in_the_batch_changes_nothing(judge: Judge) -> None:
    together = judge.score(judge.encode(history(judge, [3, 40])), candidates(judge, 2))
    batch = history(judge, [3, 40])
    first = HistoryBatch(
        features_ND=batch.features_ND[:3],
        age_days_N=batch.age_days_N[:3],
        weight_N=batch.weight_N[:3],
        offsets=torch.tensor([0, 3]),
    )
    torch.testing.assert_close(
        judge.score(judge.encode(first), candidates(judge, 1))[0], together[0], rtol=1e-4, atol=1e-5
    )


def test_no_candidate_gives_no_score(judge: Judge) -> None:
    assert judge.score(judge.encode(history(judge, [2])), torch.zeros(1, 0, judge.width)).shape == (1, 0)


@pytest.mark.parametrize("name", ["features_ND", "age_days_N", "weight_N"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_history_value_that_is_no_number_is_refused_by_name(judge: Judge, name: str, value: float) -> None:
    batch = history(judge, [3])
    broken = getattr(batch, name).clone()
    broken.view(-1)[1] = value
    with pytest.raises(DataError, match=f"{name} holds 1 values that are not finite"):
        judge.encode(dataclasses.replace(batch, **{name: broken}))


def test_a_candidate_that_is_no_number_is_refused(judge: Judge) -> None:
    shown = candidates(judge, 1).clone()
    shown[0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        judge.score(judge.encode(history(judge, [2])), shown)
    with pytest.raises(DataError, match="not finite"):
        judge.embed_pictures(torch.full((1, 3, 16, 16), float("nan")))


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 16, 16, 3)])
def test_a_picture_of_another_form_is_refused(judge: Judge, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"wanted \[N, 3, H, W\]"):
        judge.embed_pictures(torch.zeros(shape))


def test_pictures_of_any_size_and_number_are_embedded(judge: Judge) -> None:
    assert judge.embed_pictures(torch.rand(2, 3, 40, 24)).shape == (2, judge.width)
    assert judge.embed_pictures(torch.rand(0, 3, 16, 16)).shape == (0, judge.width)


def test_features_of_another_judge_are_refused(judge: Judge) -> None:
    with pytest.raises(DataError, match="embed_items or embed_pictures"):
        judge.encode(HistoryBatch.empty(users=1, width=judge.width + 1))
    with pytest.raises(DataError, match="wanted"):
        judge.score(judge.encode(history(judge, [2])), torch.zeros(1, 4, judge.width + 1))
    with pytest.raises(DataError, match="wanted"):
        judge.score(judge.encode(history(judge, [2])), torch.zeros(2, 4, judge.width))


@pytest.mark.parametrize(
    "offsets",
    [torch.tensor([0, 2, 1, 3]), torch.tensor([1, 3]), torch.tensor([0, 2]), torch.tensor([0.0, 3.0]), torch.zeros(0)],
    ids=["falls", "starts late", "ends early", "not whole numbers", "nothing"],
)
def test_offsets_that_do_not_fit_are_refused(judge: Judge, offsets: torch.Tensor) -> None:
    with pytest.raises(DataError, match="offsets"):
        judge.encode(dataclasses.replace(history(judge, [3]), offsets=offsets))


def test_an_unknown_item_in_a_history_is_refused_and_padding_is_not(judge: Judge, world: World) -> None:
    windows, items_ID = Windows.load(world.folder, "test"), judge.embed_items()
    unknown = dataclasses.replace(windows, favourites_WK=np.full_like(windows.favourites_WK, len(items_ID)))
    with pytest.raises(DataError, match=f"the catalogue has {len(items_ID)} items"):
        history_batch(unknown, np.array([0]), items_ID)
    padding = dataclasses.replace(windows, favourites_WK=np.full_like(windows.favourites_WK, -1))
    assert history_batch(padding, np.array([0, 1]), items_ID).lengths.tolist() == [0, 0]
