"""A promise is kept by the end of the interval that it names, and an open goal is told apart."""

from __future__ import annotations

from typing import Any

import pytest

from couturier.components.evaluation.acceptance import PROMISES, acceptance


def _table(**differences: list[float]) -> dict[str, Any]:
    return {"differences": {"grpo-sft:judge": [0.5, 0.31, 0.7], **differences}}


def test_a_good_mean_with_a_low_end_below_the_mark_is_not_kept() -> None:
    assert acceptance(_table())["grpo-sft:judge"]["passed"]
    missed = acceptance({"differences": {"grpo-sft:judge": [0.9, 0.29, 1.5]}})["grpo-sft:judge"]
    assert not missed["passed"]
    assert (missed["value"], missed["low"], missed["high"]) == (0.9, 0.29, 1.5)
    assert missed["wanted"] == "lower end at least 0.3"


@pytest.mark.parametrize(("gauc", "passed"), [(0.46, False), (0.47, True), (0.53, True), (0.54, False)])
def test_a_range_has_two_sides(gauc: float, passed: bool) -> None:
    assert acceptance({"judge": {"gauc_wrong_user": gauc}})["judge_gauc_wrong_user"]["passed"] is passed


def test_a_lone_number_brings_the_interval_beside_it() -> None:
    judge = {"gauc_difference": 0.12, "gauc_difference_low": 0.07, "gauc_difference_high": 0.17}
    found = acceptance({"judge": judge})["judge_gauc_difference"]
    assert (found["low"], found["passed"]) == (0.07, False)


def test_figures_that_are_not_there_are_not_promised() -> None:
    assert set(acceptance(_table())) == {"grpo-sft:judge"}
    assert acceptance({}) == {}


def test_open_goals_are_told_apart() -> None:
    goals = {promise.name for promise in PROMISES if promise.goal}
    assert goals == {"grpo-popularity_eq:basket_precision", "grpo-copy_favourites_eq:basket_precision"}
    found = acceptance(_table(**{"grpo-popularity_eq:basket_precision": [0.1, -0.01, 0.2]}))
    assert found["grpo-popularity_eq:basket_precision"]["goal"]
    assert not found["grpo-popularity_eq:basket_precision"]["passed"]
