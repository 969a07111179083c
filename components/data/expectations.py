"""The rules of the contract as Great Expectations suites, and the one place where Great Expectations is run.

A rule is one expectation with a name, a sentence that says what is wanted, a sentence that says what a failing row did,
and two shares of failing rows: above ``warn_share`` the run says so, above ``stop_share`` (which Great Expectations
itself applies, as ``mostly``) the run stops. Rules about rows that name other tables read helper columns (listed in
``contract_rules.py``) that a join put beside the row, so one suite can look at several tables.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from couturier.components.errors import DataError

if TYPE_CHECKING:
    import great_expectations.expectations as gxe

TABLES = ("events", "items", "pictures", "users")
# Failing values that the Data Docs show of a rule.
_SAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One expectation. ``name`` is ``table.what``; ``wanted`` and ``reason`` are sentences without a full stop."""

    name: str
    wanted: str
    reason: str
    expectation: gxe.Expectation
    stop_share: float
    warn_share: float
    settings: tuple[str, ...]
    """Settings of the contract that a person may change to let more rows pass."""

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
    """Makes the rules of one table with its shares."""

    table: str
    stop_share: float
    warn_share: float
    has_setting: bool = False
    """The contract has a setting ``stop_share_TABLE``."""
    rules: list[Rule] = field(default_factory=list)

    def add(
        self,
        what: str,
        wanted: str,
        reason: str,
        kind: Callable[..., gxe.Expectation],
        *,
        settings: tuple[str, ...] = (),
        stop_share: float | None = None,
        **kwargs: Any,
    ) -> Rules:
        """Append a rule about rows: ``kind(**kwargs)`` holds for all but ``stop_share`` of them. ``settings`` names
        settings of the contract that move the rule, beside the share it may fail for."""
        share = self.stop_share if stop_share is None else stop_share
        name = f"{self.table}.{what}"
        allowed = f" (at most {percent(share)} may fail)" if share else ""
        expectation = kind(mostly=1.0 - share, description=f"{name}: {wanted}{allowed}", meta={"rule": name}, **kwargs)
        self.rules.append(
            Rule(
                name=name,
                wanted=wanted,
                reason=reason,
                expectation=expectation,
                stop_share=share,
                warn_share=self.warn_share,
                settings=settings if stop_share is not None else (*settings, *self._share_setting()),
            )
        )
        return self

    def _share_setting(self) -> tuple[str, ...]:
        return (f"stop_share_{self.table}",) if self.has_setting else ()

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
        self,
        column: str,
        low: Any,
        high: Any,
        *,
        above: bool = False,
        settings: tuple[str, ...] = (),
        words: str = "",
    ) -> Rules:
        """``low <= column <= high``, or ``low < column`` where ``above``; nulls pass."""
        import great_expectations.expectations as gxe

        words = words or f"{'above' if above else 'at least'} {low:g} and at most {high:g}"
        return self.add(
            f"{column}_range",
            f"{column} is {words}",
            f"{column} is out of range ({words})",
            gxe.ExpectColumnValuesToBeBetween,
            settings=settings,
            column=column,
            min_value=low,
            max_value=high,
            strict_min=above,
        )

    def present(self, what: str, column: str, wanted: str, reason: str) -> Rules:
        """A join found a partner: the helper ``column`` is not null."""
        import great_expectations.expectations as gxe

        return self.add(what, wanted, reason, gxe.ExpectColumnValuesToNotBeNull, column=column)

    def whole(
        self,
        what: str,
        wanted: str,
        reason: str,
        kind: Callable[..., gxe.Expectation],
        *,
        settings: tuple[str, ...],
        **kwargs: Any,
    ) -> Rules:
        """Append a rule about the whole frame, such as how many rows it has: it holds or it does not."""
        name = f"{self.table}.{what}"
        expectation = kind(description=f"{name}: {wanted}", meta={"rule": name}, **kwargs)
        self.rules.append(
            Rule(
                name=name,
                wanted=wanted,
                reason=reason,
                expectation=expectation,
                stop_share=0.0,
                warn_share=0.0,
                settings=settings,
            )
        )
        return self


class Checker:
    """Runs suites in an in-memory Great Expectations context: nothing is written, nobody is called."""

    def __init__(self) -> None:
        os.environ["GX_ANALYTICS_ENABLED"] = "False"
        import great_expectations as gx
        from great_expectations.data_context.types.base import (
            DataContextConfig,
            InMemoryStoreBackendDefaults,
            ProgressBarsConfig,
        )

        # By default even an in-memory context makes a folder below /tmp for its own docs.
        stores = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
        project = DataContextConfig(
            store_backend_defaults=stores, analytics_enabled=False, progress_bars=ProgressBarsConfig(globally=False)
        )
        context = gx.get_context(mode="ephemeral", project_config=project)
        asset = context.data_sources.add_pandas("raw").add_dataframe_asset("tables")
        self._frames = asset.add_batch_definition_whole_dataframe("frame")
        self.reports: list[Report] = []

    def check(self, suite: Suite, frame: pl.DataFrame) -> Report:
        """Check every rule on ``frame``, whose row ``i`` is row ``i`` of the raw table. An empty frame breaks no rule
        about rows.

        Raises:
            DataError: Great Expectations could not work a rule out.
        """
        import great_expectations as gx

        # A frame without columns would lose its length, which rules about whole tables look at.
        columns = suite.columns or frame.columns[:1]
        batch = self._frames.get_batch({"dataframe": frame.select(columns).to_pandas()})
        expectations = gx.ExpectationSuite(name=suite.name, expectations=[rule.expectation for rule in suite.rules])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pandas, about how Great Expectations calls it
            result = batch.validate(
                expectations,
                result_format={
                    "result_format": "COMPLETE",
                    "return_unexpected_index_query": False,
                    "partial_unexpected_count": _SAMPLES,
                },
            )
        by_name = {_rule_name(each): each for each in result.results}
        verdicts = [_verdict(rule, by_name[rule.name], frame.height) for rule in suite.rules]
        report = Report(suite=suite, verdicts=verdicts, result=result)
        self.reports.append(report)
        return report


def percent(share: float) -> str:
    """A share in the words of people.

    Example:
        >>> percent(0.1), percent(0.00031234)
        ('10 %', '0.03123 %')
    """
    return f"{100 * share:.4g} %"


def _rule_name(outcome: Any) -> str:
    return str(outcome.expectation_config.meta["rule"])


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
        none = np.empty(0, np.int64)
        return Verdict(rule=rule, rows=none, checked=height, share=0.0 if ok else 1.0, ok=ok, seen=seen)
    raise DataError(
        f"Great Expectations could not work out the rule {rule.name!r} ({rule.wanted}): {_raised(outcome)}. "
        "Check the values of that column with `couturier ingest`."
    )


def _raised(outcome: Any) -> str:
    info = outcome.exception_info  # one record, or one a metric
    records = [record for record in (info, *info.values()) if isinstance(record, dict)]
    texts = [str(record["exception_message"]) for record in records if record.get("exception_message")]
    return texts[0] if texts else "it gave no result"
