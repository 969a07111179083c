"""The whole stage on a very small demo: every row and figure, the same after a kill, and all files of one mind."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import load_file

from couturier.components.data.formats import Windows
from couturier.components.evaluation import evaluate
from couturier.components.evaluation.protocol import AT_EQUAL_NOVELTY
from couturier.components.evaluation.samples import Samples
from couturier.components.files import read_json
from couturier.components.generator.types import load_generator
from couturier.components.lineage import gate
from couturier.components.lineage.stages import Silent, StageContext

from .conftest import ITEMS, QUICK, Made

INPUTS = ("sequences", "tokenise", "judge", "sft", "rl")
ROWS = {
    "grpo", "sft", "unconditional", "wrong_user", "sft_wrong_user", "random_item", "copy_last", "copy_favourites",
    "nearest_item", "popularity", "oracle", "sft_guided", "best_of_n", "copy_favourites_eq", "popularity_eq",
    "nearest_item_eq",
}  # fmt: skip
METRICS = {
    "basket_precision", "distinct_hits", "basket_precision_new", "hit@10", "hit@20", "hit@50", "ndcg@10",
    "ndcg@20", "ndcg@50", "hr_target", "sim_next", "sim_history", "diversity", "between_user", "distinct",
    "novelty", "copied", "validity",
    "mush", "judge", "frechet", "coverage", "category", "brand",
}  # fmt: skip


@pytest.fixture(scope="module")
def table(evaluated: StageContext) -> dict[str, dict[str, list[float]]]:
    return read_json(evaluated.out / "table.json")["table"]


@pytest.fixture(scope="module")
def frame(evaluated: StageContext) -> pl.DataFrame:
    return pl.read_parquet(evaluated.out / "per_user.parquet")


def test_every_row_has_every_figure_with_its_interval(table: dict[str, dict[str, list[float]]]) -> None:
    assert set(table) == ROWS
    for row, cells in table.items():
        assert set(cells) == METRICS, row
        for name, (mean, low, high) in cells.items():
            assert all(map(math.isfinite, (mean, low, high))), (row, name)
            assert low - 1e-9 <= mean <= high + 1e-9, (row, name)


def test_controls_do_what_their_names_say(table: dict[str, dict[str, list[float]]]) -> None:
    mean = {row: {name: cell[0] for name, cell in cells.items()} for row, cells in table.items()}
    assert mean["copy_favourites"]["copied"] == 1
    assert mean["copy_favourites"]["novelty"] == 0
    assert mean["copy_last"]["copied"] == 1
    assert mean["popularity"]["coverage"] == pytest.approx(QUICK.pictures / ITEMS)
    assert mean["popularity"]["between_user"] < mean["popularity"]["diversity"]
    for row in ("random_item", "copy_last", "copy_favourites", "nearest_item", "popularity"):
        assert mean[row]["validity"] == 1, row
    assert mean["oracle"]["basket_precision"] == max(cells["basket_precision"] for cells in mean.values())
    assert mean["oracle"]["basket_precision"] > 0.9


def test_equal_novelty_is_equal_in_every_window(frame: pl.DataFrame) -> None:
    for metric in ("copied", "distinct"):
        found = frame.filter(pl.col("metric") == metric).pivot("row", index=["user_id", "window"], values="value")
        for row in AT_EQUAL_NOVELTY:
            assert np.allclose(found[row], found["grpo"]), (metric, row)


def test_the_table_is_the_mean_over_users_of_the_mean_over_their_windows(
    frame: pl.DataFrame, table: dict[str, dict[str, list[float]]]
) -> None:
    means = (
        frame.group_by("row", "metric", "user_id")
        .agg(pl.col("value").mean())
        .group_by("row", "metric")
        .agg(pl.col("value").mean())
    )
    for row, metric, value in means.iter_rows():
        assert table[row][metric][0] == pytest.approx(value, abs=1e-6), (row, metric)


def test_all_rows_meet_the_same_windows(frame: pl.DataFrame, made: Made) -> None:
    assert set(frame.columns) == {"row", "user_id", "window", "metric", "value"}
    test = Windows.load(made.inputs["sequences"], "test")
    wanted = {(test.users[user], window) for window, user in enumerate(test.user_W)}
    for row in ROWS - {"best_of_n"}:
        seen = frame.filter(pl.col("row") == row).select("user_id", "window").unique()
        assert set(seen.iter_rows()) == wanted, row
    best = frame.filter(pl.col("row") == "best_of_n")
    assert best["user_id"].n_unique() == math.ceil(QUICK.best_of_users_share * len(test.users))


def test_the_judge_chooses_what_it_likes_best(frame: pl.DataFrame) -> None:
    liking = frame.filter(pl.col("metric") == "judge").pivot("row", index=["user_id", "window"], values="value")
    both = liking.filter(pl.col("best_of_n").is_not_null())
    assert (both["best_of_n"] >= both["sft"] - 1e-4).all()
    assert both["best_of_n"].sum() > both["sft"].sum()


def test_what_is_written_is_of_one_mind(evaluated: StageContext) -> None:
    whole = read_json(evaluated.out / "table.json")
    assert whole["judge"]["gauc"] == read_json(evaluated.inputs["judge"] / "facts.json")["gauc"]
    assert whole["nll"]["wrong_minus_true"][0] == pytest.approx(whole["nll"]["wrong"][0] - whole["nll"]["true"][0])
    left, right = (whole["table"][row]["basket_precision"][0] for row in ("grpo", "wrong_user"))
    assert whole["differences"]["grpo-wrong_user:basket_precision"][0] == pytest.approx(left - right)
    assert whole["acceptance"]["grpo_copied"]["value"] == whole["table"]["grpo"]["copied"][0]
    assert evaluated.facts["grpo"] == whole["table"]["grpo"]["basket_precision"]
    assert (evaluated.out / "report.html").stat().st_size > 10_000


def test_people_in_the_report_are_shown_what_was_measured(evaluated: StageContext, frame: pl.DataFrame) -> None:
    samples = Samples.load(evaluated.out)
    assert len(samples) == QUICK.shown_users
    precision = frame.filter((pl.col("metric") == "basket_precision") & (pl.col("row") == "grpo"))
    for sample in samples:
        assert set(sample.rows) == {"sft", "grpo", "sft_guided", "unconditional"}
        tiles = sample.rows["grpo"]
        assert [tile.copied for tile in tiles] == [tile.item in sample.history for tile in tiles]
        assert [tile.hit for tile in tiles] == [tile.item in sample.next_items for tile in tiles]
        first = precision.filter(pl.col("user_id") == sample.user_id).sort("window")["value"][0]
        assert first == pytest.approx(np.mean([tile.hit for tile in tiles]))


class _Kill(Silent):
    """Pulls the plug after so many windows."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, n: int = 1, *, note: str = "") -> None:
        self.left -= n
        if self.left < 0:
            raise KeyboardInterrupt


def test_after_a_kill_finished_rows_are_kept_and_the_end_is_the_same(
    made: Made, evaluated: StageContext, frame: pl.DataFrame
) -> None:
    killed = made.context("killed", QUICK, *INPUTS, progress=_Kill(after=30))
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(killed)
    kept = killed.scratch / "drawn" / "sft.safetensors"
    written = kept.stat().st_mtime_ns
    again = made.context("killed", QUICK, *INPUTS)
    evaluate.run(again)
    assert kept.stat().st_mtime_ns == written
    assert_frame_equal(pl.read_parquet(again.out / "per_user.parquet"), frame)
    one, other = (read_json(ctx.out / "table.json") for ctx in (evaluated, again))
    assert {**one, "made_at": ""} == {**other, "made_at": ""}


def test_fewer_users_get_the_pictures_they_always_get(made: Made, frame: pl.DataFrame) -> None:
    some = made.context("some", dataclasses.replace(QUICK, max_users=4, windows_per_user=1, batch=3), *INPUTS)
    evaluate.run(some)
    few = pl.read_parquet(some.out / "per_user.parquet")
    assert few["user_id"].n_unique() == 4
    alone = few.filter(pl.col("metric").is_in(["basket_precision", "novelty"]) & (pl.col("row") == "grpo"))
    assert_frame_equal(alone, alone.drop("value").join(frame, on=["row", "user_id", "window", "metric"]))


def test_likeliest_pictures_instead_of_random_ones(made: Made) -> None:
    some = made.context("beams", dataclasses.replace(QUICK, beams=12, best_of=1), *INPUTS)
    evaluate.run(some)
    drawn = load_file(some.scratch / "drawn" / "grpo.safetensors")["codes"]
    assert all(len(codes.unique(dim=0)) == QUICK.pictures for codes in drawn)
    generator = load_generator(made.inputs["rl"] / "model")
    test = Windows.load(made.inputs["sequences"], "test")
    assert torch.equal(drawn[0], generator.likeliest(test.favourites_WK[:1], QUICK.pictures, beams=12)[0])
    new = made.context("new beams", dataclasses.replace(QUICK, beams=30, best_of=1, new=True), *INPUTS)
    evaluate.run(new)
    codes_IL = load_file(made.inputs["tokenise"] / "codes.safetensors")["codes_IL"]
    drawn = load_file(new.scratch / "drawn" / "wrong_user.safetensors")["codes"]
    favourites = test.favourites_WK[0]
    had = codes_IL[favourites[favourites >= 0].astype(int)]
    assert not (drawn[0][:, None] == had).all(-1).any()


def test_the_gate_can_read_it(frame: pl.DataFrame) -> None:
    verdict = gate.decide(frame, None, config=gate.Config(draws=100), candidate="a", champion=None)
    assert verdict.decision in ("hold", "reject")  # nine users prove nothing
