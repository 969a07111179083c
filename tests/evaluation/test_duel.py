"""Champion and candidate meet on equal terms: the same windows, seeds, encoder and judge."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from couturier.components.data.formats import Catalogue
from couturier.components.evaluation import duel
from couturier.components.files import write_json
from couturier.components.lineage import gate
from couturier.components.lineage.stages import StageContext

from .conftest import QUICK, Made, generator, small_catalogue


@pytest.fixture(scope="module")
def candidate(evaluated: StageContext) -> Path:
    """The candidate's finished evaluation, as the artifact store leaves it."""
    write_json(evaluated.out / "manifest.json", {"config": dataclasses.asdict(QUICK)})
    return evaluated.out


def _fight(made: Made, name: str, candidate: Path, **others: Path) -> pl.DataFrame:
    given = {"evaluate": candidate, "rl": made.inputs["rl"], "champion_sequences": made.inputs["sequences"]} | others
    ctx = made.context(name, duel.Config(), "sequences", "judge", "tokenise", others=given)
    duel.run(ctx)
    return pl.read_parquet(ctx.out / "per_user.parquet")


def test_the_candidate_against_itself_is_the_same_to_the_last_bit(made: Made, candidate: Path) -> None:
    champion = _fight(made, "itself", candidate)
    assert champion["row"].unique().to_list() == ["champion"]
    mine = pl.read_parquet(candidate / "per_user.parquet").filter(pl.col("row") == "grpo").drop("row")
    assert_frame_equal(champion.drop("row"), mine, check_row_order=False)


def test_the_gate_compares_them_window_by_window(made: Made, candidate: Path) -> None:
    champion = _fight(made, "other", candidate, rl=made.inputs["sft"])
    mine = pl.read_parquet(candidate / "per_user.parquet")
    keys = ["user_id", "window", "metric"]
    assert mine.filter(pl.col("row") == "grpo").join(champion, on=keys, how="anti").is_empty()
    verdict = gate.decide(mine, champion, config=gate.Config(draws=100), candidate="new", champion="old")
    assert verdict.decision in ("hold", "reject")


def test_a_champion_of_another_catalogue_is_told_the_same_histories(made: Made, candidate: Path) -> None:
    # The champion's catalogue lacks the first item and has one of its own at the end: every number has moved.
    ours = small_catalogue()
    frame = ours.items[1:].vstack(ours.items[:1].with_columns(pl.lit("item-99").alias("item_id")))
    theirs = Catalogue(
        items=frame, rgb_IHWC=np.roll(ours.rgb_IHWC, -1, axis=0), attributes=ours.attributes, attribution="test"
    )
    theirs.save(made.root / "their sequences")
    champion = _fight(made, "moved", candidate, champion_sequences=made.root / "their sequences")
    plain = _fight(made, "itself", candidate)
    assert champion.height == plain.height
    assert not champion.equals(plain)  # this generator's words and pictures belong to our numbers


@given(st.permutations(range(6)), st.lists(st.integers(-1, 5), min_size=4, max_size=4))
def test_item_numbers_are_translated_by_id_and_unknown_ones_close_up(order: list[int], history: list[int]) -> None:
    ours = [f"item {i}" for i in range(6)]
    theirs = [ours[i] for i in order if i != 3]  # they never knew item 3
    found = duel.in_their_numbers(np.array([history]), ours, theirs)[0].tolist()
    told = [theirs[i] for i in found if i >= 0]
    assert told == [ours[i] for i in history if i not in (-1, 3)]
    assert found[len(told) :] == [-1] * (len(history) - len(told))


def test_a_generator_without_a_history_it_knows_still_draws(made: Made) -> None:
    unknown = np.full((2, 6), -1)
    codes = generator(made, seed=0).sample(unknown, 3, seeds=[1, 2])
    assert codes.shape[:2] == (2, 3)
