"""The rules of the contract as Great Expectations suites, and the one place where Great Expectations is run.

A rule is one expectation with a name, a sentence that says what is wanted, a sentence that says what a failing row did,
and two shares of failing rows: above ``warn_share`` the run says so, above ``stop_share`` (which Great Expectations
itself applies, as ``mostly``) the run stops. Rules about rows that name other tables read helper columns (listed in
``contract_rules.py``) that a join put beside the row, so one suite can look at several tables.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from couturier.components.errors import DataError

if TYPE_CHECKING:
    import great_expectations.expectations as gxe

TABLES = ("events", "items", "pictures", "users")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One expectation. ``name`` is ``table.what``; ``wanted`` and ``reason`` are sentences without a full stop."""

    name: str
    wanted: str
    reason: str
    expectation: gxe.Expectation
    stop_share: float
    warn_share: float
    setting: str
    """The setting of the contract that a person changes to allow more, or another range."""

    @property
    def table(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Rules that are checked together on one frame of ``table``; ``about`` heads their page of the Data Docs."""

    name: str
    table: str
    about: str
    rules: list[Rule]

    @property
    def columns(self) -> list[str]:
        """The columns the rules read, each once, in the order of the rules."""
        wanted: list[str] = []
        for rule in self.rules:
            kwargs = rule.expectation.configuration.kwargs
            wanted += [kwargs[key] for key in ("column", "column_A", "column_B") if key in kwargs]
        return list(dict.fromkeys(wanted))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What Great Expectations found for one rule: the failing ``rows`` (indices into the raw table, ascending), how
    many rows were looked at, and the share of them that failed. A rule about a whole table has no rows: its ``share``
    is 0 or 1 and ``seen`` holds the value observed."""

    rule: Rule
    rows: np.ndarray
    checked: int
    share: float
    ok: bool
    seen: str = ""

    @property
    def warns(self) -> bool:
        return self.ok and self.share > self.rule.warn_share


@dataclass(frozen=True, kw_only=True)
class Report:
    """One suite as it was run: its verdicts, and Great Expectations' own result for the Data Docs."""

    suite: Suite
    verdicts: list[Verdict]
    result: Any


@dataclass(kw_only=True)
class Rules:
    """Makes the rules of one table with its shares. ``warn_only`` rules never stop a run."""

    table: str
    stop_share: float
    warn_share: float
    rules: list[Rule] = field(default_factory=list)

    def add(
        self,
        what: str,
        wanted: str,
        reason: str,
        kind: type[gxe.Expectation],
        *,
        setting: str | None = None,
        stop_share: float | None = None,
        **kwargs: Any,
    ) -> Rules:
        """Append a rule about rows: ``kind(**kwargs)`` holds for all but ``stop_share`` of them."""
        share = self.stop_share if stop_share is None else stop_share
        name = f"{self.table}.{what}"
        allowed = f" (at most {share:.4g} of the rows may fail)" if share else ""
        expectation = kind(
            mostly=1.0 - share, description=f"{name}: {wanted}{allowed}", meta={"rule": name}, **kwargs
        )
        self.rules.append(
            Rule(
                name=name,
                wanted=wanted,
                reason=reason,
                expectation=expectation,
                stop_share=share,
                warn_share=self.warn_share,
                setting=f"stop_share_{self.table}" if setting is None else setting,
            )
        )
        return self

    def not_null(self, column: str) -> Rules:
        import great_expectations.expectations as gxe

        return self.add(
            f"{column}_not_null",
            f"{column} has a value",
            f"{column} is null",
            gxe.ExpectColumnValuesToNotBeNull,
            column=column,
        )

    def not_blank(self, column: str) -> Rules:
        """Null and empty text both fail, each under its own rule."""
        import great_expectations.expectations as gxe

        return self.not_null(column).add(
            f"{column}_not_blank",
            f"{column} is not empty text",
            f"{column} is empty text",
            gxe.ExpectColumnValueLengthsToBeBetween,
            column=column,
            min_value=1,
        )

    def unique(self, column: str) -> Rules:
        import great_expectations.expectations as gxe

        return self.add(
            f"{column}_unique",
            f"no two rows share one {column}",
            f"another row has the same {column}, and nothing says which one is right",
            gxe.ExpectColumnValuesToBeUnique,
            column=column,
        )

    def in_domain(self, column: str, values: list[Any], whose: str) -> Rules:
        import great_expectations.expectations as gxe

        return self.add(
            f"{column}_domain",
            f"{column} is one of the {len(values)} values {whose}",
            f"{column} is not one of the values {whose}",
            gxe.ExpectColumnValuesToBeInSet,
            column=column,
            value_set=values,
        )

    def between(
        self, column: str, low: Any, high: Any, *, above: bool = False, setting: str | None = None, words: str = ""
    ) -> Rules:
        """``low <= column <= high``, or ``low < column`` where ``above``; nulls pass."""
        import great_expectations.expectations as gxe

        words = words or f"{'above' if above else 'at least'} {low} and at most {high}"
        return self.add(
            f"{column}_range",
            f"{column} is {words}",
            f"{column} is not {words}",
            gxe.ExpectColumnValuesToBeBetween,
            setting=setting,
            column=column,
            min_value=low,
            max_value=high,
            strict_min=above,
        )

    def present(self, what: str, column: str, wanted: str, reason: str) -> Rules:
        """A join found a partner: the helper ``column`` is not null."""
        import great_expectations.expectations as gxe

        return self.add(what, wanted, reason, gxe.ExpectColumnValuesToNotBeNull, column=column)

    def at_least_rows(self, what: str, count: int, wanted: str, reason: str, setting: str) -> Rules:
        """A rule about the whole frame: it has at least ``count`` rows."""
        import great_expectations.expectations as gxe

        name = f"{self.table}.{what}"
        expectation = gxe.ExpectTableRowCountToBeBetween(
            min_value=count, description=f"{name}: {wanted}", meta={"rule": name}
        )
        self.rules.append(
            Rule(
                name=name,
                wanted=wanted,
                reason=reason,
                expectation=expectation,
                stop_share=0.0,
                warn_share=0.0,
                setting=setting,
            )
        )
        return self


class Checker:
    """Runs suites in an in-memory Great Expectations context: nothing is written, nobody is called."""

    def __init__(self) -> None:
        os.environ["GX_ANALYTICS_ENABLED"] = "False"
        import great_expectations as gx
        from great_expectations.data_context.types.base import ProgressBarsConfig

        self._context = gx.get_context(mode="ephemeral")
        self._context.enable_analytics(False)
        self._context.variables.progress_bars = ProgressBarsConfig(globally=False)
        self._source = self._context.data_sources.add_pandas("raw")
        self.reports: list[Report] = []

    def check(self, suite: Suite, frame: pl.DataFrame) -> Report:
        """Check every rule on ``frame``, whose row ``i`` is row ``i`` of the raw table. An empty frame breaks no rule
        about rows.

        Raises:
            DataError: Great Expectations could not work a rule out.
        """
        import great_expectations as gx

        asset = self._source.add_dataframe_asset(suite.name)
        # A frame without columns would lose its length, which rules about whole tables look at.
        columns = suite.columns or frame.columns[:1]
        batch = asset.add_batch_definition_whole_dataframe("all").get_batch(
            {"dataframe": frame.select(columns).to_pandas()}
        )
        expectations = gx.ExpectationSuite(name=suite.name, expectations=[rule.expectation for rule in suite.rules])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pandas, about how Great Expectations calls it
            result = batch.validate(
                expectations,
                result_format={"result_format": "COMPLETE", "return_unexpected_index_query": False},
            )
        by_name = {each.expectation_config.meta["rule"]: each for each in result.results}
        verdicts = [_verdict(rule, by_name[rule.name], frame.height) for rule in suite.rules]
        report = Report(suite=suite, verdicts=verdicts, result=result)
        self.reports.append(report)
        return report


def _verdict(rule: Rule, outcome: Any, height: int) -> Verdict:
    found: Mapping[str, Any] = outcome.result
    if "unexpected_index_list" in found:
        rows = np.sort(np.asarray(found["unexpected_index_list"] or [], dtype=np.int64))
        # Great Expectations divides by the values that are not null; the thresholds speak of those too.
        share = (found.get("unexpected_percent") or 0.0) / 100.0
        return Verdict(rule=rule, rows=rows, checked=height, share=share, ok=bool(outcome.success) or not len(rows))
    if "observed_value" in found:
        ok = bool(outcome.success)
        seen = str(found["observed_value"])
        return Verdict(rule=rule, rows=np.empty(0, np.int64), checked=height, share=0.0 if ok else 1.0, ok=ok, seen=seen)
    raise DataError(
        f"Great Expectations could not work out the rule {rule.name!r} ({rule.wanted}): {_raised(outcome)}. "
        "Check the values of that column with `couturier ingest`."
    )


def _raised(outcome: Any) -> str:
    messages = [outcome.exception_info, *outcome.exception_info.values()]
    texts = [str(entry["exception_message"]) for entry in messages if isinstance(entry, dict) and entry.get("exception_message")]
    return texts[0] if texts else "it gave no result"

