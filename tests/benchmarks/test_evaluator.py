"""The one evaluator: metric identities, refusals, and intervals that a person could check by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from couturier.components.errors import DataError

from .peers import evaluator


def lists(rows: dict[int, list[int]]) -> pl.DataFrame:
    """``user, item, rank`` out of each user's items, best first."""
    flat = [(user, item, rank) for user, items in rows.items() for rank, item in enumerate(items, 1)]
    return pl.DataFrame(flat, schema={"user": pl.Int64, "item": pl.Int64, "rank": pl.Int64}, orient="row")


def pairs(rows: list[tuple[int, int]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"user": pl.Int64, "item": pl.Int64}, orient="row")


@pytest.mark.parametrize("rank", [1, 2, 5, 10])
def test_with_one_wanted_item_the_metrics_are_functions_of_its_rank(rank: int) -> None:
    topk = lists({3: [7 if place == rank else 100 + place for place in range(1, 11)]})
    found = evaluator.rank_metrics(topk, pairs([(3, 7)])).values
    assert found["hit@10"][0] == 1
    assert found["ndcg@10"][0] == pytest.approx(1 / np.log2(rank + 1))
    assert found["mrr@10"][0] == pytest.approx(1 / rank)


def test_ranks_beyond_ten_and_users_without_a_list_earn_nothing() -> None:
    topk = lists({0: [*range(100, 110), 7]})
    found = evaluator.rank_metrics(topk, pairs([(0, 7), (1, 7)]))
    assert found.users.tolist() == [0, 1]
    assert all((values == 0).all() for values in found.values.values())


def test_ndcg_of_a_basket_is_one_only_when_all_that_fits_stands_in_front() -> None:
    basket = [(0, item) for item in range(1, 13)]
    assert evaluator.rank_metrics(lists({0: list(range(1, 11))}), pairs(basket)).values["ndcg@10"][0] == pytest.approx(
        1
    )
    two = pairs([(0, 1), (0, 2)])
    front = evaluator.rank_metrics(lists({0: [1, 2, 50]}), two).values["ndcg@10"][0]
    gap = evaluator.rank_metrics(lists({0: [1, 50, 2]}), two).values["ndcg@10"][0]
    assert front == pytest.approx(1)
    assert gap == pytest.approx((1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3)))


def test_the_order_of_rows_does_not_matter() -> None:
    topk = lists({user: [user + 1, user + 2, 9] for user in range(5)})
    truth = pairs([(user, 9) for user in range(5)])
    shuffled = evaluator.rank_metrics(topk.sample(fraction=1, shuffle=True, seed=1), truth[::-1])
    assert np.array_equal(evaluator.rank_metrics(topk, truth).values["ndcg@10"], shuffled.values["ndcg@10"])


@pytest.mark.parametrize(
    ("topk", "words"),
    [
        (pl.DataFrame({"user": [0, 0], "item": [1, 1], "rank": [1, 2]}), "same item twice"),
        (pl.DataFrame({"user": [0, 0], "item": [1, 2], "rank": [1, 1]}), "same rank twice"),
        (pl.DataFrame({"user": [0], "item": [1], "rank": [0]}), "below 1"),
        (pl.DataFrame({"user": [0], "item": [5], "rank": [1]}), "had before"),
    ],
)
def test_lists_that_would_flatter_are_refused(topk: pl.DataFrame, words: str) -> None:
    with pytest.raises(DataError, match=words):
        evaluator.rank_metrics(topk, pairs([(0, 1)]), seen=pairs([(0, 5)]))


def clicks(users: int, negatives: int) -> pl.DataFrame:
    label = np.tile([1, *[0] * negatives], users)
    return pl.DataFrame({"user": np.repeat(np.arange(users), negatives + 1), "label": label})


def test_gauc_of_one_user_is_auc_and_rising_maps_change_nothing() -> None:
    rows, scores = clicks(1, 9), np.random.default_rng(0).random(10)
    by_user, whole = evaluator.click_metrics(scores, rows)
    assert by_user.values["gauc"][0] == pytest.approx(whole["auc"])
    stretched, again = evaluator.click_metrics(np.exp(3 * scores) - 40, rows)
    assert stretched.values["gauc"][0] == pytest.approx(by_user.values["gauc"][0])
    assert again["auc"] == pytest.approx(whole["auc"])
    assert "logloss" in whole
    assert "logloss" not in again


def test_ties_count_half_and_constant_scores_know_nothing() -> None:
    by_user, whole = evaluator.click_metrics(np.full(40, 0.5), clicks(4, 9))
    assert (by_user.values["gauc"] == 0.5).all()
    assert whole["auc"] == 0.5
    assert whole["logloss"] == pytest.approx(np.log(2))


def test_wrong_numbers_of_scores_and_nan_are_refused() -> None:
    with pytest.raises(DataError, match="3 scores came for 10 rows"):
        evaluator.click_metrics(np.zeros(3), clicks(1, 9))
    with pytest.raises(DataError, match="NaN"):
        evaluator.click_metrics(np.full(10, np.nan), clicks(1, 9))


def test_seeds_are_averaged_by_user_and_only_over_the_same_users() -> None:
    one = evaluator.PerUser(np.arange(3), {"gauc": np.array([0.0, 0.5, 1.0])})
    two = evaluator.PerUser(np.arange(3), {"gauc": np.array([1.0, 0.5, 1.0])})
    assert evaluator.mean_over_seeds([one, two]).values["gauc"].tolist() == [0.5, 0.5, 1.0]
    with pytest.raises(DataError, match="different users"):
        evaluator.mean_over_seeds([one, evaluator.PerUser(np.arange(1, 4), one.values)])


def test_a_paired_difference_sees_what_unpaired_intervals_hide() -> None:
    base = np.random.default_rng(0).random(300)
    worse = evaluator.PerUser(np.arange(300), {"ndcg@10": base})
    better = evaluator.PerUser(np.arange(300), {"ndcg@10": base + 0.01})
    a, b = (evaluator.intervals(run)["ndcg@10"] for run in (worse, better))
    assert a.high > b.low  # each alone tells nothing
    gap = evaluator.difference(better, worse, "ndcg@10")
    assert gap.low == pytest.approx(0.01)
    assert evaluator.difference(worse, worse, "ndcg@10").as_list() == [0, 0, 0]
