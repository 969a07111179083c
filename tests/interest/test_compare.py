"""Judges compared on a planted log, through the artifact store."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from couturier.components.errors import ConfigError
from couturier.components.interest.compare import FitConfig, LookConfig, compare, write_comparison
from couturier.components.interest.encoder import EncoderConfig
from couturier.components.interest.items import FeatureConfig
from couturier.components.lineage.stages import Artifact, ArtifactStore, Silent, Stage, StageContext
from couturier.components.lineage.workspace import Workspace

from .conftest import ITEMS, KINDS, planted_catalogue

CONFIG = FitConfig(steps=60, batch=32, eval_every=20, history=8, features=FeatureConfig(words=8, ids=8), valid_users=30)
LOOKS = LookConfig(encoder=EncoderConfig(side=16, width=16, channels=8, steps=40, batch=32))


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """A stage without settings."""


def plant_events(ctx: StageContext) -> None:
    """Ninety people, each of whom takes ten items of one colour; one in six events repeats an earlier one."""
    random, rows = np.random.default_rng(0), []
    for user in range(90):
        own = np.arange(user % KINDS, ITEMS, KINDS)
        rows += [(f"u{user:02d}", f"item-{random.choice(own):02d}", hour) for hour in range(10)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "hour"], orient="row")
    moment = pl.datetime(2024, 1, 1, time_zone="UTC").dt.cast_time_unit("us") + pl.duration(hours="hour")
    frame.select("user_id", "item_id", timestamp=moment, kind=pl.lit("view"), value=pl.lit(1.0)).write_parquet(
        ctx.out / "events.parquet"
    )


def plant_catalogue(ctx: StageContext) -> None:
    planted_catalogue().save(ctx.out)


@dataclass(frozen=True)
class Planted:
    store: ArtifactStore
    clean: Artifact
    windows: Artifact

    def compare(self, judges: list[str], config: FitConfig = CONFIG) -> dict[str, Any]:
        return compare(self.store, self.clean, self.windows, judges, config, progress=Silent(), looks=LOOKS)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    root = tmp_path_factory.mktemp("compare")
    store = ArtifactStore(Workspace(root, root / ".couturier"))
    clean = store.materialise(Stage(name="validate", run=plant_events, config=Nothing()))
    windows = store.materialise(Stage(name="sequences", run=plant_catalogue, config=Nothing()))
    return Planted(store, clean, windows)


@pytest.fixture(scope="module")
def found(planted: Planted) -> dict[str, Any]:
    return planted.compare(["attention"])


def test_a_judge_beats_what_everyone_takes(found: dict[str, Any]) -> None:
    assert found["best"] == "attention" and found["users"] == 90 and found["events"] == 900
    ours, everyone = found["table"]["attention"], found["table"]["popularity"]
    assert ours["ndcg@10"][1] > everyone["ndcg@10"][2]
    assert ours["auc"][0] > 0.8
    mean, low, high = found["against_best"]["popularity"]
    assert low <= mean <= high < 0


def test_repeats_make_items_taken_before_candidates(found: dict[str, Any]) -> None:
    assert found["repeat_share"] > 0.5  # ten events over four items
    assert found["seen_items_are_candidates"]
    assert found["table"]["own_favourites"]["hit@10"][0] > 0.95  # four items of ten that are shown


def test_what_was_fitted_before_is_reused(planted: Planted, found: dict[str, Any]) -> None:
    again = planted.compare(["attention"])
    assert again["table"] == found["table"]
    other = planted.compare(["attention"], replace(CONFIG, steps=5))
    assert other["table"]["attention"]["artifact"] != found["table"]["attention"]["artifact"]


def test_the_record_and_the_picture_are_written(found: dict[str, Any], tmp_path: Path) -> None:
    record, picture = write_comparison(found, tmp_path)
    assert record.stat().st_size > 500 and picture.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_judge_is_named_before_anything_is_fitted(planted: Planted) -> None:
    with pytest.raises(ConfigError, match="'oracle'; choose one of"):
        planted.compare(["oracle"])
    with pytest.raises(ConfigError, match="no judge to compare"):
        planted.compare([])
