"""Anyone's own tables. Parquet, CSV (comma, header, UTF-8) or JSON Lines; nothing is fetched from anywhere.

``events``, one row a thing a person did:

| column | what |
|---|---|
| ``user_id``, ``item_id`` | text or whole numbers |
| ``timestamp`` | a datetime, ISO 8601 text, or epoch numbers in s, ms, µs or ns; UTC where no zone is given |
| ``kind`` | text: view, like, purchase, … |
| ``value`` | a number: money, a rating, seconds watched, 1 |
| ``quantity`` | optional number: how many |
| ``group_id`` | optional text: what happened together (a basket, a session); else made from gaps in time |

``items``, one row an item:

| column | what |
|---|---|
| ``item_id`` | as above, each once |
| ``title`` | a short name |
| ``text`` | optional words; the title where it is absent |
| ``picture`` | path of a PNG, JPEG, WebP, … in the folder of the setting ``pictures`` (that of ``items``), or |
| ``picture_bytes`` | the bytes of such a file (Parquet only) |
| any other text | an attribute, such as category or brand; columns of numbers travel along, as no attributes |

``users``, optional: ``user_id`` and any text columns. Rows with a missing or unreadable value are kept: the contract
sets them aside by its rules. What makes a table useless as a whole is a :class:`DataError` here.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

import polars as pl

from couturier.components.data.pictures import MAX_PICTURE_BYTES, decode_picture
from couturier.components.data.raw import PICTURE_SCHEMA, Config, RawTables, sampled_users
from couturier.components.data.reading import (
    as_numbers,
    as_text,
    as_timestamps,
    need_columns,
    read_table,
    session_groups,
)
from couturier.components.errors import ConfigError, DataError

_EVENT_COLUMNS = ("user_id", "item_id", "timestamp", "kind", "value")
_ITEM_COLUMNS = ("item_id", "title")
_SESSION_GAP_MINUTES = 30.0
_PICTURE_COLUMNS = ("picture", "picture_bytes")


def load(settings: Config) -> RawTables:
    """Read ``settings.events``, ``settings.items`` and, if named, ``settings.users`` into the raw form.

    Raises:
        ConfigError: a path is not set.
        DataError: a table cannot be used; the message names file, column and value, and says what to do.
    """
    for name in ("events", "items"):
        if not vars(settings)[name]:
            raise ConfigError(f"the adapter 'files' needs the setting {name}: the path of your {name} table.")
    warnings: list[str] = []
    events_path, items_path = Path(settings.events), Path(settings.items)
    events = _events(events_path, settings, warnings)
    items, sources = _items(items_path, warnings)
    root = Path(settings.pictures) if settings.pictures else items_path.parent
    pictures, read = _pictures(sources, root, settings.picture_size, file=items_path.name)
    users, users_inputs = _users(events, settings, warnings)
    events = events.filter(pl.col("user_id").is_null() | pl.col("user_id").is_in(users["user_id"].implode()))
    unread = pictures["error"].is_not_null().sum()
    if unread:
        warnings.append(f"{items_path.name}: {unread} of {pictures.height} items have no picture that can be read.")
    meta = {
        "attributes": [
            name
            for name, dtype in items.schema.items()
            if dtype == pl.String and name not in ("item_id", "title", "text")
        ],
        "attribution": settings.attribution or f"Pictures: from {items_path.name}, by their owners.",
        "warnings": warnings,
    }
    inputs = (events_path, items_path, *users_inputs, *read)
    return RawTables(events=events, items=items, pictures=pictures, users=users, meta=meta, inputs=inputs)


def _events(path: Path, settings: Config, warnings: list[str]) -> pl.DataFrame:
    """The events in time order, those of one moment by user and then as they stand in the file."""
    frame, file = read_table(path, setting="events"), path.name
    need_columns(frame, _EVENT_COLUMNS, file=file)
    columns = {
        "user_id": as_text(frame["user_id"], file=file),
        "item_id": as_text(frame["item_id"], file=file),
        "timestamp": as_timestamps(frame["timestamp"], file=file, warnings=warnings),
        "kind": as_text(frame["kind"], file=file),
        "value": as_numbers(frame["value"], file=file, warnings=warnings),
    }
    if "quantity" in frame.columns:
        columns["quantity"] = as_numbers(frame["quantity"], file=file, warnings=warnings)
    if "group_id" in frame.columns:
        columns["group_id"] = as_text(frame["group_id"], file=file)
    events = pl.DataFrame(columns)
    if (events["user_id"].drop_nulls().value_counts()["count"] < 2).all():
        raise DataError(
            f"{file}: every user_id has a single event, so there is no history to predict anything from. "
            "Check that user_id names people and not rows or sessions."
        )
    if "group_id" not in events.columns:
        events = session_groups(events, gap_minutes=settings.session_gap_minutes or _SESSION_GAP_MINUTES)
    return events.sort("timestamp", "user_id", nulls_last=True, maintain_order=True)


def _items(path: Path, warnings: list[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The items sorted by item_id, and in the same order where their pictures are: ``item_id`` and a source column."""
    frame, file = read_table(path, setting="items"), path.name
    need_columns(frame, _ITEM_COLUMNS, file=file)
    source = next((name for name in _PICTURE_COLUMNS if name in frame.columns), None)
    if source is None:
        raise DataError(
            f"{file} has neither a column 'picture' (paths) nor 'picture_bytes'; it has "
            f"{', '.join(map(repr, frame.columns))}. Couturier learns to draw, so items need pictures."
        )
    frame = frame.with_columns(as_text(frame["item_id"], file=file), as_text(frame["title"], file=file))
    twice = frame.filter(pl.col("item_id").is_not_null() & pl.col("item_id").is_duplicated())
    if not twice.is_empty():
        seen = twice["item_id"].unique().sort().head(3).to_list()
        raise DataError(f"{file}, column 'item_id': {seen} stand in more than one row. Give each item one row.")
    if "text" in frame.columns:
        frame = frame.with_columns(as_text(frame["text"], file=file))
    else:
        frame = frame.with_columns(pl.col("title").alias("text"))
        warnings.append(f"{file} has no column 'text'; the titles stand in for it.")
    others = [name for name in frame.columns if name not in ("item_id", "title", "text", *_PICTURE_COLUMNS)]
    kept = [_attribute(frame[name], file=file, is_csv=path.suffix.lower() == ".csv") for name in others]
    frame = (
        frame.sort("item_id", nulls_last=True, maintain_order=True)
        if not kept
        else frame.with_columns(kept).sort("item_id", nulls_last=True, maintain_order=True)
    )
    return frame.select("item_id", "title", "text", *others), frame.select("item_id", source)


def _attribute(column: pl.Series, *, file: str, is_csv: bool) -> pl.Series:
    """Text as it is, numbers as f64 (a CSV column of numbers as well), else an error."""
    if column.dtype.is_numeric():
        return column.cast(pl.Float64)
    if column.dtype in (pl.Date, pl.Time) or isinstance(column.dtype, pl.Datetime):
        return column.cast(pl.String)
    text = as_text(column, file=file)
    if is_csv:
        numbers = text.cast(pl.Float64, strict=False)
        if numbers.null_count() == text.null_count() < len(text):
            return numbers
    return text


def _pictures(sources: pl.DataFrame, root: Path, size: int, *, file: str) -> tuple[pl.DataFrame, list[Path]]:
    """Each item's picture, or why there is none; and the picture files that were read or looked for.

    Raises:
        DataError: a path leads out of the folder, or not one picture can be read.
    """
    source = sources.columns[1]
    column = sources[source]
    if source == "picture_bytes" and column.dtype not in (pl.Binary, pl.Null):
        raise DataError(
            f"{file}, column 'picture_bytes': the type is {column.dtype}; it must be bytes (Parquet binary)."
        )
    paths: list[Path] = []
    rows = []
    for item_id, value in zip(sources["item_id"], column, strict=True):
        data, error = None, f"the column {source} is empty"
        if isinstance(value, bytes):
            data, error = value, ""
        elif value is not None:
            paths.append(inside(root, value, file=file))
            data, error = _bytes_of(paths[-1], value)
        rgb, reason = decode_picture(data, size) if data is not None else (None, error)
        side = None if rgb is None else size
        rows.append((item_id, side, side, None if rgb is None else rgb.tobytes(), reason))
    pictures = pl.DataFrame(rows, schema=PICTURE_SCHEMA, orient="row")
    if pictures["rgb"].null_count() == pictures.height:
        raise DataError(
            f"{file}, column {source!r}: no picture could be read; the first: {pictures['error'][0]}. "
            f"Picture paths are relative to {str(root)!r}; the setting pictures names another folder."
        )
    return pictures, paths


def inside(root: Path, name: str, *, file: str) -> Path:
    """``root / name``, if that lies in ``root`` once links are followed.

    Raises:
        DataError: an absolute path, one with ``..``, a link that leads out, or a URL.

    Example:
        >>> inside(Path("/shop"), "shoes/1.png", file="items.csv").as_posix()
        '/shop/shoes/1.png'
    """
    where = f"{file}, column 'picture': {name!r}"
    if "://" in name:
        raise DataError(f"{where} is a URL. Nothing is fetched; download the pictures and give their paths.")
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.anchor or ".." in windows.parts or "\0" in name:
        raise DataError(
            f"{where} leads out of the pictures folder. Give paths inside it, without '..' or a leading '/'."
        )
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{where} is a link that leads out of the pictures folder. Copy the file into it.")
    return path


def _bytes_of(path: Path, name: str) -> tuple[bytes | None, str]:
    """The file's bytes, or why there are none."""
    if not path.is_file():
        return None, f"there is no picture {name!r}"
    if path.stat().st_size > MAX_PICTURE_BYTES:
        return None, f"the picture {name!r} is larger than {MAX_PICTURE_BYTES} bytes"
    try:
        return path.read_bytes(), ""
    except OSError as error:
        return None, f"the picture {name!r} could not be read: {error.strerror}"


def _users(events: pl.DataFrame, settings: Config, warnings: list[str]) -> tuple[pl.DataFrame, list[Path]]:
    """Everyone with an event, with what the users table says of them; sorted by user_id."""
    everyone = sampled_users(events["user_id"], settings.max_users).to_frame()
    if not settings.users:
        return everyone, []
    path = Path(settings.users)
    frame, file = read_table(path, setting="users"), path.name
    need_columns(frame, ("user_id",), file=file)
    user_ids = as_text(frame["user_id"], file=file)
    if user_ids.drop_nulls().is_duplicated().any():
        twice = user_ids.filter(user_ids.is_duplicated()).drop_nulls().sort().first()
        raise DataError(f"{file}, column 'user_id': {twice!r} stands in more than one row. Give each user one row.")
    others = [column for column in frame.iter_columns() if column.name != "user_id"]
    known = pl.DataFrame([user_ids, *(column.cast(pl.String, strict=False) for column in others)])
    unknown = everyone.join(known, on="user_id", how="anti").height
    if unknown:
        warnings.append(f"{file} does not know {unknown} of {everyone.height} users; their columns are empty.")
    return everyone.join(known, on="user_id", how="left").sort("user_id"), [path]
