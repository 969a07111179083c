"""Ingestion: the same bytes everywhere, nothing read twice, nothing foreign in ``data/``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from couturier.components.data import ingest as module
from couturier.components.data.formats import EVENT_COLUMNS
from couturier.components.data.ingest import FILES, Config, RawTables, ingest
from couturier.components.data.raw import no_pictures, sampled_users
from couturier.components.errors import ConfigError, DataError
from couturier.components.lineage.workspace import Workspace
from couturier.serving.feedback import FeedbackLog


@pytest.fixture
def tables(tmp_path: Path) -> Config:
    """Two users, two items, one picture that is there and one that is not."""
    folder = tmp_path / "mine"
    folder.mkdir()
    events = [
        {"user_id": user, "item_id": item, "timestamp": f"2024-01-0{day}T10:00:00Z", "kind": "view", "value": 1.0}
        for user in ("ann", "ben")
        for day, item in ((1, "a"), (2, "b"), (3, "a"))
    ]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    (folder / "items.csv").write_text("item_id,title,text,colour,picture\na,A,first,red,a.ppm\nb,B,second,blue,b.bmp\n")
    from PIL import Image

    Image.new("RGB", (4, 4), "red").save(folder / "b.bmp")
    return Config(adapter="files", events=str(folder / "events.jsonl"), items=str(folder / "items.csv"), picture_size=8)


def workspace(folder: Path) -> Workspace:
    return Workspace(project=folder, root=folder / ".couturier")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_five_files_whose_bytes_depend_on_nothing_else(tmp_path: Path, tables: Config) -> None:
    first, second = workspace(tmp_path / "one"), workspace(tmp_path / "two")
    facts, again = ingest("files", tables, first), ingest("files", tables, second)
    assert sorted(contents(first.data)) == sorted(FILES)
    assert contents(first.data) == contents(second.data)
    assert facts == again and not facts["reused"]
    assert facts["rows"] == {"events": 6, "items": 2, "pictures": 2, "users": 2}
    assert facts["md5"] == {
        path.name: hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() for path in first.data.iterdir()
    }
    assert facts["bytes"] == sum(path.stat().st_size for path in first.data.iterdir())
    meta = (first.data / "meta.json").read_text()
    assert str(tmp_path) not in meta  # a folder of one machine would change the bytes on the next
    assert json.loads(meta)["rows"] == facts["rows"]
    assert json.loads(meta)["attributes"] == ["colour"]
    events = pl.read_parquet(first.data / "events.parquet")
    assert {name: events.schema[name] for name in EVENT_COLUMNS} == EVENT_COLUMNS


def test_the_demo_data_have_the_same_bytes_on_one_thread_and_on_many(tmp_path: Path) -> None:
    code = (
        "import json, pathlib, sys\n"
        "from couturier.components.data.ingest import Config, ingest\n"
        "from couturier.components.lineage.workspace import Workspace\n"
        "p = pathlib.Path(sys.argv[1])\n"
        "print(json.dumps(ingest('complete-journey', Config(), Workspace(project=p, root=p / 'ws'))['md5']))\n"
    )
    alone = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "alone")],
        env=os.environ | {"POLARS_MAX_THREADS": "1", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(alone.stdout) == ingest("complete-journey", Config(), workspace(tmp_path / "here"))["md5"]


def test_nothing_is_read_twice(tmp_path: Path, tables: Config) -> None:
    place = workspace(tmp_path / "p")
    assert not ingest("files", tables, place)["reused"]
    before = {path.name: path.stat().st_mtime_ns for path in place.data.iterdir()}
    again = ingest("files", tables, place)
    assert again["reused"] and again["rows"]["events"] == 6
    assert {path.name: path.stat().st_mtime_ns for path in place.data.iterdir()} == before


@pytest.mark.parametrize("what", ["setting", "input", "new picture", "bytes", "file gone", "adapter"])
def test_whatever_changes_is_read_again(
    tmp_path: Path, tables: Config, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = workspace(tmp_path / "p")
    ingest("files", tables, place)
    if what == "setting":
        tables = Config(**(vars(tables) | {"picture_size": 16}))
    elif what == "input":
        lines = Path(tables.events).read_text().splitlines()
        Path(tables.events).write_text("\n".join(lines[:3]))
    elif what == "new picture":
        (Path(tables.items).parent / "a.ppm").write_bytes((Path(tables.items).parent / "b.bmp").read_bytes())
    elif what == "bytes":
        (place.data / "users.parquet").write_bytes(b"spoilt")
    elif what == "file gone":
        (place.data / "users.parquet").unlink()
    else:
        monkeypatch.setattr(module, "source_digests", lambda name: ((name, "edited"),))
    facts = ingest("files", tables, place)
    assert not facts["reused"]
    if what == "input":
        assert facts["rows"]["events"] == 3
    if what == "new picture":
        assert pl.read_parquet(place.data / "pictures.parquet")["error"].null_count() == 2
    if what in ("bytes", "file gone"):
        assert pl.read_parquet(place.data / "users.parquet").height == 2
    assert ingest("files", tables, place)["reused"]


def test_a_failed_ingestion_leaves_no_claim(tmp_path: Path, tables: Config) -> None:
    place = workspace(tmp_path / "p")
    ingest("files", tables, place)
    broken = Config(**(vars(tables) | {"events": str(tmp_path / "none.csv")}))
    with pytest.raises(DataError):
        ingest("files", broken, place)
    assert not (place.root / "ingest.json").exists()
    assert not ingest("files", tables, place)["reused"]


def test_tables_cut_short_carry_no_meta(tmp_path: Path, tables: Config) -> None:
    place = workspace(tmp_path / "p")
    ingest("files", tables, place)
    (place.data / "users.parquet").unlink()
    (place.data / "users.parquet").mkdir()  # nothing can be renamed onto it: the disk fails between two files
    with pytest.raises(OSError):
        ingest("files", Config(**(vars(tables) | {"picture_size": 16})), place)
    assert not (place.data / "meta.json").exists()
    (place.data / "users.parquet").rmdir()
    assert not ingest("files", tables, place)["reused"]
    assert (place.data / "meta.json").exists()


def test_foreign_files_are_refused_and_leftovers_of_a_kill_removed(tmp_path: Path, tables: Config) -> None:
    place = workspace(tmp_path / "p")
    ingest("files", tables, place)
    left = place.data / ".events.parquet.abc123.parquet"
    left.write_bytes(b"half")
    assert not ingest("files", tables, place)["reused"]
    assert not left.exists()
    (place.data / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt was not written by couturier"):
        ingest("files", tables, place)
    assert (place.data / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"picture_size": 4}, "picture_size=4 is out of range"),
        ({"max_users": -1}, "max_users=-1 is negative"),
        ({"session_gap_minutes": -1.0}, "session_gap_minutes=-1.0"),
        ({"session_gap_minutes": float("nan")}, "session_gap_minutes=nan"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, tables: Config, changed: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ingest("files", Config(**(vars(tables) | changed)), workspace(tmp_path))


def test_an_unknown_adapter_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="complete-journey, files, movielens"):
        ingest("netflix", Config(), workspace(tmp_path))


def test_an_adapter_is_held_to_the_raw_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(settings: Config) -> RawTables:
        events = pl.DataFrame(
            {"user_id": ["a"], "item_id": ["x"], "timestamp": ["today"], "kind": ["v"], "value": [1.0]}
        )
        items = pl.DataFrame({"item_id": ["x"], "title": ["X"], "text": ["x"]})
        pictures = no_pictures(["x"], ["none"])
        return RawTables(
            events=events, items=items, pictures=pictures, users=events.select("user_id"), meta={"attributes": []}
        )

    monkeypatch.setitem(module.ADAPTERS, "mine", load)
    with pytest.raises(
        DataError, match=r"events.parquet the column 'timestamp' as String; the raw form wants Datetime"
    ):
        ingest("mine", Config(), workspace(tmp_path))


def test_sampled_users_are_a_fixed_share() -> None:
    users = pl.Series("user_id", [str(n) for n in range(1000)])
    few, more = sampled_users(users, 10), sampled_users(users, 20)
    assert len(few) == 10 and set(few) < set(more)
    assert few.equals(sampled_users(users.reverse(), 10))
    assert sampled_users(users, 0).len() == 1000


def test_what_the_service_collected_joins_the_log(tmp_path: Path, tables: Config) -> None:
    place, folder = workspace(tmp_path / "one"), tmp_path / "feedback"
    log = FeedbackLog(folder)
    log.append({"user_id": "ann", "item_id": "b", "kind": "like", "value": 1.0, "model": "couturier:x"})
    log.append({"user_id": "zoe", "item_id": "a", "kind": "dislike", "value": 1.0, "model": "couturier:x"})
    (day,) = folder.iterdir()
    day.write_text(day.read_text() * 2 + '{"user_id": "ann", "item_id"')  # sent twice, and a line cut short
    facts = ingest("files", dataclasses.replace(tables, feedback=str(folder)), place)
    assert facts["rows"]["events"] == 6 + 2 and facts["rows"]["users"] == 3
    assert facts["warnings"] and f"{day.name}:5" in facts["warnings"][-1]
    events = pl.read_parquet(place.data / "events.parquet")
    assert events["kind"].to_list()[-2:] == ["like", "dislike"] and events["timestamp"].is_sorted()
    assert events["group_id"][-2] == "feedback-ann-0"
    assert "zoe" in pl.read_parquet(place.data / "users.parquet")["user_id"].to_list()
    assert ingest("files", dataclasses.replace(tables, feedback=str(folder)), place)["reused"]
    log.append({"user_id": "ben", "item_id": "b", "kind": "view", "value": 1.0, "model": "couturier:x"})
    assert not ingest("files", dataclasses.replace(tables, feedback=str(folder)), place)["reused"]


def test_feedback_that_is_nowhere_is_said(tmp_path: Path, tables: Config) -> None:
    with pytest.raises(DataError, match="no folder"):
        ingest("files", dataclasses.replace(tables, feedback=str(tmp_path / "none")), workspace(tmp_path / "one"))
