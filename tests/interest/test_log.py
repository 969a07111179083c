"""A log on disk, what is cut out of it, and a fit that streams it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.held_out import HeldOut
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.log import Log, write_log
from couturier.components.interest.log_examples import LogConfig, LogExamples, moments
from couturier.components.interest.log_fit import LogFitConfig, fit_log
from couturier.components.interest.sampling import Negatives

ITEMS = 12
QUICK = LogFitConfig(steps=60, batch=32, history=6, eval_every=20, features=FeatureConfig(words=0, ids=8))


def events_of(users: int, *, seed: int = 0) -> pl.DataFrame:
    """Each user takes items of one of three colours (``item % 3``), six to fifteen of them."""
    random, rows = np.random.default_rng(seed), []
    for user in range(users):
        for step in range(random.integers(6, 16)):
            item = user % 3 + 3 * random.integers(ITEMS // 3)
            moment = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(hours=int(user + 5 * step))
            rows.append((f"u{user:03d}", f"i{item:02d}", moment, "like" if step % 3 == 0 else "view", float(step)))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "kind", "value"], orient="row")
    return frame.with_columns(pl.col("timestamp").cast(pl.Datetime("us", "UTC"))).sample(
        fraction=1.0, shuffle=True, seed=seed
    )


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("events") / "events.parquet"
    events_of(60).write_parquet(path)
    return path


@pytest.fixture(scope="module")
def log(events: Path, tmp_path_factory: pytest.TempPathFactory) -> Log:
    return write_log(events, [f"i{i:02d}" for i in range(ITEMS)], tmp_path_factory.mktemp("log"), rows_per_shard=100)


@pytest.fixture(scope="module")
def content() -> Content:
    return Content.of_vectors(torch.nn.functional.one_hot(torch.arange(ITEMS) % 3).float())


def test_a_log_holds_every_event_by_user_and_time(log: Log, events: Path) -> None:
    raw = pl.read_parquet(events).sort("user_id", "timestamp")
    shards = [log.shard(index) for index in range(log.shards)]
    assert log.shards > 3 and log.kinds == ["like", "view"] and log.events == raw.height
    assert np.concatenate([shard.users_U for shard in shards]).tolist() == list(range(60))
    items = np.concatenate([shard.item_N for shard in shards])
    assert items.tolist() == raw["item_id"].str.slice(1).cast(pl.Int32).to_list()
    times = np.concatenate([shard.time_s_N for shard in shards])
    assert times.tolist() == raw["timestamp"].dt.epoch("s").to_list()
    values = np.concatenate([shard.value_N for shard in shards])
    assert values.tolist() == raw["value"].to_list()
    names = pl.read_parquet(log.folder / "users.parquet")["user_id"].to_list()
    assert names == sorted(raw["user_id"].unique().to_list())


def test_other_items_are_left_out_and_none_is_refused(events: Path, tmp_path: Path) -> None:
    half = write_log(events, ["i00", "i03"], tmp_path / "half")
    raw = pl.read_parquet(events).filter(pl.col("item_id").is_in(["i00", "i03"]))
    assert (half.events, half.users) == (raw.height, raw["user_id"].n_unique())
    with pytest.raises(DataError, match="1 catalogue items"):
        write_log(events, ["nothing"], tmp_path / "none")
    with pytest.raises(DataError, match="no behaviour log"):
        Log(tmp_path / "nowhere")


def test_moments_never_reach_into_the_holdout(log: Log) -> None:
    shard = log.shard(0)
    for pieces in (False, True):
        owner, target = moments(shard, holdout=2, history=4, pieces=pieces)
        assert (target < shard.offsets[1:][owner] - 2).all() and (target > shard.offsets[:-1][owner]).all()
    owner, target = moments(shard, holdout=2, history=4, pieces=True)
    for user in range(len(shard.users_U)):
        lengths = np.minimum(4, target[owner == user] - shard.offsets[user])
        assert lengths.sum() == shard.offsets[user + 1] - 2 - shard.offsets[user] - 1  # each event is learned from once


def test_an_epoch_shows_every_moment_once_and_its_history(log: Log, content: Content) -> None:
    config = LogConfig(batch=1, history=3, negatives=2, buffer_shards=2)
    examples = LogExamples(config, log, pieces=False, seed=0)
    judge = fit_log(log, content, replace(QUICK, steps=1)).judge
    total = sum(len(moments(log.shard(index), holdout=2, history=3, pieces=False)[0]) for index in range(log.shards))
    seen = set()
    for step in range(total):
        batch = examples.batch(judge, step)
        seen.add((examples.rows()[0], int(examples.target[examples.order[examples.place - 1]]), examples.group))
        taken, bad = int(batch.items_UC[0, 0]), batch.items_UC[0, 1:]
        assert batch.history.items_N is not None and (batch.history.items_N % 3 == taken % 3).all()
        assert (batch.history.age_days_N.diff() < 0).all() and (batch.history.age_days_N > 0).all()
        assert not set(bad.tolist()) & {taken}
    assert len(seen) == total and examples.epoch == 0
    examples.batch(judge, total)
    assert examples.epoch == 1


@pytest.mark.parametrize("kind", ["uniform", "popularity", "in_batch"])
def test_negatives_follow_their_kind_and_are_never_held(kind: str) -> None:
    counts = np.array([1, 0, 3, 6])
    draw = Negatives(kind, counts)  # type: ignore[arg-type]
    taken = np.array([[3], [2], [0]])
    found = draw.each(
        np.arange(3), taken, 4000, np.random.default_rng(0), lambda users, items: (users == 0) & (items == 3)
    )
    assert 3 not in found[0]
    wanted = {"uniform": [0.25] * 4, "popularity": [0.1, 0, 0.3, 0.6], "in_batch": [1 / 3, 0, 1 / 3, 1 / 3]}[kind]
    np.testing.assert_allclose(np.bincount(found[1], minlength=4) / 4000, wanted, atol=0.03)
    if kind != "in_batch":
        np.testing.assert_allclose(np.exp(draw.log_q(np.arange(4), 10)), 10 * np.array(wanted), atol=1e-6)


def test_a_fit_on_a_log_learns_and_ranks(log: Log, content: Content) -> None:
    fit = fit_log(log, content, QUICK)
    ranking = HeldOut(log, "test", history=6).rank(fit.judge, skip_seen=False)
    assert len(ranking.users_U) == 60
    assert (ranking.top_UK[:, :4] % 3 == (ranking.users_U % 3)[:, None]).mean() > 0.95
    auc = HeldOut(log, "test", history=6).auc(fit.judge, Negatives("uniform", np.ones(ITEMS)), 20, seed=0)
    assert auc.mean() > 0.8


def test_a_killed_fit_ends_on_the_same_bits(log: Log, content: Content, tmp_path: Path) -> None:
    config = replace(QUICK, steps=30, checkpoint_every=7, eval_every=10, buffer_shards=2)
    whole = fit_log(log, content, config, scratch=tmp_path / "whole")

    class Killed(Exception):
        pass

    class Stop:
        def __init__(self) -> None:
            self.steps = 0

        def start(self, description: str, total: int, *, done: int = 0, unit: str = "it") -> None: ...
        def stop(self) -> None: ...
        def advance(self, n: int = 1, *, note: str = "") -> None:
            self.steps += 1
            if self.steps == 19:
                raise Killed

    with pytest.raises(Killed):
        fit_log(log, content, config, scratch=tmp_path / "killed", progress=Stop())
    resumed = fit_log(log, content, config, scratch=tmp_path / "killed")
    assert resumed.curves == whole.curves
    for name, value in whole.judge.state_dict().items():
        assert torch.equal(value, resumed.judge.state_dict()[name]), name


def test_bad_settings_and_empty_logs_are_named(log: Log, content: Content) -> None:
    with pytest.raises(ConfigError, match="log.history is 0"):
        LogConfig(history=0)
    with pytest.raises(ConfigError, match="choose one of uniform"):
        fit_log(log, content, replace(QUICK, negative_kind="hard"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no user has two events"):
        fit_log(log, content, replace(QUICK, holdout=99))
