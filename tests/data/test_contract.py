"""The contract on small tables with planted dirt: each rule catches its own, nothing is lost, docs open offline."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from couturier.components.data import contract
from couturier.components.data.contract import Config, contract_summary, explain_quarantine
from couturier.components.data.quarantine import QUARANTINE
from couturier.components.errors import ConfigError, ContractError, DataError

from .contract_tables import (
    LATE,
    LENIENT,
    TABLES,
    Tables,
    assert_split,
    change,
    clean,
    context,
    quarantined,
    run,
)


def test_clean_tables_pass_untouched_and_sorted(tmp_path: Path) -> None:
    tables = clean()
    ctx = run(tmp_path, tables)
    assert quarantined(ctx) == {}
    assert ctx.facts["warnings"] == []
    assert ctx.facts["users_with_history"] == 25
    assert_split(ctx, tables)
    kept = pl.read_parquet(ctx.out / "events.parquet")
    assert kept.schema == tables["events"].schema
    assert kept.equals(tables["events"].sort("user_id", "timestamp", "group_id", "item_id"))
    meta = json.loads((ctx.out / "meta.json").read_text())
    assert meta["rows"] == {table: tables[table].height for table in TABLES}
    assert meta["attributes"] == ["category"]


# Row k of a table gets its k-th defect; item 40 + k is the partner of a duplicate.
PLANTED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "events": [
        ("user_id_not_null", {"user_id": None}),
        ("user_id_not_blank", {"user_id": ""}),
        ("item_id_not_null", {"item_id": None}),
        ("item_exists", {"item_id": "nowhere"}),
        ("timestamp_not_null", {"timestamp": None}),
        ("timestamp_range", {"timestamp": LATE}),
        ("kind_not_null", {"kind": None}),
        ("kind_not_blank", {"kind": ""}),
        ("value_not_null", {"value": None}),
        ("value_range", {"value": 0.0}),
        ("value_range", {"value": 1e6}),
        ("quantity_range", {"quantity": 0.0}),
        ("quantity_range", {"quantity": 89638.0}),
    ],
    "items": [
        ("item_id_not_null", {"item_id": None}),
        ("item_id_unique", {"item_id": "i40"}),
        ("title_not_null", {"title": None}),
        ("title_not_blank", {"title": ""}),
        ("text_not_null", {"text": None}),
        ("category_not_null", {"category": None}),
        ("category_domain", {"category": "COUPON/MISC ITEMS"}),
        ("price_range", {"price": 0.0}),
    ],
    "pictures": [
        ("item_id_not_null", {"item_id": None}),
        ("item_id_unique", {"item_id": "i40"}),
        ("item_exists", {"item_id": "nowhere"}),
        ("decoded", {"error": "truncated file"}),
        ("rgb_not_null", {"rgb": None}),
        ("rgb_bytes_size", {"rgb": b"123"}),
        ("height_size", {"height": 64}),
        ("width_size", {"width": 64}),
    ],
    "users": [
        ("user_id_not_null", {"user_id": None}),
        ("user_id_not_blank", {"user_id": ""}),
        ("user_id_unique", {"user_id": "u40"}),
    ],
}


@pytest.mark.parametrize("table", TABLES)
def test_every_planted_defect_is_caught_and_named_by_its_own_rule(tmp_path: Path, table: str) -> None:
    tables = clean(users=50, items=50)
    for row, (_, values) in enumerate(PLANTED[table]):
        tables = change(tables, table, row, **values)
    ctx = run(tmp_path, tables, LENIENT)
    assert_split(ctx, tables)
    found = quarantined(ctx)
    for row, (what, _) in enumerate(PLANTED[table]):
        rule = f"{table}.{what}"
        assert found[(table, row)] == [rule], rule
        assert any(warning.startswith(f"{rule}:") for warning in ctx.facts["warnings"]), rule
    counts = {f"{table}.{what}": 0 for what, _ in PLANTED[table]}
    for rules in (rules for (name, _), rules in found.items() if name == table):
        for rule in rules:
            counts[rule] = counts.get(rule, 0) + 1
    assert ctx.facts[table]["failed"] == counts


def test_blank_ids_of_items_and_pictures_are_caught(tmp_path: Path) -> None:
    ctx = run(tmp_path, change(change(clean(), "items", 3, item_id=""), "pictures", 4, item_id=""), LENIENT)
    found = quarantined(ctx)
    assert "items.item_id_not_blank" in found[("items", 3)]
    assert found[("items", 4)] == ["items.has_picture"]
    assert "pictures.item_id_not_blank" in found[("pictures", 4)]


def test_a_row_that_breaks_several_rules_is_set_aside_once_with_all_of_them(tmp_path: Path) -> None:
    tables = change(clean(), "events", 5, value=-1.0, quantity=0.0, kind=None)
    ctx = run(tmp_path, tables, LENIENT)
    assert quarantined(ctx) == {("events", 5): ["events.kind_not_null", "events.value_range", "events.quantity_range"]}
    row = pl.read_parquet(ctx.out / QUARANTINE).row(0, named=True)
    assert row["reason"] == (
        "kind is null; value is out of range (above 0 and at most 1000); "
        "quantity is out of range (above 0 and at most 100)"
    )
    assert row["expectations"][0] == "expect_column_values_to_not_be_null"
    assert json.loads(row["json"])["quantity"] == 0.0
    assert json.loads(row["json"])["user_id"] == tables["events"]["user_id"][5]


def test_events_of_a_quarantined_item_follow_it_and_say_why(tmp_path: Path) -> None:
    tables = change(clean(), "items", 3, category="FUEL")
    ctx = run(tmp_path, tables, LENIENT)
    of_item = tables["events"].with_row_index().filter(pl.col("item_id") == "i3")["index"].to_list()
    found = quarantined(ctx)
    assert [row for (table, row) in found if table == "events"] == of_item
    assert all(found[("events", row)] == ["events.item_kept"] for row in of_item)
    assert found[("pictures", 3)] == ["pictures.item_kept"]
    explained = explain_quarantine(ctx.out).filter(pl.col("table") == "events").to_dicts()
    assert len(explained) == 1
    assert explained[0]["rows"] == len(of_item)
    assert explained[0]["reason"] == (
        "its item is in quarantine (category is not one of the values that the adapter test allows)"
    )


def test_the_reason_a_picture_failed_reaches_its_events(tmp_path: Path) -> None:
    ctx = run(tmp_path, change(clean(), "pictures", 3, rgb=None, error="not an image"), LENIENT)
    reasons = explain_quarantine(ctx.out)
    of_events = reasons.filter(pl.col("table") == "events")["reason"].to_list()
    assert of_events == ["its item is in quarantine (the item has no usable picture (not an image))"]
    of_pictures = reasons.filter(pl.col("table") == "pictures")["reason"].to_list()
    assert of_pictures == ["the picture could not be made; the picture has no bytes"]


def test_thresholds_warn_first_and_then_stop(tmp_path: Path) -> None:
    tables = change(clean(), "events", 5, quantity=0.0)  # one of 200 events: 0.5 %
    quiet = run(tmp_path / "quiet", tables, Config(warn_share=0.005))
    assert quiet.facts["warnings"] == []
    warned = run(tmp_path / "warned", tables, Config(warn_share=0.0049))
    assert [warning.partition(":")[0] for warning in warned.facts["warnings"]] == ["events.quantity_range"]
    run(tmp_path / "edge", tables, Config(stop_share_events=0.005))
    ctx = context(tmp_path / "stopped", tables, Config(stop_share_events=0.0049))
    with pytest.raises(ContractError) as caught:
        contract.run(ctx)
    said = str(caught.value)
    for part in (
        "'events.quantity_range'",
        "1 of 200 rows (0.5 %)",
        "0.49 % may fail",
        "row 5",
        "quantity=0.0",
        "user_id=u02",
    ):
        assert part in said
    assert "contract.quantity_max" in said
    assert "contract.stop_share_events" in said
    assert not any(ctx.out.iterdir())
    refused = ctx.scratch / "refused"
    assert str(refused) in said
    assert pl.read_parquet(refused / QUARANTINE).height == 1
    assert "events.quantity_range" in (refused / "docs" / "index.html").read_text()


def test_many_small_failures_together_stop_too(tmp_path: Path) -> None:
    tables = clean()
    defects: list[dict[str, Any]] = [{"value": 0.0}, {"quantity": 0.0}, {"kind": None}]
    for row, values in enumerate(defects):
        tables = change(tables, "events", row, **values)
    with pytest.raises(ContractError, match=r"events\.share_set_aside.*0\.015 seen.*stop_share_events"):
        run(tmp_path, tables, Config(stop_share_events=0.01))


def test_too_few_users_with_history_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"users\.enough.*at least 30 users.*25 seen.*contract\.min_users"):
        run(tmp_path / "few", clean(), Config(min_users=30))
    with pytest.raises(ContractError, match=r"users\.enough.*0 seen"):
        run(tmp_path / "short", clean(), Config(min_groups=5))
    short = run(tmp_path / "warned", clean(), Config(min_groups=5, min_users=0))
    assert [warning.partition(":")[0] for warning in short.facts["warnings"]] == ["users.history"]


Breaker = Callable[[Tables], Tables]
BROKEN: list[tuple[str, Breaker, str]] = [
    (
        "column",
        lambda t: {**t, "events": t["events"].drop("value")},
        "table=events, column=value, wanted=Float64, seen=abs",
    ),
    ("type", lambda t: {**t, "items": t["items"].with_columns(title=pl.lit(1))}, "table=items, column=title"),
    (
        "zone",
        lambda t: {**t, "events": t["events"].with_columns(pl.col("timestamp").dt.replace_time_zone(None))},
        "column=timestamp",
    ),
    ("attribute", lambda t: {**t, "items": t["items"].drop("category")}, "no table has"),
    ("empty", lambda t: {**t, "events": t["events"].clear()}, "table=events, rows=0"),
    ("pictures", lambda t: {**t, "pictures": t["pictures"].drop("rgb")}, "table=pictures, column=rgb"),
]


@pytest.mark.parametrize(("name", "breaker", "said"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_a_wrong_structure_stops_at_once(tmp_path: Path, name: str, breaker: Breaker, said: str) -> None:
    with pytest.raises(DataError, match=said):
        run(tmp_path, breaker(clean()), LENIENT)


def test_missing_or_broken_files_say_what_to_do(tmp_path: Path) -> None:
    ctx = context(tmp_path, clean())
    (tmp_path / "data" / "items.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"items\.parquet cannot be read.*couturier ingest"):
        contract.run(ctx)
    (tmp_path / "data" / "items.parquet").unlink()
    with pytest.raises(DataError, match=r"items\.parquet is missing.*couturier ingest"):
        contract.run(ctx)
    with pytest.raises(DataError, match="couturier validate"):
        explain_quarantine(tmp_path)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"contract\.stop_share_items is 2"):
        Config(stop_share_items=2.0)
    with pytest.raises(ConfigError, match=r"contract\.latest is 'soon'"):
        Config(latest="soon")
    with pytest.raises(ConfigError, match="not before"):
        Config(earliest="2020-01-01", latest="2019-01-01")


def test_the_same_data_give_the_same_bytes_and_nothing_is_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the contract called the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    tables = change(change(clean(), "items", 3, category="FUEL"), "events", 9, value=None)
    first, second = run(tmp_path / "1", tables, LENIENT), run(tmp_path / "2", tables, LENIENT)
    assert _contents(first.out) == _contents(second.out)
    assert first.facts == second.facts
    assert list(home.iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == ["data", "out", "scratch"]
    assert list(first.scratch.iterdir()) == []


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_order_of_raw_rows_does_not_change_what_is_kept(tmp_path: Path) -> None:
    tables = change(clean(), "items", 3, category="FUEL")
    mixed = {name: frame.sample(fraction=1.0, shuffle=True, seed=1) for name, frame in tables.items()}
    first, second = run(tmp_path / "1", tables, LENIENT), run(tmp_path / "2", mixed, LENIENT)
    for table in TABLES:
        name = f"{table}.parquet"
        assert (first.out / name).read_bytes() == (second.out / name).read_bytes()


def test_the_docs_open_offline_and_show_what_happened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = change(clean(), "items", 3, category="<script>alert(1)</script>")
    tables["items"] = tables["items"].with_columns(pl.lit("x").alias("<b>odd</b>"))
    domains = {"category": ["BREAD", "MILK"], "<b>odd</b>": ["x", "<i>y</i>"]}
    ctx = run(tmp_path, tables, LENIENT, domains=domains)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
    pages = {path.name: path.read_text() for path in (ctx.out / "docs").glob("*.html")}
    for name, page in pages.items():
        assert "<script" not in page, name
        assert "<link" not in page, name
        assert "<b>odd" not in page and "<i>y" not in page, name
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), name
        assert not re.search(r"@import|url\(", page), name
        assert "<style>" in page
        for target in re.findall(r"""href=["']?([^"' >]+\.html)""", page):
            assert target in pages, (name, target)
    assert '<div class="show-scrollbars">&lt;script&gt;alert(1)&lt;/script&gt;</div>' in pages["items.html"]
    assert "items.category_domain" in pages["index.html"]
    assert "kept + quarantined = raw" in pages["index.html"]
    assert "expectations met; rows of items looked at: 10." in pages["items.html"]


def test_the_summary_has_a_row_a_table(tmp_path: Path) -> None:
    tables = change(change(clean(), "events", 5, quantity=0.0, value=0.0), "events", 6, value=0.0)
    summary = contract_summary(run(tmp_path, tables).facts)
    assert [row["table"] for row in summary] == list(TABLES)
    assert summary[0] == {
        "table": "events",
        "raw": 200,
        "kept": 198,
        "quarantined": 2,
        "share": 0.01,
        "rules": "value_range 2, quantity_range 1",
    }
    assert summary[1]["rules"] == ""


def test_events_without_quantity_or_groups_count_moments_as_groups(tmp_path: Path) -> None:
    tables = clean()
    ctx = run(tmp_path, {**tables, "events": tables["events"].drop("quantity", "group_id")})
    assert quarantined(ctx) == {}
    assert ctx.facts["users_with_history"] == 25
