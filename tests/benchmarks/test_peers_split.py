"""The one split: nobody sees the future, negatives are what they say, and the same data give the same folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from couturier.components.errors import DataError

from .peers import runner, split
from .peers.sources import Source

USERS, ITEMS = 40, 60
SMALL = split.Config(train_positives=300, eval_negatives=4)


def world(*, repeats: bool) -> Source:
    """People with 6 baskets of 1 to 4 items; without repeats nobody takes an item twice."""
    random = np.random.default_rng(7)
    rows = []
    for user in range(USERS):
        left = random.permutation(ITEMS) + 1
        for group in range(6):
            size = int(random.integers(1, 5))
            taken = random.choice(ITEMS, size, replace=False) + 1 if repeats else left[:size]
            left = left[size:]
            rows += [(user, int(item), group, (1 + group) * 86_400_000_000 + user) for item in taken]
    names = {"user": pl.Int64, "item": pl.Int64, "group": pl.Int64, "timestamp_us": pl.Int64}
    items = pl.DataFrame({"item": range(1, ITEMS + 1)}).with_columns(
        pl.col("item").cast(pl.String).alias("item_id"),
        (1 + pl.col("item") % 5).alias("category"),
        pl.lit("t").alias("title"),
        pl.lit("words").alias("text"),
    )
    users = pl.DataFrame({"user": range(USERS), "user_id": [str(user) for user in range(USERS)]})
    events = pl.DataFrame(rows, schema=names, orient="row")
    return Source(name="planted", events=events, items=items, users=users, repeats=repeats)


@pytest.fixture(scope="module", params=[False, True], ids=["once", "repeats"])
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> split.Split:
    return split.write_split(world(repeats=request.param), SMALL, tmp_path_factory.mktemp("splits"))


def test_train_comes_before_valid_and_valid_before_test(cut: split.Split) -> None:
    for task in cut.tasks:
        roles = cut.table(f"topk-{task}")
        bounds = roles.group_by("user", "role").agg(
            pl.col("position").min().alias("first"), pl.col("position").max().alias("last")
        )
        wide = bounds.pivot(on="role", index="user", values=["first", "last"])
        assert (wide["last_train"] < wide["first_valid"]).all()
        assert (wide["last_valid"] < wide["first_test"]).all()


def test_the_new_task_wants_one_item_that_was_never_met_before(cut: split.Split) -> None:
    for stage in ("valid", "test"):
        truth, seen = cut.truth("new", stage), cut.seen("new", stage)
        assert seen is not None
        assert truth["user"].is_unique().all()
        assert truth.join(seen, on=["user", "item"], how="semi").is_empty()


def test_baskets_are_a_task_only_where_people_take_things_again(cut: split.Split) -> None:
    events = cut.table("events")
    repeats = events.select("user", "item").is_duplicated().any()
    assert cut.tasks == (["basket", "new"] if repeats else ["new"])
    if not repeats:
        return
    assert cut.seen("basket", "test") is None
    last = events.filter(pl.col("group") == pl.col("group").max().over("user"))
    truth = cut.truth("basket", "test")
    assert truth.sort("user", "item").equals(last.select("user", "item").sort("user", "item"))


@pytest.mark.parametrize("variant", split.VARIANTS)
def test_a_history_ends_before_its_positive_and_its_basket(cut: split.Split, variant: str) -> None:
    events = cut.table("events")
    for stage in split.STAGES:
        rows = cut.table(f"ctr-{variant}-{stage}").filter(label=1)
        began = events.group_by("user", "group").agg(pl.col("position").min().alias("seq_len"), "item")
        held = rows.join(began, on=["user", "seq_len"], how="left")
        assert held.height == rows.height
        assert held.select(pl.col("item_right").list.contains(pl.col("item")).all()).item()


@pytest.mark.parametrize("variant", split.VARIANTS)
def test_each_positive_is_followed_by_its_negatives(cut: split.Split, variant: str) -> None:
    for stage, count in zip(split.STAGES, (1, 4, 4), strict=True):
        rows = cut.table(f"ctr-{variant}-{stage}")
        label = rows["label"].to_numpy().reshape(-1, count + 1)
        assert (label[:, 0] == 1).all()
        assert (label[:, 1:] == 0).all()
        owners = rows.select("user", "seq_len").to_numpy().reshape(-1, count + 1, 2)
        assert (owners == owners[:, :1]).all()


def test_negatives_are_never_what_the_person_took(cut: split.Split) -> None:
    events = cut.table("events").select("user", "item")
    for variant in split.VARIANTS:
        negatives = cut.table(f"ctr-{variant}-test").filter(label=0)
        if variant == "uniform" or "basket" not in cut.tasks:
            assert negatives.join(events, on=["user", "item"], how="semi").is_empty()
        else:
            last = cut.truth("basket", "test")
            assert negatives.join(last, on=["user", "item"], how="semi").is_empty()
            assert negatives.join(events, on=["user", "item"], how="semi").height  # else the history gives it away


def test_training_rows_hold_nothing_of_valid_or_test(cut: split.Split) -> None:
    events = cut.table("events").with_columns(
        pl.col("group").rank("dense", descending=True).over("user").alias("back"),
        pl.col("position").min().over("user", "group").alias("seq_len"),
    )
    latest = events.filter(pl.col("back") <= 2).select("user", "seq_len").unique()
    rows = cut.table("ctr-uniform-train")
    assert rows.join(latest, on=["user", "seq_len"], how="semi").is_empty()
    assert int(rows["seq_len"].to_numpy().min()) >= SMALL.min_history


def test_popular_negatives_follow_popularity_and_uniform_ones_do_not(tmp_path: Path) -> None:
    source = world(repeats=True)
    tilted = source.events.with_columns(
        pl.when(pl.int_range(pl.len()) % 3 > 0).then(pl.col("item") % 6 + 1).otherwise(pl.col("item")).alias("item")
    ).unique(["user", "group", "item"], maintain_order=True)
    cut = split.write_split(dataclasses.replace(source, events=tilted), SMALL, tmp_path)
    share = {
        variant: (cut.table(f"ctr-{variant}-train").filter(label=0)["item"] <= 6).to_numpy().mean()
        for variant in split.VARIANTS
    }
    assert share["popular"] > 0.4
    assert share["uniform"] < 0.1  # most people took all six, so what is left is other items


def test_the_same_data_give_the_same_folder_and_other_settings_another(tmp_path: Path) -> None:
    first = split.write_split(world(repeats=True), SMALL, tmp_path / "a")
    again = split.write_split(world(repeats=True), SMALL, tmp_path / "b")
    other = split.write_split(world(repeats=True), split.Config(seed=1, train_positives=300), tmp_path / "c")
    assert first.hash == again.hash != other.hash
    for path in sorted(first.folder.glob("*.parquet")):
        assert pl.read_parquet(path).equals(pl.read_parquet(again.folder / path.name)), path.name


def test_a_folder_that_is_no_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no split"):
        split.open_split(tmp_path)


def test_every_model_has_a_grid_and_no_two_settings_are_the_same() -> None:
    for model in (*runner.TOPK, *runner.CLICK):
        settings = [sorted(map(str, config.items())) for config in model.grid]
        assert settings
        assert len({str(one) for one in settings}) == len(settings), model.title
