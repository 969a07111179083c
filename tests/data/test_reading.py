"""People's own tables: what is read, what is set aside with a warning, what is refused."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from couturier.components.data.reading import (
    as_numbers,
    as_text,
    as_timestamps,
    need_columns,
    read_table,
    session_groups,
)
from couturier.components.errors import DataError

NOON = datetime(2024, 5, 1, 12, 30, tzinfo=UTC)


def stamps(values: list[object], dtype: pl.DataType | None = None) -> tuple[list[datetime | None], list[str]]:
    warnings: list[str] = []
    column = as_timestamps(pl.Series("timestamp", values, dtype=dtype), file="e.csv", warnings=warnings)
    assert column.dtype == pl.Datetime("us", "UTC") and column.name == "timestamp"
    return column.to_list(), warnings


@pytest.mark.parametrize(
    "text",
    [
        "2024-05-01T12:30:00Z",
        "2024-05-01T12:30:00.000000Z",
        "2024-05-01 12:30:00+00:00",
        " 2024-05-01T14:30:00+02:00 ",
        "2024-05-01T14:30:00+0200",
        "2024-05-01 05:00:00.000-07:30",
    ],
)
def test_text_with_a_zone_needs_no_warning(text: str) -> None:
    assert stamps([text]) == ([NOON], [])


@pytest.mark.parametrize("text", ["2024-05-01T12:30:00", "2024-05-01 12:30:00.000", "2024-05-01 12:30"])
def test_text_without_a_zone_is_utc_and_says_so(text: str) -> None:
    values, warnings = stamps([text])
    assert values == [NOON]
    assert warnings == ["e.csv, column 'timestamp': times without a time zone are taken as UTC."]


def test_days_and_mixed_forms() -> None:
    values, warnings = stamps(["2024-05-01", "2024-05-01T12:30:00Z", None])
    assert values == [datetime(2024, 5, 1, tzinfo=UTC), NOON, None]
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("factor", "unit"), [(1, "seconds"), (1e3, "milliseconds"), (1e6, "microseconds"), (1e9, "nanoseconds")]
)
@pytest.mark.parametrize("as_csv", [True, False])
def test_epoch_numbers_tell_their_unit(factor: float, unit: str, as_csv: bool) -> None:
    number = int(NOON.timestamp() * factor)
    values, warnings = stamps([str(number) if as_csv else number, None])
    assert values == [NOON, None]
    assert f"read as {unit} since 1970" in warnings[0]


def test_typed_times() -> None:
    assert stamps([NOON], pl.Datetime("ms", "UTC")) == ([NOON], [])
    berlin = pl.Series([NOON], dtype=pl.Datetime("us", "UTC")).dt.convert_time_zone("Europe/Berlin")
    assert as_timestamps(berlin, file="e", warnings=[]).to_list() == [NOON]
    naive, warnings = stamps([NOON.replace(tzinfo=None)], pl.Datetime("ns"))
    assert naive == [NOON] and "no time zone" in warnings[0]
    assert stamps([date(2024, 5, 1)])[0] == [datetime(2024, 5, 1, tzinfo=UTC)]


def test_some_unreadable_times_become_null_with_a_warning() -> None:
    values, warnings = stamps(["2024-05-01T12:30:00Z", "yesterday", "2024-13-45T00:00:00Z"])
    assert values == [NOON, None, None]
    assert warnings == [
        "e.csv, column 'timestamp': 2 of 3 values, first 'yesterday' in row 2, cannot be read; "
        "the contract sets these rows aside."
    ]


@pytest.mark.parametrize("values", [["yesterday", "today"], [["a"], ["b"]]])
def test_no_readable_time_is_an_error(values: list[object]) -> None:
    with pytest.raises(DataError, match=r"e\.csv, column 'timestamp'"):
        stamps(values)


def test_numbers() -> None:
    warnings: list[str] = []
    column = pl.Series("value", [" 1", "2.5", "many", None])
    assert as_numbers(column, file="e.csv", warnings=warnings).to_list() == [1.0, 2.5, None, None]
    assert "1 of 4 values, first 'many' in row 3" in warnings[0]
    assert as_numbers(pl.Series("v", [1, None]), file="e", warnings=[]).to_list() == [1.0, None]
    with pytest.raises(DataError, match="first 'a' in row 1, cannot be read; it must hold numbers"):
        as_numbers(pl.Series("value", ["a", "b"]), file="e.csv", warnings=[])
    with pytest.raises(DataError, match="it must hold numbers"):
        as_numbers(pl.Series("value", [[1]]), file="e.csv", warnings=[])


def test_text_keeps_ids_as_they_are_written() -> None:
    assert as_text(pl.Series("id", ["007"]), file="e").to_list() == ["007"]
    assert as_text(pl.Series("id", [7, None]), file="e").to_list() == ["7", None]
    assert as_text(pl.Series("id", ["a"], dtype=pl.Categorical), file="e").to_list() == ["a"]
    for wrong in ([1.5], [["a"]], [date(2024, 5, 1)]):
        with pytest.raises(DataError, match=r"e\.csv, column 'id': the type is .* must be text or whole numbers"):
            as_text(pl.Series("id", wrong), file="e.csv")


def test_a_misspelt_column_is_guessed() -> None:
    frame = pl.DataFrame({"userid": ["a"], "x": [1]})
    with pytest.raises(DataError, match=r"e\.csv has no column 'user_id'; it has 'userid', 'x'\. Is it 'userid'\?"):
        need_columns(frame, ("user_id",), file="e.csv")
    with pytest.raises(DataError, match=r"Add it\."):
        need_columns(frame, ("timestamp",), file="e.csv")


def test_three_formats_hold_the_same_table(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": ["007", "8"], "title": ['a "b", c', "ü"]})
    frame.write_parquet(tmp_path / "t.parquet")
    frame.write_csv(tmp_path / "t.csv")
    frame.write_ndjson(tmp_path / "t.jsonl")
    for name in ("t.parquet", "t.csv", "t.jsonl"):
        assert read_table(tmp_path / name, setting="events").equals(frame)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.xlsx", b"x", r"events='e\.xlsx' has an unknown extension; use one of \.parquet, \.csv"),
        ("e.csv", None, "does not exist or is no file"),
        ("e.csv", b"", r"e\.csv is empty"),
        ("e.csv", b"user_id,item_id\n", r"e\.csv is empty"),
        ("e.jsonl", b"", r"e\.jsonl is empty"),
        ("e.jsonl", b"{not json", "could not be read as jsonl"),
        ("e.parquet", b"PAR1 but no more", "could not be read as parquet"),
        ("e.csv", b"a,b\n1,2\n1,2,3,4\n", "could not be read as csv"),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_table(tmp_path / name, setting="events")


@given(
    minutes=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 500)), min_size=1, max_size=30),
    gap=st.integers(1, 60),
)
def test_sessions_end_where_the_gap_is_longer(minutes: list[tuple[str, int]], gap: int) -> None:
    events = pl.DataFrame(minutes, schema=["user_id", "minute"], orient="row").with_columns(
        (pl.lit(NOON) + pl.duration(minutes=pl.col("minute"))).dt.cast_time_unit("us").alias("timestamp")
    )
    grouped = session_groups(events, gap_minutes=gap)
    assert grouped.drop("group_id").equals(events)
    for user in set(events["user_id"]):
        rows = sorted(grouped.filter(user_id=user).select("minute", "group_id").rows())
        for (earlier, group), (later, next_group) in zip(rows, rows[1:], strict=False):
            assert (group == next_group) == (later - earlier <= gap)


def test_sessions_of_unknown_users_or_times_are_unknown() -> None:
    events = pl.DataFrame(
        {"user_id": ["a", None, "a"], "timestamp": [NOON, NOON, None]},
        schema={"user_id": pl.String, "timestamp": pl.Datetime("us", "UTC")},
    )
    assert session_groups(events, gap_minutes=30)["group_id"].to_list() == ["a-0", None, None]
