"""Stage ``evaluate``: the whole protocol on unseen, later users, in one table with its controls and intervals.

test windows ─▶ plan ─┬▶ generators draw (finished rows are kept) ─┐
                      └▶ rules pick real items ────────────────────┴▶ one encoder, one judge ─▶ metrics a window
metrics a window ─▶ means over users, paired bootstrap ─▶ table.json, per_user.parquet ─▶ report.html
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from couturier.components.data.formats import Catalogue, Windows
from couturier.components.evaluation import protocol
from couturier.components.evaluation.acceptance import acceptance
from couturier.components.evaluation.encoder import NAME, AttributeReader
from couturier.components.evaluation.metrics import Ruler
from couturier.components.evaluation.nats import nats, nats_table
from couturier.components.evaluation.protocol import Plan, World
from couturier.components.evaluation.samples import Sample, Samples, Tile
from couturier.components.evaluation.statistics import (
    Interval,
    bootstrap,
    paired_difference,
    paired_ratio,
    user_means,
)
from couturier.components.files import read_json, write_json
from couturier.components.generator.codec import pictures
from couturier.components.generator.tokenise import codec_quality
from couturier.components.generator.types import load_generator
from couturier.components.lineage.provenance import code_commit
from couturier.components.lineage.stages import FACTS, StageContext
from couturier.components.runtime import device_facts, threads

TABLE, PER_USER = "table.json", "per_user.parquet"
SHOWN_ROWS = ("sft", "grpo", "sft_guided", "unconditional")
DIFFERENCES = (
    ("grpo", "sft", "judge"),
    ("grpo", "sft", "basket_precision"),
    ("grpo", "wrong_user", "basket_precision"),
    ("grpo", "unconditional", "basket_precision"),
    ("sft", "sft_wrong_user", "basket_precision"),
    ("grpo", "popularity_eq", "basket_precision"),
    ("grpo", "copy_favourites_eq", "basket_precision"),
    ("grpo", "nearest_item_eq", "basket_precision"),
    ("grpo", "popularity_eq", "distinct_hits"),
    ("grpo", "copy_favourites_eq", "distinct_hits"),
    ("grpo", "sft", "distinct_hits"),
    ("grpo", "best_of_n", "basket_precision"),
    ("grpo", "sft_guided", "basket_precision"),
    ("grpo", "sft", "hr_target"),
    ("grpo", "sft", "ndcg@10"),
    ("grpo", "sft", "sim_next"),
)
"""(left row, right row, metric)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much is measured, how pictures are drawn, and what the sampling-time rivals of RL may use."""

    seed: int = 0
    threads: int = 2
    pictures: int = 10
    """Drawn a window, by every row."""
    windows_per_user: int = 2
    """Intervals come from users: few windows of many users."""
    max_users: int = 0
    """Evaluate the first so many test users; 0: all."""
    batch: int = 128
    """Windows sampled at once."""
    beams: int = 0
    """Above 0 the rows of generators, but for ``best_of_n``'s further samples, show each person's likeliest pictures,
    all different, found by a beam search that keeps so many beginnings, instead of random draws."""
    new: bool = False
    """With ``beams``: these rows pass over what the person's history holds."""
    guidance: float = 3.0
    """Of the row ``sft_guided``."""
    guided_temperature: float = 0.8
    best_of: int = 4
    """``best_of_n`` keeps the judge's favourites of ``best_of * pictures`` samples."""
    best_of_users_share: float = 0.5
    """Share of users that ``best_of_n`` is measured on; it is the dearest row."""
    nll_targets: int = 4
    """Items of each next basket whose nats are counted."""
    draws: int = 2000
    """Bootstrap draws."""
    shown_users: int = 12
    """People in the report."""


def run(ctx: StageContext) -> None:
    """``sequences``, ``tokenise``, ``judge``, ``sft``, ``rl`` → ``table.json``, ``per_user.parquet``, ``samples.*``,
    ``report.html``; facts: the figures of the table that people ask for."""
    config: Config = ctx.config
    ctx.tracker.params(asdict(config))
    catalogue = Catalogue.load(ctx.inputs["sequences"])
    plan = Plan.of(
        Windows.load(ctx.inputs["sequences"], "test"),
        seed=config.seed,
        windows_per_user=config.windows_per_user,
        max_users=config.max_users,
    )
    with threads(config.threads):
        _Evaluation(ctx, config, catalogue, plan).finish()


class _Evaluation:
    """One evaluation: rows are added one by one, then compared and written."""

    def __init__(self, ctx: StageContext, config: Config, catalogue: Catalogue, plan: Plan) -> None:
        self.ctx, self.config, self.catalogue, self.plan = ctx, config, catalogue, plan
        self.users = len(plan.windows.users)
        some = int(np.ceil(config.best_of_users_share * len(np.unique(plan.user_V))))
        self.best_of_windows = torch.from_numpy(np.flatnonzero(plan.user_V < np.unique(plan.user_V)[some - 1] + 1))
        drawn = ctx.scratch / "drawn"
        drawn.mkdir(parents=True, exist_ok=True)
        ctx.progress.start("evaluate", 7 * len(plan) + len(self.best_of_windows), unit="windows")
        self.world = World(
            catalogue,
            plan,
            tokenise=ctx.inputs["tokenise"],
            judge=ctx.inputs["judge"],
            pictures=config.pictures,
            batch=config.batch,
            beams=config.beams,
            new=config.new,
            drawn=drawn,
            advance=ctx.progress.advance,
        )
        self.codec_rows_I = self.world.finder.look(self.world.codes_IL, self.world.codec)
        reader = AttributeReader(self.world.finder, catalogue, seed=config.seed)
        self.ruler = Ruler(self.world.finder, reader, catalogue)
        self.rows: dict[str, Tensor] = {}
        self.per_window: dict[str, dict[str, np.ndarray]] = {}
        self.whole: dict[str, dict[str, float]] = {}
        self.real_items = plan.windows.basket[_places(plan)]

    def finish(self) -> None:
        """All rows, then everything that is written."""
        per_window_nats = self._draw_rows()
        self._pick_rows()
        self.ctx.progress.stop()
        table = self._table(per_window_nats)
        write_json(self.ctx.out / TABLE, table)
        self._frame().write_parquet(self.ctx.out / PER_USER)
        samples = self._samples()
        samples.save(self.ctx.out)
        self._report(table, samples)
        self._tell(table)

    def _draw_rows(self) -> dict[str, np.ndarray]:
        """Rows of the generators; returns the SFT model's nats a window."""
        config, world, plan = self.config, self.world, self.plan
        sft = load_generator(self.ctx.inputs["sft"] / "model")
        own = world.draw("sft", sft)
        self._add("sft", world.look(own))
        wrong_VK = plan.windows.favourites_WK[plan.wrong_V]
        self._add("sft_wrong_user", world.look(world.draw("sft_wrong_user", sft, favourites_VK=wrong_VK)))
        self._add("unconditional", world.look(world.draw("unconditional", sft, guidance=0.0)))
        guided = world.draw("sft_guided", sft, guidance=config.guidance, temperature=config.guided_temperature)
        self._add("sft_guided", world.look(guided))
        some = self.best_of_windows
        if config.best_of > 1:
            count = (config.best_of - 1) * config.pictures
            more = world.draw("best_of_n", sft, n=count, windows_V=some, stream="best of n")
            self._add("best_of_n", world.look(protocol.best_of(world, own[some], more, some)), some)
        found = nats(
            sft,
            plan,
            world.codes_IL,
            world.purchases_I,
            targets=config.nll_targets,
            batch=config.batch,
            advance=self.ctx.progress.advance,
        )
        rl = load_generator(self.ctx.inputs["rl"] / "model")
        self._add("grpo", world.look(world.draw("grpo", rl)))
        self._add("wrong_user", world.look(world.draw("wrong_user", rl, favourites_VK=wrong_VK)))
        return found

    def _pick_rows(self) -> None:
        """Rows of real items, and the codec's upper bound."""
        rules = (
            protocol.random_item,
            protocol.copy_last,
            protocol.copy_favourites,
            protocol.nearest_item,
            protocol.popularity,
            protocol.oracle,
        )
        for rule in rules:
            self._add(rule.__name__, rule(self.world))
        shown_Vn = self.world.finder.nearest_R[self.rows["grpo"]]
        for name in protocol.AT_EQUAL_NOVELTY:
            self._add(name, protocol.at_equal_novelty(self.world, shown_Vn, name))

    def _add(self, name: str, rows_Vn: Tensor, windows_V: Tensor | None = None) -> None:
        """Measure a row; windows it was not measured on stay unknown (NaN)."""
        at = torch.arange(len(self.plan)) if windows_V is None else windows_V
        liking_Vn = self.world.liking.of(rows_Vn, at)
        found = self.ruler.measure(rows_Vn, self.world.truth.part(at), liking_Vn)
        self.per_window[name] = {metric: _spread(values, at, len(self.plan)) for metric, values in found.items()}
        self.whole[name] = self.ruler.whole_row(rows_Vn, self.real_items)
        self.rows[name] = rows_Vn

    def _per_user(self, row: str, metric: str) -> np.ndarray:
        return user_means(self.per_window[row][metric], self.plan.user_V, self.users)

    def _table(self, per_window_nats: dict[str, np.ndarray]) -> dict[str, Any]:
        """What ``table.json`` holds."""
        sampling = {"seed": self.config.seed, "draws": self.config.draws}
        rows: dict[str, dict[str, list[float]]] = {}
        for row, metrics in self.per_window.items():
            means = {m: self._per_user(row, m) for m in metrics}
            rows[row] = {m: bootstrap(v, **sampling).as_list() for m, v in means.items() if np.isfinite(v).any()}
            rows[row] |= {metric: Interval.point(value).as_list() for metric, value in self.whole[row].items()}
        differences = {
            f"{a}-{b}:{m}": paired_difference(self._per_user(a, m), self._per_user(b, m), **sampling).as_list()
            for a, b, m in DIFFERENCES
            if a in self.per_window and b in self.per_window
        }
        between, within = self._per_user("grpo", "between_user"), self._per_user("grpo", "diversity")
        if np.isfinite(between).any():
            differences["between_user-within_user:diversity"] = paired_difference(between, within, **sampling).as_list()
        ratios = {}
        if np.nanmean(self._per_user("sft", "diversity")):
            ratio = paired_ratio(self._per_user("grpo", "diversity"), self._per_user("sft", "diversity"), **sampling)
            ratios["grpo/sft:diversity"] = ratio.as_list()
        table: dict[str, Any] = {
            "table": rows,
            "differences": differences,
            "ratios": ratios,
            "judge": _facts(self.ctx.inputs["judge"]),
            "nll": nats_table(per_window_nats, self.plan, **sampling),
            "codec": self._codec(),
            "users": {row: int(np.isfinite(self._per_user(row, "judge")).sum()) for row in self.per_window},
            "windows": len(self.plan),
            "method": _facts(self.ctx.inputs["rl"]).get("method", "grpo"),
            "encoder": NAME,
            "seed": self.config.seed,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": device_facts(),
            "commit": code_commit(),
        }
        return table | {"acceptance": acceptance(table)}

    def _codec(self) -> dict[str, float]:
        """The codec by pixels, and how often the evaluation encoder finds a reconstruction's own tile."""
        world = self.world
        found = codec_quality(world.codec, world.codes_IL, pictures(self.catalogue, world.codec.picture_size))
        nearest_I = world.finder.nearest_R[self.codec_rows_I]
        by_pixels = found.pop("retrieval_top1")
        top1 = float((nearest_I == torch.arange(len(nearest_I))).float().mean())
        return found | {"retrieval_top1": top1, "retrieval_top1_pixels": by_pixels}

    def _frame(self) -> pl.DataFrame:
        """Every per-window figure in long form: row, user_id, window (index among the test windows), metric, value."""
        return pl.concat(long_form(row, metrics, self.plan) for row, metrics in self.per_window.items())

    def _samples(self) -> Samples:
        """People for the report, spread evenly over the test users: their first window."""
        _, first = np.unique(self.plan.user_V, return_index=True)
        spread = np.unique(np.linspace(0, len(first) - 1, min(self.config.shown_users, len(first))).round().astype(int))
        samples = Samples()
        for v in first[spread].tolist():
            row = int(self.plan.rows_V[v])
            favourites = self.plan.windows.favourites_WK[row]
            samples.append(
                Sample(
                    user_id=self.plan.windows.users[self.plan.windows.user_W[row]],
                    history=favourites[favourites >= 0].tolist(),
                    rows={name: self._tiles(name, v) for name in SHOWN_ROWS},
                    next_items=self.plan.windows.basket_of(row).tolist(),
                )
            )
        return samples

    def _tiles(self, row: str, v: int) -> list[Tile]:
        finder, truth = self.world.finder, self.world.truth
        tiles = []
        for r in self.rows[row][v].tolist():
            item = int(finder.nearest_R[r])
            rgb = finder.rgb_R3HW[r].permute(1, 2, 0).contiguous().numpy()
            tiles.append(Tile(rgb, item, bool(truth.history_VI[v, item]), bool(truth.basket_VI[v, item])))
        return tiles

    def _report(self, table: dict[str, Any], samples: Samples) -> None:
        from couturier.components.evaluation.report import write_report

        stages = {"codec": "tokenise", "judge": "judge", "sft": "sft", "rl": "rl"}
        paths = {name: self.ctx.inputs[stage] / "curves.parquet" for name, stage in stages.items()}
        curves = {name: pl.read_parquet(path) for name, path in paths.items() if path.exists()}
        page = write_report(self.ctx.out, table=table, samples=samples, curves=curves, catalogue=self.catalogue)
        self.ctx.tracker.file(page)

    def _tell(self, table: dict[str, Any]) -> None:
        """The same numbers to the tracker, and the few that summaries show to the facts."""
        means = {
            f"{row}/{metric}": value[0] for row, cells in table["table"].items() for metric, value in cells.items()
        }
        means |= {f"difference/{name}": value[0] for name, value in table["differences"].items()}
        means |= {f"difference/{name}/low": value[1] for name, value in table["differences"].items()}
        means |= {f"nll/{name}": value[0] for name, value in table["nll"].items()}
        self.ctx.tracker.metrics(means, step=0)
        for row in SHOWN_ROWS:
            self.ctx.tracker.picture(f"pictures_{row}", self._sheet(row))
        self.ctx.tracker.file(self.ctx.out / TABLE)
        kept = {name: found["passed"] for name, found in table["acceptance"].items() if not found["goal"]}
        self.ctx.facts.update(
            {
                "users": table["users"]["grpo"],
                "windows": len(self.plan),
                **{row: table["table"][row]["basket_precision"] for row in ("grpo", "sft", "wrong_user")},
                "grpo_minus_sft_judge": table["differences"]["grpo-sft:judge"],
                "nll_wrong_minus_true": table["nll"]["wrong_minus_true"],
                "promises_kept": sum(kept.values()),
                "promises": len(kept),
                "promises_missed": sorted(name for name, passed in kept.items() if not passed),
            }
        )

    def _sheet(self, row: str, windows: int = 12) -> np.ndarray:
        """Pictures of the first windows, a line each, uint8 ``[H, W, 3]``."""
        rgb = self.world.finder.rgb_R3HW[self.rows[row][:windows]]
        return rgb.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).contiguous().numpy()


def long_form(row: str, metrics: dict[str, np.ndarray], plan: Plan) -> pl.DataFrame:
    """Per-window figures ``[V]`` of one row as (row, user_id, window, metric, value); unknown ones are left out."""
    users = np.asarray(plan.windows.users)[plan.user_V]
    frames = [
        pl.DataFrame({"user_id": users, "window": plan.rows_V.astype(np.int64), "value": values})
        .filter(pl.col("value").is_finite())
        .select(pl.lit(row).alias("row"), "user_id", "window", pl.lit(metric).alias("metric"), "value")
        for metric, values in metrics.items()
    ]
    return pl.concat(frames)


def _places(plan: Plan) -> np.ndarray:
    """Places in ``windows.basket`` of every next item of the plan."""
    offsets = plan.windows.basket_offsets
    return np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in plan.rows_V])


def _spread(values: np.ndarray, at: Tensor, count: int) -> np.ndarray:
    out = np.full(count, np.nan)
    out[at.numpy()] = values
    return out


def _facts(folder: Path) -> dict[str, Any]:
    """What a finished stage said of itself; nothing where it said nothing."""
    path = folder / FACTS
    return dict(read_json(path)) if path.exists() else {}
