"""Runs peers on a split under one tuning budget, and keeps every run by what it depends on.

    grid[:budget] ─▶ valid, seed 0 ─▶ best by NDCG@10 or gAUC ─▶ test, each seed ─▶ evaluator ─▶ Row

A run lies in ``runs/<split hash>/<form>/<peer>-<model>/<stage>-<seed>-<hash of the settings>/`` of the cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from couturier.components.files import sha256_of_json

from . import environments, evaluator
from .environments import PeerUnavailable
from .split import Split

Say = Callable[[str], None]
COSTS = ("fit_s", "predict_s", "cpu_fit_s", "cpu_predict_s", "peak_bytes")


class NotCached(PeerUnavailable):
    """A run was asked of the cache alone, and is not there."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A peer's model and the settings that may be tried for it, the default first."""

    peer: str
    name: str
    grid: tuple[dict[str, Any], ...]
    seeded: bool = True
    """Whether a seed changes anything; where not, one run stands for all seeds."""
    quick: dict[str, Any] | None = None
    """The one setting of a quick run; None takes the default."""
    slow: bool = False
    """Whether a quick run leaves it out."""
    source: str = ""
    """A hash of the code behind it, for our own models, whose code is not pinned by an environment."""

    @property
    def title(self) -> str:
        return f"{self.peer}/{self.name}"


_SASREC: dict[str, Any] = {"batch_size": 32, "lr": 2e-3, "epochs": 100, "round": 4, "patience": 3, "limit_s": 150}
_QUICK_SASREC: dict[str, Any] = {"batch_size": 32, "lr": 2e-3, "epochs": 8, "round": 8}
TOPK = (
    Model(peer="rectools", name="pop", grid=({},), seeded=False),
    Model(
        peer="rectools",
        name="ease",
        grid=tuple({"regularization": value} for value in (300.0, 1000.0, 100.0, 10000.0, 30.0, 3000.0)),
        seeded=False,
    ),
    Model(
        peer="implicit",
        name="knn",
        grid=tuple({"weighting": kind, "K": count} for kind in ("tfidf", "bm25") for count in (50, 20, 200)),
        seeded=False,
    ),
    Model(
        peer="implicit",
        name="als",
        grid=(
            {"factors": 32, "iterations": 10, "regularization": 0.05},
            {"factors": 64, "iterations": 15, "regularization": 0.05},
            {"factors": 64, "iterations": 15, "regularization": 1.0},
            {"factors": 64, "iterations": 15, "regularization": 10.0, "alpha": 10.0},
            {"factors": 32, "iterations": 15, "regularization": 10.0, "alpha": 5.0},
            {"factors": 16, "iterations": 15, "regularization": 0.05},
        ),
    ),
    Model(
        peer="rectools",
        name="sasrec",
        grid=(
            _SASREC,
            {**_SASREC, "session_max_len": 100},
            {**_SASREC, "dropout_rate": 0.5},
            {**_SASREC, "lr": 1e-3},
        ),
        quick=_QUICK_SASREC,
    ),
    Model(peer="rectools", name="gsasrec", grid=(_SASREC, {**_SASREC, "dropout_rate": 0.5}), slow=True),
)
_CLICK: dict[str, Any] = {"epochs": 8}
_QUICK_CLICK: dict[str, Any] = {"epochs": 1}
_RATES = (_CLICK, {**_CLICK, "learning_rate": 3e-3}, {**_CLICK, "net_dropout": 0.3})
# Favourites for baskets only: elsewhere what a person had is left out.
FAVOURITES = Model(peer="reference", name="favourites", grid=({},), seeded=False)
POPULARITY = Model(peer="reference", name="popularity", grid=({},), seeded=False)
CLICK = tuple(
    Model(peer="fuxictr", name=name, grid=(*_RATES, {**_CLICK, **own}), quick=_QUICK_CLICK)
    for name, own in (
        ("din", {"attention_hidden_activations": "ReLU"}),
        ("sdim", {"num_hashes": 16, "hash_bits": 4}),
        ("twin", {"topk": 50}),
    )
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much may be spent on each model, the same for everybody."""

    budget: int = 4
    """Settings tried on valid; 1 takes the default untried."""
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 2
    limit_s: float = 3600.0
    """Wall seconds that one process may take."""
    install: bool = True
    quick: bool = False
    """Whether each model takes the one setting of its quick run, untried."""
    cached: bool = False
    """Whether nothing is fitted: settings and seeds that the cache lacks are left out."""


@dataclass(kw_only=True)
class Row:
    """One model's figures on one form of one split."""

    title: str
    form: str
    metrics: evaluator.PerUser
    figures: dict[str, float] = field(default_factory=dict)
    """``auc`` and ``logloss``, means over seeds."""
    cost: dict[str, float] = field(default_factory=dict)
    """``COSTS``, means over seeds; ``tune_s``: processor seconds of all of the tuning."""
    config: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    tried: int = 1
    """How many settings were compared on valid."""


def measure(split: Split, form: str, stage: str, out: Path) -> tuple[evaluator.PerUser, dict[str, float]]:
    """The one evaluator on what an adapter (or a judge of ours) left in a folder."""
    kind, _, which = form.partition("-")
    if kind == "topk":
        topk = pl.read_parquet(out / "topk.parquet")
        return evaluator.rank_metrics(topk, split.truth(which, stage), split.seen(which, stage)), {}
    scores = pl.read_parquet(out / "scores.parquet")["score"].to_numpy()
    return evaluator.click_metrics(scores, split.table(f"ctr-{which}-{stage}"))


def aim(form: str) -> str:
    """The metric that settings are chosen by."""
    return "ndcg@10" if form.startswith("topk") else "gauc"


class Runner:
    """Fits one peer's models on one split, reusing what the cache holds."""

    def __init__(self, split: Split, cache: Path, plan: Plan, say: Say) -> None:
        self._split, self._cache, self._plan, self._say = split, cache, plan, say

    def row(self, model: Model, form: str) -> Row:
        """Tune and test one model.

        Raises:
            PeerUnavailable: its environment is not there, or a process failed.
        """
        python = self._python(model)
        config, tune_s, tried = self._tuned(python, model, form)
        runs, figures, costs = [], [], []
        for seed in self._plan.seeds if model.seeded else (0,):
            try:
                facts, out = self._run(python, model, form, "test", config, seed)
            except NotCached:
                continue
            run, extra = measure(self._split, form, "test", out)
            self._say(f"  {model.title} {form} test, seed {seed}: {_shown(run)}, fit {facts['fit_s']:.1f} s")
            runs.append(run)
            figures.append(extra)
            costs.append({name: float(facts[name]) for name in COSTS})
        if not runs:
            raise NotCached(f"{model.title} {form}: no test run in the cache.")
        return Row(
            title=model.title,
            form=form,
            metrics=evaluator.mean_over_seeds(runs),
            figures={name: float(np.mean([one[name] for one in figures])) for name in figures[0]},
            cost={name: float(np.mean([one[name] for one in costs])) for name in costs[0]} | {"tune_s": tune_s},
            config=config,
            seeds=len(runs),
            tried=tried,
        )

    def speed(self, model: Model, form: str, config: dict[str, Any]) -> dict[str, Any]:
        """A peer's training speed, measured now: never taken from the cache.

        Raises:
            PeerUnavailable: its environment is not there, or the process failed.
        """
        python = self._python(model)
        out = self._cache / "speed" / f"{model.peer}-{model.name}"
        (out / "result.json").unlink(missing_ok=True)
        words = self._words(model, form, "test", config, 0)
        plan = self._plan
        return environments.run_adapter(python, model.peer, words, out, threads=plan.threads, limit_s=plan.limit_s)

    def _tuned(self, python: Path, model: Model, form: str) -> tuple[dict[str, Any], float, int]:
        """The best of the grid on valid, with the number of epochs that were best there; seconds; settings tried."""
        grid = list(model.grid[: self._plan.budget])
        if self._plan.quick:
            grid = [model.quick if model.quick is not None else model.grid[0]]
        # A ranking model that stops early needs valid to learn when, since it is then fitted on valid as well.
        if len(grid) == 1 and (form.startswith("ctr") or "patience" not in grid[0]):
            return grid[0], 0.0, 1
        best, chosen, spent, tried = -1.0, grid[0], 0.0, 0
        for config in grid:
            try:
                facts, out = self._run(python, model, form, "valid", config, 0)
            except NotCached:
                continue
            tried += 1
            run, _ = measure(self._split, form, "valid", out)
            value = float(run.values[aim(form)].mean())
            self._say(f"  {model.title} {form} valid {aim(form)} {value:.4f} in {facts['fit_s']:.1f} s: {config}")
            spent += float(facts["cpu_fit_s"])
            if value > best:
                best = value
                chosen = {**config, "epochs": facts["best_epochs"]} if "best_epochs" in facts else config
        return chosen, spent, max(1, tried)

    def _python(self, model: Model) -> Path:
        if model.peer in ("ours", "reference"):
            return Path(sys.executable)
        return environments.environment(model.peer, self._cache, install=self._plan.install)

    def _words(self, model: Model, form: str, stage: str, config: dict[str, Any], seed: int) -> dict[str, str]:
        return {
            "split": str(self._split.folder),
            "form": form,
            "stage": stage,
            "model": model.name,
            "config": json.dumps(config, sort_keys=True),
            "seed": str(seed),
        }

    def _run(
        self, python: Path, model: Model, form: str, stage: str, config: dict[str, Any], seed: int
    ) -> tuple[dict[str, Any], Path]:
        folder = self._cache / "runs" / self._split.hash / form / f"{model.peer}-{model.name}"
        digest = sha256_of_json({**config, "source": model.source} if model.source else config)[:10]
        out = folder / f"{stage}-{seed}-{digest}"
        words = self._words(model, form, stage, config, seed)
        plan = self._plan
        if plan.cached and model.peer != "reference" and not (out / "result.json").is_file():
            raise NotCached(f"{model.title} {form}: not in the cache.")
        facts = environments.run_adapter(python, model.peer, words, out, threads=plan.threads, limit_s=plan.limit_s)
        return facts, out


def rows(runner: Runner, models: tuple[Model, ...], form: str, say: Say) -> list[Row]:
    """Every model that can be run here; the others are named with their reason."""
    found = []
    for model in models:
        try:
            found.append(runner.row(model, form))
        except PeerUnavailable as error:
            say(f"  left out: {error}")
    return found


def _shown(run: evaluator.PerUser) -> str:
    return ", ".join(f"{name} {values.mean():.4f}" for name, values in run.values.items())
