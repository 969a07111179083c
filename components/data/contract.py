"""Stage ``validate``: the contract between whoever brings data and everything that learns from it.

    data/ ─▶ schema ─▶ pictures ─▶ items (and each has a picture) ─▶ events (and each has a kept item) ─▶ users
               │          └──────────────── rows that fail ──────────────────┴────────▶ quarantine.parquet
               └ stops at once                                   what is left ─▶ order, histories ─▶ kept tables

Great Expectations checks every rule (``contract_rules.py``); this file says in which order, what follows from a
failure, and that ``kept + quarantined = raw`` for every table. Dirt is no special case: a coupon is outside the domain
of the categories, a return has a quantity of zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from couturier.components.data import contract_rules as the
from couturier.components.data.contract_rules import Config
from couturier.components.data.data_docs import write_docs
from couturier.components.data.expectations import TABLES, Checker, Report, Suite, Verdict, percent
from couturier.components.data.formats import EVENTS, ITEMS, META, PICTURES, USERS
from couturier.components.data.quarantine import Quarantine, explain_quarantine
from couturier.components.errors import ContractError, DataError
from couturier.components.files import read_json, write_json
from couturier.components.lineage.stages import StageContext

__all__ = ["Config", "contract_summary", "explain_quarantine", "read_raw", "run"]

FILES = {"events": EVENTS, "items": ITEMS, "pictures": PICTURES, "users": USERS}
_SORTED_BY = {
    "events": ("user_id", "timestamp", "group_id", "item_id"),
    "items": ("item_id",),
    "pictures": ("item_id",),
    "users": ("user_id",),
}
_SUITES = 12
_SHOWN_ROWS = 3


def run(ctx: StageContext) -> None:
    """Check ``ctx.workspace.data``; write the kept tables, ``quarantine.parquet``, ``docs/`` and ``meta.json``.

    Raises:
        DataError: a table or ``meta.json`` is missing or cannot be read.
        ContractError: a rule fails for more rows than the contract allows. Quarantine and Data Docs of the refused
            data then lie in ``ctx.scratch / "refused"``.
    """
    raw, meta = read_raw(ctx.workspace.data)
    the.check_domains(raw, meta)
    check = _Check(ctx, raw, meta)
    ctx.progress.start("contract", _SUITES, unit="suites")
    check.structure()
    check.pictures_and_items()
    check.events_and_users()
    kept = check.kept()
    check.what_is_left(kept)
    ctx.progress.stop()
    check.conclude(ctx.out)
    for table, frame in kept.items():
        frame.write_parquet(ctx.out / FILES[table])
    rows = {table: frame.height for table, frame in kept.items()}
    write_json(ctx.out / META, {**meta, "rows": rows, "raw_rows": {table: raw[table].height for table in TABLES}})
    ctx.tracker.params({f"{row['table']}_{key}": row[key] for row in contract_summary(ctx.facts) for key in _COUNTS})


_COUNTS = ("raw", "kept", "quarantined")


def contract_summary(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for the command line: ``table``, ``raw``, ``kept``, ``quarantined``, ``share`` (set aside, 0 to 1) and
    ``rules`` (the rules that failed with their counts, most rows first), from the facts of a ``validate`` artifact."""
    summary = []
    for table in TABLES:
        entry = facts[table]
        failed = sorted(entry["failed"].items(), key=lambda pair: (-pair[1], pair[0]))
        summary.append(
            {
                "table": table,
                **{key: entry[key] for key in _COUNTS},
                "share": entry["quarantined"] / max(1, entry["raw"]),
                "rules": ", ".join(f"{name.removeprefix(table + '.')} {count:,}" for name, count in failed),
            }
        )
    return summary


def read_raw(folder: Path) -> tuple[dict[str, pl.DataFrame], dict[str, Any]]:
    """The four raw tables by name, and ``meta.json``.

    Raises:
        DataError: one of them is missing or cannot be read.
    """
    again = "Make it again with `couturier ingest`."
    raw: dict[str, pl.DataFrame] = {}
    for table, name in FILES.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing. Make the raw tables with `couturier ingest`.")
        try:
            raw[table] = pl.read_parquet(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}. {again}") from error
    path = folder / META
    try:
        meta = read_json(path)
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. {again}") from error
    missing = [key for key in ("adapter", "settings", "attributes") if key not in meta]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}. {again}")
    return raw, meta


class _Check:
    """One run of the contract. Each step checks suites and hands failing rows to the quarantine."""

    def __init__(self, ctx: StageContext, raw: dict[str, pl.DataFrame], meta: dict[str, Any]) -> None:
        self.ctx, self.raw, self.meta = ctx, raw, meta
        self.config: Config = ctx.config
        self.checker = Checker()
        self.quarantine = Quarantine(raw=raw)
        self.stops: list[tuple[Verdict, pl.DataFrame]] = []

    def suite(self, suite: Suite, frame: pl.DataFrame) -> Report:
        """Check one suite and note the rules that stop the run."""
        report = self.checker.check(suite, frame)
        self.stops += [(verdict, frame) for verdict in report.verdicts if not verdict.ok]
        self.ctx.progress.advance(note=suite.name)
        return report

    def structure(self) -> None:
        """Columns, types, row counts. Nothing else can be checked when they are wrong."""
        self.suite(the.schema_suite(), the.schema_frame(self.raw, self.meta))
        needed = TABLES[:3]
        sizes = {"table": list(needed), "rows": [self.raw[table].height for table in needed]}
        self.suite(the.filled_suite(), pl.DataFrame(sizes))
        if self.stops:
            self.conclude(self.ctx.out)

    def pictures_and_items(self) -> None:
        """Pictures by their own rules, items by theirs and by having a picture, then pictures by having an item."""
        items, pictures = self.raw["items"], self.raw["pictures"]
        self.quarantine.add(
            self.suite(
                the.pictures_suite(self.config, self.meta),
                _pointing(pictures, "item_found", items).with_columns(rgb_bytes=pl.col("rgb").bin.size()),
            )
        )
        usable = self.quarantine.kept("pictures")
        with_picture = _pointing(items, "picture_kept", usable)
        errors = _by_item(pictures.filter(pl.col("error").is_not_null()), pl.col("error"))
        self.quarantine.add(
            self.suite(the.items_suite(self.config, self.meta, items.columns), with_picture),
            because={"items.has_picture": _why(items, errors)},
        )
        # A picture that failed by itself is not blamed for its item, which failed for want of the picture.
        failed = np.zeros(pictures.height, dtype=bool)
        failed[self.quarantine.failed("pictures")] = True
        linked = self._kept_items("pictures").with_columns(
            item_kept=pl.when(pl.Series(failed)).then(pl.lit("-")).otherwise("item_kept")
        )
        self.quarantine.add(
            self.suite(the.picture_items_suite(self.config), linked),
            because={"pictures.item_kept": _why(pictures, self._item_reasons())},
        )

    def events_and_users(self) -> None:
        events, users = self.raw["events"], self.raw["users"]
        self.quarantine.add(self.suite(the.events_suite(self.config, self.meta, events.columns), events))
        self.quarantine.add(
            self.suite(the.event_items_suite(self.config), self._kept_items("events")),
            because={"events.item_kept": _why(events, self._item_reasons())},
        )
        self.quarantine.add(self.suite(the.users_suite(self.config, self.meta, users.columns), users))

    def kept(self) -> dict[str, pl.DataFrame]:
        """What every table keeps, sorted by its ids (events by user and time), every column breaking ties."""
        kept = {}
        for table in TABLES:
            frame = self.quarantine.kept(table)
            first = [name for name in _SORTED_BY[table] if name in frame.columns]
            rest = [name for name in frame.columns if name not in first and frame.schema[name] != pl.Binary]
            kept[table] = frame.sort([*first, *rest], maintain_order=True)
        return kept

    def what_is_left(self, kept: Mapping[str, pl.DataFrame]) -> None:
        """The order of the kept events, how much history they give, and how much of each table is left."""
        events = kept["events"]
        previous = pl.col("timestamp").diff().over("user_id").dt.total_microseconds() / 1e6
        self.suite(the.order_suite(), events.select("user_id", since_previous_s=previous))
        group = pl.col("timestamp").dt.epoch("us").cast(pl.String)
        if "group_id" in events.columns:
            group = pl.coalesce("group_id", group)
        histories = events.group_by("user_id").agg(groups=group.n_unique().cast(pl.Int64)).sort("user_id")
        self.suite(the.histories_suite(self.config), histories)
        enough = histories.filter(pl.col("groups") >= self.config.min_groups)
        self.suite(the.audience_suite(self.config), enough)
        lost = {table: len(self.quarantine.failed(table)) / max(1, self.raw[table].height) for table in TABLES}
        self.suite(the.shares_suite(self.config), pl.DataFrame([lost]))
        self.ctx.facts["users_with_history"] = enough.height

    def conclude(self, out: Path) -> None:
        """Write the facts, the quarantine and the Data Docs into ``out``; when a rule stops the run, into
        ``scratch/refused``, which outlives the failure, and raise."""
        facts = self.ctx.facts
        facts.update(self._facts())
        folder = self.ctx.scratch / "refused" if self.stops else out
        folder.mkdir(parents=True, exist_ok=True)
        self.quarantine.write(folder)
        reasons = explain_quarantine(folder).to_dicts()
        write_docs(folder / "docs", self.checker.reports, contract_summary(facts), facts["warnings"], reasons)
        if self.stops:
            raise ContractError(_refusal(self.stops, folder))

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for table in TABLES:
            raw, quarantined = self.raw[table].height, len(self.quarantine.failed(table))
            kept = self.quarantine.kept(table).height
            if kept + quarantined != raw:
                raise DataError(f"{table}: kept {kept} + quarantined {quarantined} is not raw {raw}: report this.")
            failed = {
                verdict.rule.name: len(verdict.rows)
                for report in self.checker.reports
                for verdict in report.verdicts
                if report.suite.table == table and len(verdict.rows)
            }
            facts[table] = {"raw": raw, "kept": kept, "quarantined": quarantined, "failed": failed}
        verdicts = [verdict for report in self.checker.reports for verdict in report.verdicts]
        facts["rules"] = len(verdicts)
        facts["warnings"] = [_warning(verdict) for verdict in verdicts if verdict.warns]
        return facts

    def _kept_items(self, table: str) -> pl.DataFrame:
        """``table`` with ``item_found`` and ``item_kept``; a row without a known item is not blamed a second time."""
        items, frame = self.raw["items"], self.raw[table]
        found = _pointing(frame, "item_found", items)
        kept = _pointing(frame, "item_kept", self.quarantine.kept("items"))["item_kept"]
        blamed = pl.col("item_found").is_null() | pl.col("item_id").is_null()
        return found.with_columns(item_kept=pl.when(blamed).then(pl.lit("-")).otherwise(kept))

    def _item_reasons(self) -> pl.DataFrame:
        reasons = self.quarantine.reasons("items")
        return _by_item(self.raw["items"][reasons["row"].to_numpy()].with_columns(reasons["reason"]), pl.col("reason"))


def _pointing(frame: pl.DataFrame, name: str, target: pl.DataFrame) -> pl.DataFrame:
    """``frame`` with a column ``name``: its item_id where ``target`` has it, else null; ``-`` where it has no id."""
    known = pl.col("item_id").is_in(target["item_id"].drop_nulls().unique().implode())
    found = pl.when(pl.col("item_id").is_null()).then(pl.lit("-")).when(known).then(pl.col("item_id"))
    return frame.with_columns(found.alias(name))


def _by_item(frame: pl.DataFrame, why: pl.Expr) -> pl.DataFrame:
    """``item_id``, ``why``: the different reasons of each item as one text."""
    return (
        frame.select("item_id", why.alias("why"))
        .drop_nulls()
        .group_by("item_id")
        .agg(pl.col("why").unique().sort().str.join("; "))
    )


def _why(frame: pl.DataFrame, reasons: pl.DataFrame) -> pl.Series:
    """For each row, the reason of its item in brackets, or null."""
    joined = frame.select("item_id").join(reasons, on="item_id", how="left", maintain_order="left")
    return joined.select(pl.format(" ({})", pl.col("why"))).to_series()


def _warning(verdict: Verdict) -> str:
    rule = verdict.rule
    return (
        f"{rule.name}: {len(verdict.rows):,} of {verdict.checked:,} rows ({percent(verdict.share)}): {rule.reason} "
        f"(warns above {percent(rule.warn_share)}, stops above {percent(rule.stop_share)})"
    )


def _refusal(stops: list[tuple[Verdict, pl.DataFrame]], folder: Path) -> str:
    """One sentence a fact: the first rule that stops the run, how often it fails, where, and the ways out."""
    verdict, frame = stops[0]
    rule = verdict.rule
    if len(verdict.rows):
        read = rule.expectation.configuration.kwargs
        shown = [f"row {row}: {_shown(frame, read, row)}" for row in verdict.rows[:_SHOWN_ROWS]]
        seen = f"{len(verdict.rows):,} of {verdict.checked:,} rows ({percent(verdict.share)}), first {'; '.join(shown)}"
        seen = f"{seen}; {percent(rule.stop_share)} may fail"
    else:
        seen = f"{verdict.seen} seen"
    named = " or ".join(f"contract.{setting}" for setting in rule.settings)
    ways = f", or change {named} (--set NAME=VALUE)" if named else ""
    others = sorted({other.rule.name for other, _ in stops[1:]} - {rule.name})
    more = f" Further rules stop it too: {', '.join(others)}." if others else ""
    return (
        f"the data break the rule {rule.name!r} of the contract ({rule.wanted}): {seen}. "
        f"Mend the data and ingest again{ways}. Every failing row is in {folder}, with docs/index.html to read.{more}"
    )


def _shown(frame: pl.DataFrame, kwargs: Mapping[str, Any], row: int) -> str:
    read = [kwargs[key] for key in ("column", "column_A", "column_B") if key in kwargs]
    names = [name for name in ("table", "column", "user_id", "item_id", *read) if name in frame.columns]
    values = frame[int(row)].select(list(dict.fromkeys(names))).row(0, named=True)
    return ", ".join(f"{name}={value!s}" for name, value in values.items())
