"""Small clean tables for the contract, ways to spoil them, and what must hold of any outcome."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from couturier.components.data import contract
from couturier.components.data.contract import Config
from couturier.components.data.quarantine import QUARANTINE
from couturier.components.data.raw import PICTURE_SCHEMA
from couturier.components.lineage.stages import StageContext
from couturier.components.lineage.workspace import Workspace

SIZE = 2
TABLES = ("events", "items", "pictures", "users")
START, LATE = datetime(2020, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
Tables = dict[str, pl.DataFrame]


def clean(users: int = 25, items: int = 10) -> Tables:
    """Tables that break no rule: every user takes two items in each of four baskets."""
    events = [
        {
            "user_id": f"u{user:02}",
            "item_id": f"i{(user + 3 * basket + piece) % items}",
            "timestamp": START + timedelta(days=basket, minutes=user),
            "kind": "purchase",
            "value": 1.5 + piece,
            "quantity": 1.0 + basket,
            "group_id": f"b{user:02}-{basket}",
        }
        for basket in range(4)
        for user in range(users)
        for piece in range(2)
    ]
    ids = [f"i{item}" for item in range(items)]
    rgb = [bytes([item] * (SIZE * SIZE * 3)) for item in range(items)]
    sides = [SIZE] * items
    return {
        "events": pl.DataFrame(events).cast({"timestamp": pl.Datetime("us", "UTC")}),
        "items": pl.DataFrame(
            {
                "item_id": ids,
                "title": [f"Item {name}" for name in ids],
                "text": ids,
                "category": ["MILK", "BREAD"] * (items // 2),
                "price": [2.5] * items,
            }
        ),
        "pictures": pl.DataFrame(
            {"item_id": ids, "height": sides, "width": sides, "rgb": rgb, "error": [None] * items},
            schema=PICTURE_SCHEMA,
        ),
        "users": pl.DataFrame({"user_id": [f"u{user:02}" for user in range(users)], "age": ["30-39"] * users}),
    }


def context(folder: Path, tables: Tables, config: Config | None = None, **meta: Any) -> StageContext:
    """A stage context on ``tables`` written as raw data below ``folder``."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        frame.write_parquet(data / f"{name}.parquet")
    default = {
        "adapter": "test",
        "settings": {"picture_size": SIZE},
        "attributes": ["category"],
        "domains": {"category": ["BREAD", "MILK"]},
        "attribution": "none",
    }
    (data / "meta.json").write_text(json.dumps(default | meta))
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir()
    scratch.mkdir()
    workspace = Workspace(project=folder, root=folder / ".couturier")
    return StageContext(inputs={}, config=config or Config(), out=out, scratch=scratch, workspace=workspace)


def change(tables: Tables, table: str, row: int, **values: Any) -> Tables:
    """``tables`` with some values of one row replaced."""
    frame = tables[table]
    here = pl.int_range(pl.len()) == row
    changed = [
        pl.when(here).then(pl.lit(value, dtype=frame.schema[name])).otherwise(pl.col(name)).alias(name)
        for name, value in values.items()
    ]
    return {**tables, table: frame.with_columns(changed)}


def run(folder: Path, tables: Tables, config: Config | None = None, **meta: Any) -> StageContext:
    ctx = context(folder, tables, config, **meta)
    contract.run(ctx)
    return ctx


LENIENT = Config(
    stop_share_events=1.0, stop_share_items=1.0, stop_share_pictures=1.0, stop_share_users=1.0, min_users=1
)


def quarantined(ctx: StageContext) -> dict[tuple[str, int], list[str]]:
    frame = pl.read_parquet(ctx.out / QUARANTINE)
    return {(row["table"], row["row"]): row["rules"] for row in frame.to_dicts()}


def assert_split(ctx: StageContext, tables: Tables) -> None:
    """kept + quarantined = raw, as multisets of rows and as figures, for every table."""
    aside = pl.read_parquet(ctx.out / QUARANTINE)
    assert aside.select("table", "row").is_duplicated().sum() == 0
    for table in TABLES:
        raw, rows = tables[table], aside.filter(pl.col("table") == table)["row"]
        kept = pl.read_parquet(ctx.out / f"{table}.parquet")
        together = pl.concat([kept, raw[rows.to_numpy()]])
        assert sorted(map(repr, together.rows())) == sorted(map(repr, raw.rows()))
        facts = ctx.facts[table]
        assert (facts["raw"], facts["kept"], facts["quarantined"]) == (raw.height, kept.height, len(rows))
