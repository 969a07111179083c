"""Anyone's own tables: three formats, pictures from files or bytes, and an answer to each way they can be wrong."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image

from couturier.components.data.adapter_files import inside, load
from couturier.components.data.raw import Config
from couturier.components.errors import ConfigError, DataError

EVENTS: dict[str, list[Any]] = {
    "user_id": ["u1", "u1", "u1", "u2", "u2"],
    "item_id": ["b", "a", "a", "a", "b"],
    "timestamp": [
        "2024-01-02T08:00:00Z",
        "2024-01-01T08:00:00Z",
        "2024-01-01T08:10:00Z",
        "2024-01-01T08:00:00Z",
        "2024-01-05T08:00:00Z",
    ],
    "kind": ["view", "buy", "view", "view", "like"],
    "value": [1.0, 9.5, 1.0, 1.0, 2.0],
}
ITEMS: dict[str, list[Any]] = {
    "item_id": ["b", "a"],
    "title": ["Blue thing", "Red thing"],
    "text": ["a blue thing", "a red thing"],
    "colour": ["blue", "red"],
    "weight": [2.0, 1.0],
    "picture": ["b.png", "art/a.png"],
}


def png(colour: str, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "art").mkdir()
    (tmp_path / "art" / "a.png").write_bytes(png("red"))
    (tmp_path / "b.png").write_bytes(png("blue"))
    return tmp_path


def settings(
    folder: Path,
    events: dict[str, Any] | None = None,
    items: dict[str, Any] | None = None,
    form: str = "csv",
    **more: Any,
) -> Config:
    """Write both tables and return the settings that read them."""
    for name, table in (("events", events or EVENTS), ("items", items or ITEMS)):
        frame, path = pl.DataFrame(table), folder / f"{name}.{form}"
        if form == "csv":
            frame.write_csv(path)
        elif form == "jsonl":
            frame.write_ndjson(path)
        else:
            frame.write_parquet(path)
    paths = {"events": str(folder / f"events.{form}"), "items": str(folder / f"items.{form}")}
    return Config(**{"adapter": "files", "picture_size": 8, **paths, **more})


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_each_format_gives_the_same_tables(folder: Path, form: str) -> None:
    raw = load(settings(folder, form=form))
    assert raw.events["user_id"].to_list() == ["u1", "u2", "u1", "u1", "u2"]  # in time order
    assert raw.events["group_id"].to_list() == ["u1-0", "u2-0", "u1-0", "u1-1", "u2-1"]
    assert raw.events["value"].to_list() == [9.5, 1.0, 1.0, 1.0, 2.0]
    assert raw.items["item_id"].to_list() == ["a", "b"]
    assert raw.items["weight"].to_list() == [1.0, 2.0]
    assert raw.meta["attributes"] == ["colour"]  # weight is a number, no attribute
    assert raw.users["user_id"].to_list() == ["u1", "u2"]
    assert [bytes(rgb[:3]) for rgb in raw.pictures["rgb"]] == [b"\xff\0\0", b"\0\0\xff"]
    assert raw.pictures.select("height", "width").rows() == [(8, 8), (8, 8)]
    assert raw.meta["warnings"] == []
    assert {path.name for path in raw.inputs} == {f"events.{form}", f"items.{form}", "a.png", "b.png"}


def test_pictures_as_bytes(folder: Path) -> None:
    items = {k: v for k, v in ITEMS.items() if k != "picture"} | {"picture_bytes": [png("blue"), b"no picture"]}
    raw = load(settings(folder, items=items, form="parquet"))
    assert raw.pictures["item_id"].to_list() == ["a", "b"]
    assert raw.pictures["rgb"].is_null().to_list() == [True, False]
    assert "no picture of a known format" in raw.pictures["error"][0]
    assert "1 of 2 items have no picture" in raw.meta["warnings"][0]


def test_given_groups_quantities_and_whole_number_ids(folder: Path) -> None:
    events = EVENTS | {"user_id": [1, 1, 1, 2, 2], "group_id": [5, 4, 4, 6, 7], "quantity": [1, 2, 3, 4, -1]}
    raw = load(settings(folder, events=events, form="parquet"))
    assert raw.events["user_id"].to_list() == ["1", "2", "1", "1", "2"]
    assert raw.events["group_id"].to_list() == ["4", "6", "4", "5", "7"]
    assert raw.events["quantity"].to_list() == [2.0, 4.0, 3.0, 1.0, -1.0]


def test_the_session_gap_is_a_setting(folder: Path) -> None:
    raw = load(settings(folder, session_gap_minutes=5.0))
    assert raw.events.filter(user_id="u1")["group_id"].to_list() == ["u1-0", "u1-1", "u1-2"]


def test_text_may_be_left_out(folder: Path) -> None:
    raw = load(settings(folder, items={k: v for k, v in ITEMS.items() if k != "text"}))
    assert raw.items["text"].to_list() == raw.items["title"].to_list()
    assert "no column 'text'" in raw.meta["warnings"][0]


def test_users_of_their_own_table(folder: Path) -> None:
    pl.DataFrame({"user_id": ["u2", "u3"], "age": ["20-30", "30-40"], "children": [1, 2]}).write_parquet(
        folder / "users.parquet"
    )
    raw = load(settings(folder, users=str(folder / "users.parquet")))
    assert raw.users.rows() == [("u1", None, None), ("u2", "20-30", "1")]
    assert "does not know 1 of 2 users" in raw.meta["warnings"][0]
    pl.DataFrame({"user_id": ["u2", "u2"]}).write_parquet(folder / "users.parquet")
    with pytest.raises(DataError, match=r"users\.parquet, column 'user_id': 'u2' stands in more than one row"):
        load(settings(folder, users=str(folder / "users.parquet")))


def test_fewer_users(folder: Path) -> None:
    raw = load(settings(folder, max_users=1))
    assert raw.users.height == 1
    assert set(raw.events["user_id"]) == set(raw.users["user_id"])


def test_the_credit_line_is_the_owners(folder: Path) -> None:
    assert load(settings(folder, attribution="Photos: Ann, CC0")).meta["attribution"] == "Photos: Ann, CC0"
    assert "items.csv" in load(settings(folder)).meta["attribution"]


def test_dirty_rows_go_through_to_the_contract(folder: Path) -> None:
    events = EVENTS | {
        "user_id": ["u1", "u1", "u1", "u2", None],
        "item_id": ["b", "a", "nowhere", "a", "b"],
        "timestamp": [*EVENTS["timestamp"][:4], "soon"],
        "value": ["1", "-3", "x", "1", "2"],
    }
    items = ITEMS | {"title": [None, "Red thing"], "picture": ["missing.png", "art/a.png"]}
    raw = load(settings(folder, events=events, items=items))
    assert raw.events.height == 5 and raw.items.height == 2
    assert raw.events["timestamp"].null_count() == 1 and raw.events["value"].null_count() == 1
    assert raw.pictures.filter(item_id="b")["error"].item() == "there is no picture 'missing.png'"
    assert [words in " ".join(raw.meta["warnings"]) for words in ("'soon'", "'x'", "1 of 2 items")] == [True] * 3


@pytest.mark.parametrize(
    ("events", "items", "words"),
    [
        ({"timestamp": None}, {}, r"events\.csv has no column 'timestamp'"),
        ({"timestamp": ["never"] * 5}, {}, r"column 'timestamp': 5 of 5 values, first 'never' in row 1"),
        ({"value": ["lots"] * 5}, {}, r"column 'value': .* 'lots' in row 1, cannot be read; it must hold numbers"),
        ({"user_id": list("abcde")}, {}, "every user_id has a single event"),
        ({}, {"title": None}, r"items\.csv has no column 'title'"),
        ({}, {"picture": None}, "neither a column 'picture'"),
        ({}, {"item_id": ["a", "a"]}, r"column 'item_id': \['a'\] stand in more than one row"),
        ({}, {"picture": ["x.png", "y.png"]}, "no picture could be read; the first: there is no picture 'y.png'"),
        ({}, {"picture": ["../b.png", "art/a.png"]}, r"'\.\./b\.png' leads out of the pictures folder"),
        ({}, {"picture": ["/etc/passwd", "art/a.png"]}, "'/etc/passwd' leads out"),
        ({}, {"picture": [r"C:\b.png", "art/a.png"]}, "leads out"),
        ({}, {"picture": ["https://example.org/b.png", "art/a.png"]}, "is a URL. Nothing is fetched"),
    ],
)
def test_what_makes_a_table_useless(folder: Path, events: dict[str, Any], items: dict[str, Any], words: str) -> None:
    changed_events = {k: v for k, v in (EVENTS | events).items() if v is not None}
    changed_items = {k: v for k, v in (ITEMS | items).items() if v is not None}
    with pytest.raises(DataError, match=words):
        load(settings(folder, events=changed_events, items=changed_items))


def test_columns_of_a_wrong_type(folder: Path) -> None:
    with pytest.raises(DataError, match=r"column 'user_id': the type is Float64, first value 1\.5"):
        load(settings(folder, events=EVENTS | {"user_id": [1.5] * 5}, form="parquet"))
    with pytest.raises(DataError, match="column 'tags': the type is List"):
        load(settings(folder, items=ITEMS | {"tags": [["x"], ["y"]]}, form="parquet"))
    with pytest.raises(DataError, match="column 'picture_bytes': the type is String"):
        items = {k: v for k, v in ITEMS.items() if k != "picture"} | {"picture_bytes": ["x", "y"]}
        load(settings(folder, items=items, form="parquet"))


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    secret.write_bytes(png("black"))
    (folder / "b.png").unlink()
    os.symlink(secret, folder / "b.png")
    with pytest.raises(DataError, match="'b.png' is a link that leads out"):
        load(settings(folder))


def test_a_link_inside_the_folder_is_followed(folder: Path) -> None:
    os.symlink(folder / "b.png", folder / "c.png")
    assert inside(folder, "c.png", file="items.csv").read_bytes() == png("blue")


def test_pictures_may_lie_in_another_folder(folder: Path) -> None:
    items = ITEMS | {"picture": ["a.png", "a.png"]}
    raw = load(settings(folder, items=items, pictures=str(folder / "art")))
    assert raw.pictures["error"].null_count() == 2


def test_a_picture_file_that_is_a_folder_or_cannot_be_read(folder: Path) -> None:
    (folder / "c.png").mkdir()
    raw = load(settings(folder, items=ITEMS | {"picture": ["c.png", "art/a.png"]}))
    assert raw.pictures["error"].to_list() == [None, "there is no picture 'c.png'"]


def test_the_paths_must_be_set() -> None:
    with pytest.raises(ConfigError, match="needs the setting events"):
        load(Config(adapter="files"))
    with pytest.raises(ConfigError, match="needs the setting items"):
        load(Config(adapter="files", events="e.csv"))
