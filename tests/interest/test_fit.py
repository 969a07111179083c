"""The stage: it finds a planted taste, says so honestly, and goes on after a kill to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from couturier.components.data.formats import Catalogue, Windows
from couturier.components.errors import ConfigError, DataError, LineageError, TrainingError
from couturier.components.files import sha256_of_file
from couturier.components.interest import fit
from couturier.components.interest.encoder import pictures_of
from couturier.components.interest.judge import history_batch, load_judge
from couturier.components.interest.types import Judge
from couturier.components.lineage.stages import Silent, StageContext

from .conftest import StageOf
from .planted import QUICK, World, context


class Killed(RuntimeError):
    """The test pulled the plug."""


class PullsThePlug(Silent):
    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, n: int = 1, *, note: str = "") -> None:
        self.left -= n
        if self.left == 0:
            raise Killed


def test_right_user_is_told_from_wrong_user(finished: StageContext) -> None:
    facts = finished.facts
    assert facts["gauc"] > 0.78
    assert facts["gauc_low"] < facts["gauc"] < facts["gauc_high"]
    assert facts["gauc_wrong_user"] < 0.6
    assert facts["difference_low"] > 0.2
    assert abs(facts["gauc_popularity"] - 0.5) < 0.08
    assert facts["gauc_new"] > 0.7, "an item of a liked kind that the history lacks must still be liked"
    assert facts["gauc_with_words"] > 0.78


def test_the_eyes_read_the_attribute(finished: StageContext) -> None:
    assert finished.facts["reads category"] > 0.95


def test_writes_curves_and_a_judge(finished: StageContext) -> None:
    curves = pl.read_parquet(finished.out / "curves.parquet")
    assert curves.schema == {"step": pl.Int64, "name": pl.String, "value": pl.Float64}
    assert set(curves["name"]) >= {"encoder_loss", "loss", "valid_gauc"}
    loss = curves.filter(pl.col("name") == "loss")["value"].to_list()
    assert loss[-1] < loss[0]
    assert {path.name for path in (finished.out / "judge").iterdir()} == {"judge.safetensors", "judge.json"}


def _same_after_a_kill(finished: StageContext, world: World, folder: Path, after: int) -> None:
    config = finished.config
    with pytest.raises(Killed):
        fit.run(context(world, folder, config, progress=PullsThePlug(after)))
    again = context(world, folder, config)
    fit.run(again)
    assert again.facts == finished.facts
    for name in ("judge/judge.safetensors", "judge/judge.json", "curves.parquet"):
        assert sha256_of_file(again.out / name) == sha256_of_file(finished.out / name), name


def test_goes_on_after_a_kill_to_the_same_bits(finished: StageContext, world: World, tmp_path: Path) -> None:
    _same_after_a_kill(finished, world, tmp_path, after=130)


@pytest.mark.parametrize("after", [45, 80])
def test_goes_on_after_a_kill_of_the_eyes_to_the_same_bits(
    stage_of: StageOf, world: World, tmp_path: Path, after: int
) -> None:
    """While the eyes are trained, and as they open; they are the same for every judge."""
    _same_after_a_kill(stage_of("attention"), world, tmp_path, after)


def test_another_seed_is_another_judge(world: World, tmp_path: Path) -> None:
    brief = replace(QUICK, steps=1, encoder=replace(QUICK.encoder, steps=1))
    made = []
    for seed in (0, 1):
        made.append(context(world, tmp_path / str(seed), replace(brief, seed=seed)))
        fit.run(made[-1])
    mine, theirs = (done.out / "judge" / "judge.safetensors" for done in made)
    assert sha256_of_file(mine) != sha256_of_file(theirs)


def test_the_unit_is_the_spread_over_train_people_and_random_pictures(judge: Judge, world: World) -> None:
    train, random = Windows.load(world.folder, "train"), np.random.default_rng(5)
    rows = random.integers(len(train), size=300)
    state = judge.encode(history_batch(train, rows, judge.embed_items()))
    pictures_ID = judge.embed_items(words=False)
    logits = judge.standardise(judge.score(state, pictures_ID.expand(len(rows), -1, -1)))
    assert abs(float(logits.mean())) < 0.15
    assert abs(float(logits.std()) - 1) < 0.15


def test_a_picture_is_scored_as_the_item_it_shows(judge: Judge, world: World) -> None:
    catalogue = Catalogue.load(world.folder)
    drawn = judge.embed_pictures(pictures_of(catalogue))
    torch.testing.assert_close(drawn, judge.embed_items(words=False), rtol=1e-4, atol=1e-5)
    assert not torch.equal(judge.embed_items(), judge.embed_items(words=False))


def test_a_worn_picture_is_scored_nearly_as_the_clean_one(judge: Judge, world: World) -> None:
    windows, clean = Windows.load(world.folder, "test"), pictures_of(Catalogue.load(world.folder))
    worn = (clean + 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    state = judge.encode(history_batch(windows, np.arange(40), judge.embed_items()))
    scores = [judge.score(state, judge.embed_pictures(rgb).expand(40, -1, -1)).flatten() for rgb in (clean, worn)]
    assert float(torch.corrcoef(torch.stack(scores))[0, 1]) > 0.9


def test_a_loaded_judge_is_frozen(judge: Judge, tmp_path: Path) -> None:
    assert not judge.embed_items().requires_grad
    with pytest.raises(LineageError, match="no judge in"):
        load_judge(tmp_path)


def _with(world: World, folder: Path, **windows_of: Any) -> World:
    """The world again, with some splits' arrays replaced."""
    Catalogue.load(world.folder).save(folder)
    for split in ("train", "valid", "test"):
        replace(Windows.load(world.folder, split), **windows_of.get(split, {})).save(folder, split)
    return World(folder=folder, likes=world.likes)


def _no_baskets(world: World, split: str) -> dict[str, np.ndarray]:
    count = len(Windows.load(world.folder, split))
    return {"basket": np.zeros(0, np.int32), "basket_offsets": np.zeros(count + 1, np.int64)}


def test_nothing_to_learn_from_is_said(world: World, tmp_path: Path) -> None:
    bare = _with(world, tmp_path / "sequences", train=_no_baskets(world, "train"))
    with pytest.raises(DataError, match="no training window"):
        fit.run(context(bare, tmp_path, QUICK))


def test_no_test_basket_is_said_and_no_valid_basket_is_borne(world: World, tmp_path: Path) -> None:
    bare = {split: _no_baskets(world, split) for split in ("valid", "test")}
    brief = replace(QUICK, steps=2, encoder=replace(QUICK.encoder, steps=1))
    with pytest.raises(DataError, match="no test window"):
        fit.run(context(_with(world, tmp_path / "sequences", **bare), tmp_path, brief))


def test_a_weight_that_is_no_number_stops_the_fit_by_name(world: World, tmp_path: Path) -> None:
    weight = np.full_like(Windows.load(world.folder, "train").weight_WK, np.nan)
    bad = _with(world, tmp_path / "sequences", train={"weight_WK": weight})
    brief = replace(QUICK, steps=2, encoder=replace(QUICK.encoder, steps=1))
    with pytest.raises((TrainingError, DataError), match=r"nan|not finite"):
        fit.run(context(bad, tmp_path, brief))


@pytest.mark.parametrize("wrong", [{"model": "oracle"}, {"batch": 0}, {"patience": 0}, {"views": 0}])
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"judge.{next(iter(wrong))}"):
        fit.Config(**wrong)
