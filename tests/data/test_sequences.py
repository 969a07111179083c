"""Windows: nothing of the future in the history, nobody in two splits, and the same bytes from any row order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from couturier.components.data.formats import Catalogue, Windows
from couturier.components.data.sequences import Config, run, split_users
from couturier.components.errors import DataError
from couturier.components.files import sha256_of_file, write_json
from couturier.components.lineage.stages import StageContext
from couturier.components.lineage.workspace import Workspace

START = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = Config(history=6, min_item_events=3, min_item_users=2, min_history=2, windows_per_user=4)
ITEMS = 12


def clean_tables(folder: Path, *, users: int = 40, days: int = 60, shuffle: int | None = None) -> Path:
    """Users who each buy two items every third day; item ``late`` appears only at the end of the log."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(users):
        favourites = rng.choice(ITEMS, 5, replace=False)
        for day in range(user % 3, days, 3):
            when = START + timedelta(days=day, hours=int(rng.integers(24)))
            for item in rng.choice(favourites, 2, replace=False):
                rows.append((f"u{user:02d}", f"item-{item:02d}", when, f"{user}-{day}"))
            if day > days - 6:
                rows.append((f"u{user:02d}", "late", when, f"{user}-{day}"))
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "group_id"], orient="row").with_columns(
        pl.col("timestamp").cast(pl.Datetime("us", "UTC")), kind=pl.lit("purchase"), value=pl.lit(1.0)
    )
    if shuffle is not None:
        events = events.sample(fraction=1.0, shuffle=True, seed=shuffle)
    names = [f"item-{i:02d}" for i in range(ITEMS)] + ["late"]
    folder.mkdir(parents=True, exist_ok=True)
    events.write_parquet(folder / "events.parquet")
    pl.DataFrame({"item_id": names, "title": names, "text": names, "category": ["a", "b"] * 6 + ["a"]}).write_parquet(
        folder / "items.parquet"
    )
    pixels = [bytes([i * 15] * (8 * 8 * 3)) for i in range(len(names))]
    pl.DataFrame({"item_id": names, "height": 8, "width": 8, "rgb": pixels}).write_parquet(folder / "pictures.parquet")
    pl.DataFrame({"user_id": [f"u{i:02d}" for i in range(users)]}).write_parquet(folder / "users.parquet")
    write_json(folder / "meta.json", {"attributes": ["category"], "attribution": "by the test"})
    return folder


def cut(root: Path, config: Config = CONFIG, **tables: int) -> tuple[Path, dict]:
    context = StageContext(
        inputs={"validate": clean_tables(root / "validate", **tables)},
        config=config,
        out=root / "out",
        scratch=root / "scratch",
        workspace=Workspace(project=root, root=root / "ws"),
    )
    context.out.mkdir()
    run(context)
    return context.out, context.facts


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return cut(tmp_path_factory.mktemp("sequences"))


def log_of(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder.parent / "validate" / "events.parquet")


def test_users_belong_to_one_split_and_times_to_one_side_of_the_cut(done: tuple[Path, dict]) -> None:
    splits = {name: Windows.load(done[0], name) for name in ("train", "valid", "test")}
    users = {name: set(windows.users) for name, windows in splits.items()}
    assert (
        not users["train"] & users["test"]
        and not users["train"] & users["valid"]
        and not users["valid"] & users["test"]
    )
    cut_us = int(np.datetime64(done[1]["cut"], "us").astype(np.int64))
    assert splits["train"].time_W.max() < cut_us
    assert min(splits["valid"].time_W.min(), splits["test"].time_W.min()) >= cut_us


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_history_and_target_agree_with_the_log(done: tuple[Path, dict], split: str) -> None:
    """Recomputed from the raw log by another route: what was bought strictly before, and the basket at the moment."""
    windows, catalogue, log = Windows.load(done[0], split), Catalogue.load(done[0]), log_of(done[0])
    ids = np.array(catalogue.item_ids)
    log = log.filter(pl.col("item_id").is_in(catalogue.item_ids))
    for w in range(0, len(windows), 7):
        mine = log.filter(pl.col("user_id") == windows.users[windows.user_W[w]])
        now = pl.lit(int(windows.time_W[w])).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
        before, at = mine.filter(pl.col("timestamp") < now), mine.filter(pl.col("timestamp") == now)
        assert sorted(ids[windows.basket_of(w)]) == sorted(at["item_id"].unique().to_list())
        history = windows.favourites_WK[w]
        assert set(ids[history[history >= 0]]) <= set(before["item_id"].to_list())
        age = windows.age_days_WK[w][: (history >= 0).sum()]
        assert (age > 0).all()
        decayed = {
            item: sum(0.5 ** ((windows.time_W[w] - t) / 86_400e6 / 60.0) for t in times)
            for item, times in before.group_by("item_id").agg(pl.col("timestamp").dt.epoch("us")).iter_rows()
        }
        expected = sorted(decayed.values(), reverse=True)[: CONFIG.history]
        assert windows.weight_WK[w][: len(expected)].tolist() == pytest.approx(expected, rel=1e-4)


def test_an_item_that_appears_after_the_cut_is_in_no_catalogue(done: tuple[Path, dict]) -> None:
    assert "late" not in Catalogue.load(done[0]).item_ids
    assert done[1]["events_outside_catalogue"] > 0


def test_popularity_counts_training_events_alone(done: tuple[Path, dict]) -> None:
    catalogue, log = Catalogue.load(done[0]), log_of(done[0])
    train = Windows.load(done[0], "train").users
    cut_us = int(np.datetime64(done[1]["cut"], "us").astype(np.int64))
    counted = log.filter(pl.col("user_id").is_in(train) & (pl.col("timestamp").dt.epoch("us") < cut_us))
    expected = dict(counted.group_by("item_id").len().iter_rows())
    assert catalogue.items["purchases"].to_list() == [expected[i] for i in catalogue.item_ids]


def test_the_same_bytes_whatever_the_order_of_rows(done: tuple[Path, dict], tmp_path: Path) -> None:
    again, _ = cut(tmp_path, shuffle=3)
    for file in sorted(done[0].iterdir()):
        assert sha256_of_file(file) == sha256_of_file(again / file.name), file.name


def test_latest_has_every_user_once_and_no_target(done: tuple[Path, dict]) -> None:
    latest = Windows.load(done[0], "latest")
    assert len(latest) == 40 and sorted(latest.users) == latest.users
    assert len(latest.basket) == 0


def test_errors_say_what_to_bring(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 10 are needed"):
        split_users(pl.DataFrame({"user_id": ["a"] * 3, "timestamp": [START] * 3}), CONFIG)
    import dataclasses

    with pytest.raises(DataError, match="min_item_events"):
        cut(tmp_path, dataclasses.replace(CONFIG, min_item_events=10_000))
    with pytest.raises(DataError, match="choose one of train"):
        Windows.load(tmp_path, "tomorrow")
