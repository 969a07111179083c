"""Reading people's own tables: one reader for three formats, and columns made what the raw form wants.

A value that cannot be read becomes null and is counted in a warning, so that the contract can set its row aside; where
no value of a column can be read, the column is something else than it should be, and that is an error.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import polars as pl

from couturier.components.errors import DataError

EXTENSIONS = (".parquet", ".csv", ".jsonl", ".ndjson")
# Epoch numbers tell their unit by their size: each bound is the year 5138 in one unit and 1973 in the next.
_EPOCHS = ((1e11, "seconds", 1_000_000.0), (1e14, "milliseconds", 1_000.0), (1e17, "microseconds", 1.0))
_NAIVE = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d")


def read_table(path: Path, *, setting: str) -> pl.DataFrame:
    """Read a Parquet, CSV (comma, header, UTF-8) or JSON Lines file. CSV columns come as text.

    Raises:
        DataError: the file is missing, of another kind, unreadable or empty; ``setting`` is named in the message.
    """
    if path.suffix.lower() not in EXTENSIONS:
        raise DataError(f"{setting}={path.name!r} has an unknown extension; use one of {', '.join(EXTENSIONS)}.")
    if not path.is_file():
        raise DataError(f"{setting}={str(path)!r} does not exist or is no file. Give the path of an existing table.")
    if not path.stat().st_size:
        raise DataError(f"{path.name} is empty; the setting {setting} needs a table with at least one row.")
    try:
        if path.suffix.lower() == ".parquet":
            frame = pl.read_parquet(path)
        elif path.suffix.lower() == ".csv":
            frame = pl.read_csv(path, infer_schema=False)
        else:
            frame = pl.read_ndjson(path, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path.name} could not be read as {path.suffix[1:].lower()}: {reason}.") from error
    if frame.is_empty():
        raise DataError(f"{path.name} is empty; the setting {setting} needs a table with at least one row.")
    return frame


def need_columns(frame: pl.DataFrame, columns: tuple[str, ...], *, file: str) -> None:
    """Raise :class:`DataError` on the first missing column, with the nearest name that is there."""
    for column in columns:
        if column not in frame.columns:
            close = difflib.get_close_matches(column, frame.columns, n=1)
            hint = f" Is it {close[0]!r}? Rename it." if close else " Add it."
            raise DataError(f"{file} has no column {column!r}; it has {', '.join(map(repr, frame.columns))}.{hint}")


def as_text(column: pl.Series, *, file: str) -> pl.Series:
    """Ids, kinds and words as text; whole numbers become their digits.

    Raises:
        DataError: the column holds something else (floats, dates, lists).
    """
    if column.dtype == pl.String:
        return column
    if column.dtype.is_integer() or column.dtype in (pl.Categorical, pl.Enum, pl.Boolean, pl.Null):
        return column.cast(pl.String)
    raise DataError(
        f"{file}, column {column.name!r}: the type is {column.dtype}, first value {_first(column)!r}; it must be text "
        "or whole numbers. Convert the column before ingesting."
    )


def as_numbers(column: pl.Series, *, file: str, warnings: list[str]) -> pl.Series:
    """A column as f64, what cannot be read as null.

    Raises:
        DataError: no value can be read as a number.
    """
    if column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null):
        return column.cast(pl.Float64)
    if column.dtype != pl.String:
        raise DataError(f"{file}, column {column.name!r}: the type is {column.dtype}; it must hold numbers.")
    numbers = column.str.strip_chars().cast(pl.Float64, strict=False)
    _count_unread(column, numbers, file=file, wanted="numbers such as 1 or 2.50", warnings=warnings)
    return numbers


def as_timestamps(column: pl.Series, *, file: str, warnings: list[str]) -> pl.Series:
    """A column as datetime[us, UTC]: datetimes, dates, ISO 8601 text, or epoch numbers in s, ms, us or ns.

    Times without a zone are taken as UTC, which a warning says; so does one for the unit of epoch numbers.

    Raises:
        DataError: no value can be read as a time.
    """
    utc = pl.Datetime("us", "UTC")
    if isinstance(column.dtype, pl.Datetime) and column.dtype.time_zone is not None:
        return column.dt.convert_time_zone("UTC").cast(utc)
    if isinstance(column.dtype, pl.Datetime) or column.dtype == pl.Date:
        warnings.append(f"{file}, column {column.name!r}: the times have no time zone; they are taken as UTC.")
        return column.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if column.dtype.is_numeric():
        return _from_epoch(column.cast(pl.Float64), file=file, warnings=warnings)
    if column.dtype != pl.String:
        raise DataError(f"{file}, column {column.name!r}: the type is {column.dtype}; it must hold points in time.")
    numbers = column.str.strip_chars().cast(pl.Float64, strict=False)
    if numbers.null_count() == column.null_count() and numbers.null_count() < len(numbers):
        return _from_epoch(numbers, file=file, warnings=warnings)
    return _from_text(column, file=file, warnings=warnings)


def _from_epoch(numbers: pl.Series, *, file: str, warnings: list[str]) -> pl.Series:
    magnitude = numbers.abs().median()
    size = float(magnitude) if isinstance(magnitude, (int, float)) else 0.0
    unit, factor = next(((name, by) for bound, name, by in _EPOCHS if size < bound), ("nanoseconds", 0.001))
    warnings.append(f"{file}, column {numbers.name!r}: numbers, read as {unit} since 1970-01-01 UTC.")
    return (numbers * factor).round().cast(pl.Int64, strict=False).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


def _from_text(column: pl.Series, *, file: str, warnings: list[str]) -> pl.Series:
    name = column.name
    tidy = pl.col(name).str.strip_chars().str.replace(r"^(\d{4}-\d\d-\d\d)\s+", "${1}T")
    zoned = tidy.str.replace(r"([+-]\d\d):?(\d\d)$", "${1}:${2}").str.to_datetime(
        "%+", time_unit="us", time_zone="UTC", strict=False
    )
    naive = [
        tidy.str.to_datetime(form, time_unit="us", strict=False).dt.replace_time_zone("UTC") for form in _NAIVE[:2]
    ]
    days = tidy.str.to_date(_NAIVE[2], strict=False).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    read = column.to_frame().select(
        zoned.alias("zoned"), pl.coalesce(*naive, days).alias("naive"), pl.coalesce(zoned, *naive, days).alias(name)
    )
    if read.select((pl.col("zoned").is_null() & pl.col("naive").is_not_null()).any()).item():
        warnings.append(f"{file}, column {name!r}: times without a time zone are taken as UTC.")
    _count_unread(
        column, read[name], file=file, wanted="times such as 2024-05-01T12:30:00Z or epoch seconds", warnings=warnings
    )
    return read[name]


def _count_unread(before: pl.Series, after: pl.Series, *, file: str, wanted: str, warnings: list[str]) -> None:
    unread = before.is_not_null() & after.is_null()
    count = int(unread.sum())
    if not count:
        return
    row = int(unread.arg_max() or 0)
    seen = f"{file}, column {before.name!r}: {count} of {len(before)} values, first {before[row]!r} in row {row + 1},"
    if count == len(before) - before.null_count():
        raise DataError(f"{seen} cannot be read; it must hold {wanted}.")
    warnings.append(f"{seen} cannot be read; the contract sets these rows aside.")


def _first(column: pl.Series) -> object:
    known = column.drop_nulls().to_list()
    return known[0] if known else None


def session_groups(events: pl.DataFrame, *, gap_minutes: float) -> pl.DataFrame:
    """Add ``group_id``: events of one user belong together while the next follows within ``gap_minutes``.

    The group is ``<user_id>-<number of the session>``, counted from 0; null where the user or the time is null.
    Rows keep their order.
    """
    fresh = pl.col("timestamp").diff() > pl.duration(microseconds=round(gap_minutes * 60e6))
    session = fresh.fill_null(False).cum_sum().over("user_id", order_by="timestamp")
    known = pl.col("user_id").is_not_null() & pl.col("timestamp").is_not_null()
    return events.with_columns(
        pl.when(known).then(pl.concat_str(pl.col("user_id"), session.cast(pl.String), separator="-")).alias("group_id")
    )
