"""Rows that broke a rule: kept aside with the rules they broke, so that ``kept + quarantined = raw``, always.

``quarantine.parquet`` has one row per failing row, sorted by table and row:

* ``table`` str, ``row`` i64: which row of which raw table, counted from 0.
* ``rules`` list[str]: the contract's rules it broke, such as ``events.quantity_range``.
* ``expectations`` list[str]: the Great Expectations type of each of those rules.
* ``reason`` str: the same in words.
* ``json`` str: the row itself; of a picture's bytes only their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from couturier.components.data.expectations import Report, Rule
from couturier.components.errors import DataError

QUARANTINE = "quarantine.parquet"
SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "table": pl.String,
    "row": pl.Int64,
    "rules": pl.List(pl.String),
    "expectations": pl.List(pl.String),
    "reason": pl.String,
    "json": pl.String,
}


@dataclass(kw_only=True)
class Quarantine:
    """Collects failing rows of the ``raw`` tables and splits each table in two."""

    raw: Mapping[str, pl.DataFrame]
    _failures: dict[str, list[pl.DataFrame]] = field(default_factory=dict)

    def add(self, report: Report, *, because: Mapping[str, pl.Series] | None = None) -> None:
        """Take in every failing row of a report on ``report.suite.table``. ``because`` maps a rule's name to one
        further reason a row (a series as long as the raw table), such as why its item was quarantined."""
        for verdict in report.verdicts:
            if len(verdict.rows):
                reasons = (because or {}).get(verdict.rule.name)
                self._failures.setdefault(report.suite.table, []).append(_failed(verdict.rule, verdict.rows, reasons))

    def failed(self, table: str) -> np.ndarray:
        """Indices of the rows of ``table`` that broke a rule so far, ascending, each once."""
        parts = [part["row"].to_numpy() for part in self._failures.get(table, [])]
        return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    def kept(self, table: str) -> pl.DataFrame:
        """The rows of ``table`` that broke no rule so far, in raw order."""
        mask = np.ones(self.raw[table].height, dtype=bool)
        mask[self.failed(table)] = False
        return self.raw[table].filter(pl.Series(mask))

    def reasons(self, table: str) -> pl.DataFrame:
        """``row``, ``rules``, ``expectations``, ``reason`` of the failing rows of ``table``, sorted by row."""
        columns = ("row", "rules", "expectations", "reason")
        if table not in self._failures:
            return pl.DataFrame(schema={name: SCHEMA[name] for name in columns})
        return (
            pl.concat(self._failures[table])
            .group_by("row")
            .agg("rules", "expectations", pl.col("reason").str.join("; "))
            .sort("row")
            .select(columns)
        )

    def frame(self, table: str) -> pl.DataFrame:
        """The failing rows of one table in the form of ``quarantine.parquet``."""
        reasons = self.reasons(table)
        rows = _without_bytes(self.raw[table][reasons["row"].to_numpy()])
        encoded = rows.select(pl.struct(pl.all()).struct.json_encode().alias("json"))
        return (
            pl.concat([reasons, encoded], how="horizontal")
            .with_columns(pl.lit(table).alias("table"))
            .select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())
        )

    def write(self, folder: Path) -> None:
        """Write ``quarantine.parquet`` into ``folder``."""
        pl.concat([self.frame(table) for table in sorted(self.raw)]).write_parquet(folder / QUARANTINE)


def explain_quarantine(folder: Path) -> pl.DataFrame:
    """What a ``validate`` artifact set aside, grouped by reason: ``table``, ``reason``, ``rows`` (how many),
    ``first_row`` and ``example`` (that row as JSON), most rows first.

    Raises:
        DataError: the folder holds no quarantine.
    """
    path = folder / QUARANTINE
    if not path.is_file():
        raise DataError(f"{folder} holds no {QUARANTINE}. Run `couturier validate` and give the folder that it names.")
    return (
        pl.read_parquet(path)
        .sort("table", "row")
        .group_by("table", "reason")
        .agg(rows=pl.len().cast(pl.Int64), first_row=pl.col("row").first(), example=pl.col("json").first())
        .sort(["rows", "table", "reason"], descending=[True, False, False])
    )


def _failed(rule: Rule, rows: np.ndarray, because: pl.Series | None) -> pl.DataFrame:
    failed = pl.DataFrame({"row": pl.Series(rows, dtype=pl.Int64)}).with_columns(
        rules=pl.lit(rule.name),
        expectations=pl.lit(rule.expectation.expectation_type),
        reason=pl.lit(rule.reason),
    )
    if because is None:
        return failed
    return failed.with_columns(reason=pl.col("reason") + because[rows].fill_null(""))


def _without_bytes(rows: pl.DataFrame) -> pl.DataFrame:
    binary = [name for name, dtype in rows.schema.items() if dtype == pl.Binary]
    return rows.with_columns(pl.col(name).bin.size().alias(f"{name}_bytes") for name in binary).drop(binary)
