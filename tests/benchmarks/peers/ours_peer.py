"""Our judges as one more adapter: the same arguments, the same split, the same files.

    topk: events of the stage ─▶ log on disk ─▶ LogExamples ─┐                       ┌▶ ten best of the catalogue
                                                             ├▶ FitLoop ─▶ judge ────┤
    ctr:  rows of the split, their own negatives ────────────┘  stops on valid       └▶ a score each row

A judge knows an item by its words (mean of trained word vectors), by a fixed vector of its text (latent semantic
analysis) where pictures would stand, and by an identity of the width that the peers' tables have.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from couturier.components.interest.base import ContentJudge
from couturier.components.interest.encoder import word_bags, words_of
from couturier.components.interest.items import Content
from couturier.components.interest.judge import judge_class, make_judge
from couturier.components.interest.log import Log, write_log
from couturier.components.interest.log_examples import LogExamples, history_rows
from couturier.components.interest.loop import FitLoop, LoopConfig
from couturier.components.interest.transitions import log_transitions
from couturier.components.interest.types import TrainBatch
from couturier.components.runtime import global_seed, threads

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
from .our_examples import CtrExamples, History, Moments, Setting

_USERS, _CANDIDATES, _VALID_USERS = 32, 512, 1000


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


@torch.no_grad()
def ten_best(
    judge: ContentJudge, history: History, users: np.ndarray, now_s: np.ndarray, mask: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``user, item, rank`` of everybody's ten best of the whole catalogue."""
    items_ID, lengths, found = judge.embed_items(), history.lengths(users), []
    size = 256 if judge.every_position else _USERS
    for begin in range(0, len(users), size):
        part = slice(begin, begin + size)
        state = judge.encode(history.batch(users[part], lengths[part], now_s[part], items_ID))
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
    """A validation that likes only the look at one step: how a test model repeats what was best on valid.

    The loop takes NaN for a figure that is not to be had, and goes on.
    """
    looks = iter(range(1, 10**9))

    def look(judge: ContentJudge) -> float:
        at = next(looks) * setting.loop.eval_every
        return math.nan if at < step else float(at == step)

    return look


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


def topk_examples(model: str, setting: Setting, log: Log, history: History, mask: bool) -> Any:
    """The product's streamed log; or moments, where baskets are to be found and the judge learns from candidates."""
    every_position = judge_class(model).every_position
    if mask or every_position:
        return LogExamples(setting.log, log, pieces=every_position, seed=setting.loop.seed)
    return Moments(history, setting, log.items)


def moments(split: Path, task: str, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """Who is tested at a stage, and when the first thing to be found was taken, in seconds."""
    events = columns(split / f"topk-{task}.parquet")
    at = events["role"] == stage
    users, first = np.unique(events["user"][at], return_index=True)
    return users, events["timestamp_us"][at][first] // 1_000_000


def run_topk(args: Any, facts: dict[str, Any], scratch: Path) -> None:
    """Fit on the log of a stage and rank the catalogue for everybody."""
    task = args.form.removeprefix("topk-")
    events, wanted = fit_events(args.split, task, args.stage), truth(args.split, task, args.stage)
    mask = masked(args.split, task)
    items = pl.read_parquet(args.split / "items.parquet").height
    setting = Setting.of(args.config, args.seed)
    history = History(events, setting)
    users, now_s = moments(args.split, task, args.stage)
    stop = args.config.get("epochs", 0)
    if stop:
        setting = replace(setting, loop=replace(setting.loop, patience=1))

    def look(judge: ContentJudge) -> float:
        some = slice(0, _VALID_USERS)
        found = ten_best(judge, history, users[some], now_s[some], mask)
        return ndcg(*found, {int(user): wanted[int(user)] for user in users[some]})

    with timed(facts, "fit_s"):
        log = contract_log(events, items, scratch)
        about = content(args.split, np.bincount(events["item"] - 1, minlength=items))
        examples = topk_examples(args.model, setting, log, history, mask)
        loop = fitted(args.model, setting, about, log, examples, stopping_at(stop, setting) if stop else look)
        judge = loop.run()
    facts |= {"best_epochs": loop.best_step, "valid": loop.best_figure, "steps": loop.step}
    with timed(facts, "predict_s"):
        found = ten_best(judge, history, users, now_s, mask)
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
    history = History(whole, setting)
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
        inner: Any = topk_examples(args.model, setting, log, History(events, setting), True)
    else:
        setting, log, about, inner, _, _ = ctr_parts(args, form, scratch)
    steps, spent, spent_cpu, counted = 5, 0.0, 0.0, _Counted(inner)
    for wanted_s in (1.0, float(args.config.get("seconds", 10))):
        steps = max(5, round(steps * wanted_s / spent)) if spent else steps
        loop_config = LoopConfig(steps=steps, eval_every=10**9, seed=args.seed)
        timed_setting = replace(setting, loop=loop_config)
        counted = _Counted(inner)
        loop = fitted(args.model, timed_setting, about, log, counted, lambda judge: 0.0)
        began, began_cpu = time.perf_counter(), time.process_time()
        loop.run()
        spent, spent_cpu = time.perf_counter() - began, time.process_time() - began_cpu
    facts["sequences_per_s"] = counted.sequences / spent
    facts["positions_per_s"] = counted.positions / spent
    facts["rows_per_s"] = counted.candidates / spent
    facts["positions_per_cpu_s"] = counted.positions / spent_cpu
    facts["rows_per_cpu_s"] = counted.candidates / spent_cpu


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
