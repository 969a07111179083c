"""Our judges as one more adapter: the same arguments, the same split, the same files.

    topk: events of the stage ─▶ log on disk ─▶ LogExamples ─┐                       ┌▶ ten best of the catalogue
                                                             ├▶ FitLoop ─▶ judge ────┤
    ctr:  rows of the split, their own negatives ────────────┘  stops on valid       └▶ a score each row

A judge knows an item by its words (mean of trained word vectors), by a fixed vector of its text (latent semantic
analysis) where pictures would stand, and by an identity of the width that the peers' tables have.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from couturier.components.interest.base import ContentJudge
from couturier.components.interest.encoder import word_bags, words_of
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judge import judge_class, make_judge
from couturier.components.interest.log import Log, Shard, write_log
from couturier.components.interest.log_examples import LogConfig, LogExamples, history_of, history_rows
from couturier.components.interest.loop import FitLoop, LoopConfig
from couturier.components.interest.transitions import log_transitions
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed, seeded_numpy, threads

from .adapter_io import (
    K,
    arguments,
    columns,
    fit_events,
    masked,
    ndcg,
    timed,
    truth,
    write_result,
    write_scores,
    write_topk,
)

_LOOP = {field.name for field in fields(LoopConfig)}
_LOG = {field.name for field in fields(LogConfig)}
_USERS, _CANDIDATES, _VALID_USERS = 32, 512, 1000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run's settings, parted: ``judge`` is the judge's own config, the rest the loop's, the log's and the items'."""

    loop: LoopConfig
    log: LogConfig
    features: FeatureConfig
    judge: dict[str, Any]

    @classmethod
    def of(cls, config: dict[str, Any], seed: int, holdout: int = 0) -> Setting:
        loop = {name: value for name, value in config.items() if name in _LOOP}
        log = {name: value for name, value in config.items() if name in _LOG}
        return cls(
            loop=LoopConfig(**loop, seed=seed),
            log=LogConfig(**log, holdout=holdout),
            features=FeatureConfig(words=config.get("words", 16), ids=config.get("ids", 64)),
            judge=config.get("judge", {}),
        )


class History:
    """Everybody's events in memory, to read the histories of rows from."""

    def __init__(self, events: dict[str, np.ndarray]) -> None:
        starts = np.flatnonzero(np.r_[True, np.diff(events["user"]) != 0])
        count = len(events["user"])
        self.row_of = {int(user): place for place, user in enumerate(events["user"][starts])}
        self.shard = Shard(
            users_U=events["user"][starts],
            offsets=np.r_[starts, count].astype(np.int64),
            item_N=events["item"] - 1,
            time_s_N=events["timestamp_us"] // 1_000_000,
            kind_N=np.zeros(count, dtype=np.int8),
            value_N=np.zeros(count, dtype=np.float32),
        )

    def batch(
        self, users: np.ndarray, lengths: np.ndarray, now_s: np.ndarray, limit: int, items_ID: torch.Tensor
    ) -> HistoryBatch:
        """The newest ``limit`` of each user's first ``lengths`` events, seen from ``now_s``."""
        rows = np.array([self.row_of[int(user)] for user in users])
        begin = self.shard.offsets[:-1][rows]
        index, offsets = history_rows(begin, begin + lengths, limit)
        return history_of(self.shard, index, offsets, now_s, items_ID)

    def lengths(self, users: np.ndarray) -> np.ndarray:
        rows = np.array([self.row_of[int(user)] for user in users])
        return self.shard.offsets[1:][rows] - self.shard.offsets[:-1][rows]


def content(split: Path, counts: np.ndarray, width: int = 16) -> Content:
    """What judges are told of the catalogue: its words and their latent semantic analysis (tf-idf, SVD)."""
    texts = pl.read_parquet(split / "items.parquet")["text"].to_list()
    vocabulary = sorted({word for text in texts for word in words_of(text)})
    word_ids, offsets = word_bags(texts, vocabulary)
    owner = np.repeat(np.arange(len(texts)), np.diff(offsets.numpy()))
    weight = np.log(len(texts) / np.bincount(word_ids.numpy(), minlength=len(vocabulary)).clip(min=1))
    table = np.zeros((len(texts), len(vocabulary)), dtype=np.float32)
    table[owner, word_ids.numpy()] = weight[word_ids.numpy()]
    table /= np.linalg.norm(table, axis=1, keepdims=True).clip(min=1e-6)
    with torch.no_grad():
        left, values, _ = torch.svd_lowrank(torch.from_numpy(table), q=width, niter=4)
        vectors = torch.nn.functional.normalize(left * values, dim=1)
    return Content(
        pictures_IP=vectors.contiguous(),
        word_ids=word_ids,
        word_offsets=offsets,
        vocabulary=len(vocabulary),
        counts_I=torch.from_numpy(counts.astype(np.float32)),
    )


def contract_log(events: dict[str, np.ndarray], items: int, folder: Path) -> Log:
    """The events of a stage as a log that a fit streams; ids are padded so that they sort as the numbers do."""
    frame = pl.DataFrame({name: events[name] for name in ("user", "item", "timestamp_us")})
    frame.select(
        pl.col("user").cast(pl.String).str.zfill(9).alias("user_id"),
        pl.col("item").cast(pl.String).str.zfill(9).alias("item_id"),
        pl.col("timestamp_us").cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias("timestamp"),
        pl.lit("taken").alias("kind"),
        pl.lit(1.0).alias("value"),
    ).write_parquet(folder / "events.parquet")
    return write_log(folder / "events.parquet", [str(item).zfill(9) for item in range(1, items + 1)], folder / "log")


class CtrExamples:
    """Feeds a fit from the split's own rows: each positive with the negatives that the peers get."""

    def __init__(self, rows: dict[str, np.ndarray], history: History, now_s: np.ndarray, setting: Setting) -> None:
        self.each = 1 + int(np.argmax(rows["label"][1:] == 1))
        self.items = rows["item"].reshape(-1, self.each) - 1
        self.users, self.lengths = rows["user"][:: self.each], rows["seq_len"][:: self.each]
        self.history, self.now_s, self.setting = history, now_s[:: self.each], setting
        self.steps_an_epoch = max(1, len(self.users) // setting.log.batch)
        self._chosen = np.zeros(0, dtype=np.int64)

    def rows(self) -> list[int]:
        return self._chosen.tolist()

    def state(self) -> dict[str, Any]:
        return {}

    def seek(self, state: dict[str, Any]) -> None:
        return None

    def batch(self, judge: ContentJudge, step: int) -> TrainBatch:
        """The batch of a step; every epoch has an order of its own."""
        epoch, place = divmod(step, self.steps_an_epoch)
        order = seeded_numpy(self.setting.loop.seed, "ctr", str(epoch)).permutation(len(self.users))
        size = self.setting.log.batch
        chosen = self._chosen = order[place * size : (place + 1) * size]
        items_ID = judge.embed_items()
        items_UC = torch.from_numpy(self.items[chosen])
        limit = self.setting.log.history
        return TrainBatch(
            history=self.history.batch(self.users[chosen], self.lengths[chosen], self.now_s[chosen], limit, items_ID),
            items_UC=items_UC,
            candidates_UCD=items_ID[items_UC],
            positives=1,
        )

    @torch.no_grad()
    def scores(self, judge: ContentJudge) -> np.ndarray:
        """Chances of being taken, a row each, in the order of the rows."""
        items_ID, found = judge.embed_items(), []
        for begin in range(0, len(self.users), 256):
            part = slice(begin, begin + 256)
            batch = self.history.batch(
                self.users[part], self.lengths[part], self.now_s[part], self.setting.log.history, items_ID
            )
            found.append(judge.score(judge.encode(batch), items_ID[torch.from_numpy(self.items[part])]).sigmoid())
        return torch.cat(found).double().numpy().ravel()


@torch.no_grad()
def ten_best(
    judge: ContentJudge, history: History, users: np.ndarray, now_s: np.ndarray, limit: int, mask: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``user, item, rank`` of everybody's ten best of the whole catalogue."""
    items_ID, lengths, found = judge.embed_items(), history.lengths(users), []
    size = 256 if judge.every_position else _USERS
    for begin in range(0, len(users), size):
        part = slice(begin, begin + size)
        state = judge.encode(history.batch(users[part], lengths[part], now_s[part], limit, items_ID))
        pieces = [items_ID] if judge.every_position else items_ID.split(_CANDIDATES)
        scores = torch.cat([judge.score_all(state, piece) for piece in pieces], dim=1).numpy().copy()
        if mask:
            rows = np.array([history.row_of[int(user)] for user in users[part]])
            starts = history.shard.offsets[:-1][rows]
            index, offsets = history_rows(starts, starts + lengths[part], int(lengths.max()))
            scores[np.repeat(np.arange(len(rows)), np.diff(offsets)), history.shard.item_N[index]] = -np.inf
        found.append(np.argsort(-scores, axis=1, kind="stable")[:, :K])
    items = np.concatenate(found) + 1
    ranks = np.broadcast_to(np.arange(1, K + 1), items.shape)
    return np.broadcast_to(users[:, None], items.shape).ravel(), items.ravel(), ranks.ravel()


def stopping_at(step: int, setting: Setting) -> Callable[[ContentJudge], float]:
    """A validation that likes only the look at one step: how a test model repeats what was best on valid."""
    looks = iter(range(1, 10**9))
    return lambda judge: float(next(looks) * setting.loop.eval_every == step)


def fitted(
    model: str, setting: Setting, about: Content, log: Log, examples: Any, validate: Callable[[ContentJudge], float]
) -> FitLoop:
    """A loop around a fresh judge, not yet run."""
    of = judge_class(model)
    with global_seed(setting.loop.seed, "judge", "model"):
        judge = make_judge(model, of.Config(**setting.judge), setting.features, about)
    if of.wants_transitions:
        judge.transitions = log_transitions(log, holdout=setting.log.holdout)
    return FitLoop(judge, examples, validate, setting.loop)


def moments(split: Path, task: str, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """Who is tested at a stage, and when the first thing to be found was taken, in seconds."""
    events = columns(split / f"topk-{task}.parquet")
    at = events["role"] == stage
    users, first = np.unique(events["user"][at], return_index=True)
    return users, events["timestamp_us"][at][first] // 1_000_000


def run_topk(args: Any, facts: dict[str, Any], scratch: Path) -> None:
    """Fit on the log of a stage and rank the catalogue for everybody."""
    task = args.form.removeprefix("topk-")
    events, wanted, mask = fit_events(args.split, task, args.stage), truth(args.split, task, args.stage), False
    mask = masked(args.split, task)
    items = pl.read_parquet(args.split / "items.parquet").height
    setting, history = Setting.of(args.config, args.seed), History(events)
    users, now_s = moments(args.split, task, args.stage)
    stop = args.config.get("epochs", 0)

    def look(judge: ContentJudge) -> float:
        some = slice(0, _VALID_USERS)
        found = ten_best(judge, history, users[some], now_s[some], setting.log.history, mask)
        return ndcg(*found, {int(user): wanted[int(user)] for user in users[some]})

    with timed(facts, "fit_s"):
        log = contract_log(events, items, scratch)
        about = content(args.split, np.bincount(events["item"] - 1, minlength=items))
        examples = LogExamples(setting.log, log, pieces=judge_class(args.model).every_position, seed=args.seed)
        loop = fitted(args.model, setting, about, log, examples, stopping_at(stop, setting) if stop else look)
        judge = loop.run()
    facts |= {"best_epochs": loop.best_step, "valid": loop.best_figure, "steps": loop.step}
    with timed(facts, "predict_s"):
        found = ten_best(judge, history, users, now_s, setting.log.history, mask)
    write_topk(args.out, *found)


def ctr_parts(args: Any, variant: str, scratch: Path) -> Iterator[Any]:
    """The setting, the log, the content, then the examples of train, valid and the stage asked for."""
    task = "basket" if (args.split / "topk-basket.parquet").is_file() else "new"
    events = fit_events(args.split, task, "valid")
    items = pl.read_parquet(args.split / "items.parquet").height
    setting = Setting.of({"ids": 16, **args.config}, args.seed)
    yield setting
    yield contract_log(events, items, scratch)
    yield content(args.split, np.bincount(events["item"] - 1, minlength=items))
    whole = columns(args.split / "events.parquet")
    history = History(whole)
    for stage in ("train", "valid", args.stage):
        rows = columns(args.split / f"ctr-{variant}-{stage}.parquet")
        first = np.array([history.row_of[int(user)] for user in rows["user"]])
        now_s = history.shard.time_s_N[history.shard.offsets[:-1][first] + rows["seq_len"]]
        yield CtrExamples(rows, history, now_s, setting)


def run_ctr(args: Any, facts: dict[str, Any], scratch: Path) -> None:
    """Fit on the split's rows with early stopping on valid's gAUC, then score a stage."""
    with timed(facts, "fit_s"):
        setting, log, about, train, valid, asked = ctr_parts(args, args.form.removeprefix("ctr-"), scratch)

        def look(judge: ContentJudge) -> float:
            scores = valid.scores(judge).reshape(-1, valid.each)
            good, bad = scores[:, :1], scores[:, 1:]
            return float(((good > bad) + 0.5 * (good == bad)).mean())

        loop = fitted(args.model, setting, about, log, train, look)
        judge = loop.run()
    facts |= {"best_step": loop.best_step, "valid": loop.best_figure, "steps": loop.step}
    with timed(facts, "predict_s"):
        scores = asked.scores(judge)
    write_scores(args.out, scores)


class _Counted:
    """Examples that count what a fit was fed: rows (candidates) and target positions."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.sequences, self.positions, self.candidates = inner, 0, 0, 0

    def batch(self, judge: ContentJudge, step: int) -> TrainBatch:
        batch: TrainBatch = self.inner.batch(judge, step)
        self.sequences += len(batch.history)
        self.positions += int(batch.history.offsets[-1])
        self.candidates += batch.items_UC.numel()
        return batch

    def rows(self) -> list[int]:
        found: list[int] = self.inner.rows()
        return found

    def state(self) -> dict[str, Any]:
        return {}

    def seek(self, state: dict[str, Any]) -> None:
        return None


def run_speed(args: Any, facts: dict[str, Any], scratch: Path) -> None:
    """Training alone, batches included: a few steps to warm up, then about ``seconds`` of them."""
    form = args.form.removeprefix("speed-")
    config = {name: value for name, value in args.config.items() if name != "seconds"}
    if (args.split / f"topk-{form}.parquet").is_file():
        events = fit_events(args.split, form, "test")
        items = pl.read_parquet(args.split / "items.parquet").height
        setting, log = Setting.of(config, args.seed), contract_log(events, items, scratch)
        about = content(args.split, np.bincount(events["item"] - 1, minlength=items))
        inner: Any = LogExamples(setting.log, log, pieces=judge_class(args.model).every_position, seed=args.seed)
    else:
        setting, log, about, inner, _, _ = ctr_parts(args, form, scratch)
    steps, spent, counted = 5, 0.0, _Counted(inner)
    for wanted_s in (1.0, float(args.config.get("seconds", 10))):
        steps = max(5, round(steps * wanted_s / spent)) if spent else steps
        loop_config = LoopConfig(steps=steps, eval_every=10**9, seed=args.seed)
        timed_setting = Setting(loop=loop_config, log=setting.log, features=setting.features, judge=setting.judge)
        counted = _Counted(inner)
        loop = fitted(args.model, timed_setting, about, log, counted, lambda judge: 0.0)
        began = time.perf_counter()
        loop.run()
        spent = time.perf_counter() - began
    facts["sequences_per_s"] = counted.sequences / spent
    facts["positions_per_s"] = counted.positions / spent
    facts["rows_per_s"] = counted.candidates / spent


def main() -> None:
    """Fit and rank, fit and score, or time the training."""
    args = arguments()
    count = int(os.environ.get("OMP_NUM_THREADS", "2"))
    facts: dict[str, Any] = {"threads": count}
    run = {"topk": run_topk, "ctr": run_ctr, "speed": run_speed}[args.form.partition("-")[0]]
    with tempfile.TemporaryDirectory(prefix="judges-") as scratch, threads(count):
        run(args, facts, Path(scratch))
    write_result(args.out, facts, ("torch", "numpy", "polars"))


if __name__ == "__main__":
    main()
