"""The contract on any dirt: nothing is lost, no kept row breaks a rule, no clean row is set aside."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from couturier.components.data import contract
from couturier.components.errors import ContractError
from couturier.components.lineage.stages import StageContext

from .contract_tables import (
    LATE,
    LENIENT,
    SIZE,
    TABLES,
    Tables,
    assert_split,
    change,
    clean,
    context,
    quarantined,
)

# What a dirty table may hold in any cell; the clean value is drawn most of the time.
DIRT: dict[str, dict[str, list[Any]]] = {
    "events": {
        "user_id": [None, ""],
        "item_id": [None, "", "nowhere", "i1"],
        "timestamp": [None, LATE, datetime(1901, 1, 1, tzinfo=UTC)],
        "kind": [None, "", "view"],
        "value": [None, 0.0, -3.0, 1e9, float("nan"), float("inf")],
        "quantity": [None, 0.0, -1.0, 101.0, float("nan")],
        "group_id": [None],
    },
    "items": {"item_id": [None, "", "i1"], "title": [None, ""], "text": [None], "category": [None, "FUEL"]},
    "pictures": {
        "item_id": [None, "", "i1", "nowhere"],
        "height": [None, 3],
        "width": [None, 1],
        "rgb": [None, b"", b"12"],
        "error": ["broken"],
    },
    "users": {"user_id": [None, "", "u01"], "age": [None]},
}


@st.composite
def dirty_tables(draw: st.DrawFn) -> Tables:
    tables = clean(users=4)
    spots = [(table, column) for table, columns in DIRT.items() for column in columns]
    for table, column in draw(st.lists(st.sampled_from(spots), max_size=40)):
        row = draw(st.integers(0, tables[table].height - 1))
        tables = change(tables, table, row, **{column: draw(st.sampled_from(DIRT[table][column]))})
    return tables


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(tables=dirty_tables())
def test_nothing_is_lost_and_no_kept_row_breaks_a_rule(
    tmp_path_factory: pytest.TempPathFactory, tables: Tables
) -> None:
    ctx = context(tmp_path_factory.mktemp("dirty"), tables, LENIENT)
    try:
        contract.run(ctx)
    except ContractError as error:  # too few users are left: nothing is kept then, by intent
        assert "users.enough" in str(error)
        return
    assert_split(ctx, tables)
    kept = {table: pl.read_parquet(ctx.out / f"{table}.parquet") for table in TABLES}
    items = set(kept["items"]["item_id"])
    assert len(items) == kept["items"].height
    assert items == set(kept["pictures"]["item_id"]) and len(items) == kept["pictures"].height
    assert not items & {None, ""}
    assert all(row["title"] and row["text"] is not None for row in kept["items"].to_dicts())
    assert set(kept["items"]["category"]) <= {"MILK", "BREAD"}
    for row in kept["pictures"].to_dicts():
        assert (row["height"], row["width"], len(row["rgb"]), row["error"]) == (SIZE, SIZE, SIZE * SIZE * 3, None)
    for row in kept["events"].to_dicts():
        assert row["user_id"] and row["item_id"] in items and row["kind"]
        assert datetime(1990, 1, 1, tzinfo=UTC) <= row["timestamp"] <= datetime(2100, 1, 1, tzinfo=UTC)
        assert 0 < row["value"] <= 1000
        assert row["quantity"] is None or row["quantity"] != row["quantity"] or 0 < row["quantity"] <= 100
    assert (
        kept["events"]
        .select("user_id", "timestamp")
        .equals(kept["events"].select("user_id", "timestamp").sort(pl.all()))
    )
    users = kept["users"]["user_id"].to_list()
    assert all(users) and len(set(users)) == len(users)
    assert _every_failure_is_real(ctx, tables)


def _every_failure_is_real(ctx: StageContext, tables: Tables) -> bool:
    """Cleaning is not careless: a row was set aside only if a cell of it is dirty, or its item or picture was."""
    good = clean(users=4)
    for (table, row), rules in quarantined(ctx).items():
        linked = {"events.item_kept", "items.has_picture", "pictures.item_kept", "pictures.item_exists"}
        same_id = {"items.item_id_unique", "pictures.item_id_unique", "users.user_id_unique", "events.item_exists"}
        if not set(rules) & (linked | same_id) and tables[table].row(row) == good[table].row(row):
            return False
    return True
