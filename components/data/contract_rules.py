"""Which rules the contract has: one function a suite, and the settings they read.

Helper columns, made by :mod:`couturier.components.data.contract` beside the raw ones:

* ``pictures.item_found``, ``events.item_found``: the item_id, where ``items.parquet`` has it, else null.
* ``items.picture_kept``: the item_id, where a picture of it passed its rules, else null.
* ``pictures.item_kept``, ``events.item_kept``: the item_id, where the item passed its rules, else null.
  Where an earlier rule already covers the row (no item_id, no such item) these hold ``-``: a row is
  blamed once.
* ``pictures.rgb_bytes``: how many bytes the picture has, null where it has none.
* ``events.since_previous_s``: seconds since the user's event one row above, null for the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl

from couturier.components.data.expectations import TABLES, Rules, Suite, percent
from couturier.components.data.formats import EVENT_COLUMNS
from couturier.components.errors import ConfigError, DataError

ITEM_COLUMNS = {"item_id": pl.String, "title": pl.String, "text": pl.String}
PICTURE_COLUMNS = {"item_id": pl.String, "height": pl.Int32, "width": pl.Int32, "rgb": pl.Binary, "error": pl.String}
OPTIONAL_EVENT_COLUMNS = {"quantity": pl.Float64, "group_id": pl.String}
_SHARES = (
    "stop_share_events",
    "stop_share_items",
    "stop_share_pictures",
    "stop_share_users",
    "warn_share",
    "warn_share_short",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the contract allows. Shares are of the values a rule looked at, from 0 to 1."""

    earliest: str = "1990-01-01"
    """First moment an event may have: an ISO date, UTC."""
    latest: str = "2100-01-01"
    """Last moment an event may have: an ISO date, UTC. Fixed, not "now", so that the same data always pass alike."""
    quantity_above: float = 0.0
    """Quantities are above this (where the events have a quantity)."""
    quantity_max: float = 100.0
    """The demo's largest quantity of one real product is below 100; coupons and fuel reach 89,638."""
    value_above: float = 0.0
    """An event's value (price paid, rating, seconds watched) is above this."""
    value_max: float = 1000.0
    """The demo's largest purchase is 840."""
    min_users: int = 20
    """The run stops when fewer users have enough history."""
    min_groups: int = 3
    """Enough history: that many groups (baskets, sessions, moments) of kept events."""
    stop_share_events: float = 0.10
    """The run stops when one rule fails for a larger share of the events, or all rules together do."""
    stop_share_items: float = 0.25
    """The same for items. Odd items are many in number and few in events, so this is wider."""
    stop_share_pictures: float = 0.25
    """The same for pictures."""
    stop_share_users: float = 0.01
    """The same for the table of users."""
    warn_share: float = 0.001
    """The run says so when a rule fails for a larger share."""
    warn_share_short: float = 0.50
    """The run says so when a larger share of the users has too little history."""

    def __post_init__(self) -> None:
        for name in _SHARES:
            share = vars(self)[name]
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"contract.{name} is {share}; a share from 0 to 1 is wanted. Set 0.1 for 10 %.")
        if moment(self.earliest, "earliest") >= moment(self.latest, "latest"):
            raise ConfigError(
                f"contract.earliest is {self.earliest!r}, not before contract.latest {self.latest!r}. Swap them."
            )

    def stop_share(self, table: str) -> float:
        return float(vars(self)[f"stop_share_{table}"])

    def rules(self, table: str) -> Rules:
        """An empty list of rules for ``table`` with the shares of this contract."""
        return Rules(table=table, stop_share=self.stop_share(table), warn_share=self.warn_share, has_setting=True)


def moment(text: str, setting: str) -> datetime:
    """An ISO date or time as a moment; UTC where it names no zone.

    Raises:
        ConfigError: it is no ISO date.

    Example:
        >>> moment("2017-01-01", "earliest").isoformat()
        '2017-01-01T00:00:00+00:00'
    """
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"contract.{setting} is {text!r}; an ISO date such as 2017-12-31 or 2017-12-31T23:59:59 is wanted."
        ) from error
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def picture_size(meta: Mapping[str, Any]) -> int:
    """The side of every picture in pixels, as the adapter set it.

    Raises:
        DataError: ``meta.json`` does not say.
    """
    size = meta["settings"].get("picture_size")
    if not isinstance(size, int) or size < 1:
        raise DataError(f"meta.json has settings.picture_size {size!r}; a number of pixels is wanted. Ingest again.")
    return size


def schema_frame(raw: Mapping[str, pl.DataFrame], meta: Mapping[str, Any]) -> pl.DataFrame:
    """One row per column: ``table``, ``column``, the type ``wanted`` and the type ``seen`` (``absent`` where none)."""
    wanted: dict[str, dict[str, Any]] = {
        "events": {**EVENT_COLUMNS, **{k: v for k, v in OPTIONAL_EVENT_COLUMNS.items() if k in raw["events"].columns}},
        "items": {**ITEM_COLUMNS, **{str(name): pl.String for name in meta["attributes"]}},
        "pictures": PICTURE_COLUMNS,
        "users": {"user_id": pl.String, **{name: pl.String for name in raw["users"].columns}},
    }
    rows = [
        {"table": table, "column": column, "wanted": str(dtype), "seen": str(raw[table].schema.get(column, "absent"))}
        for table, columns in wanted.items()
        for column, dtype in columns.items()
    ]
    return pl.DataFrame(rows)


def schema_suite() -> Suite:
    import great_expectations.expectations as gxe

    rules = Rules(table="schema", stop_share=0.0, warn_share=0.0).add(
        "columns",
        "every column of the documented form is there, with its type",
        "a column is absent or has another type",
        gxe.ExpectColumnPairValuesToBeEqual,
        column_A="wanted",
        column_B="seen",
    )
    return Suite(name="schema", table="schema", about="Columns and types of the raw tables.", rules=rules.rules)


def filled_suite() -> Suite:
    rules = Rules(table="tables", stop_share=0.0, warn_share=0.0).between("rows", 1, None, words="at least 1")
    return Suite(name="tables", table="tables", about="No raw table is empty.", rules=rules.rules)


def pictures_suite(config: Config, meta: Mapping[str, Any]) -> Suite:
    """A picture belongs to one known item, was decoded, and has the size that was asked for."""
    import great_expectations.expectations as gxe

    size = picture_size(meta)
    rules = config.rules("pictures").not_blank("item_id").unique("item_id")
    rules.present(
        "item_exists", "item_found", "item_id names a row of items.parquet", "item_id names no row of items.parquet"
    )
    rules.add(
        "decoded",
        "the picture could be made (error is null)",
        "the picture could not be made",
        gxe.ExpectColumnValuesToBeNull,
        column="error",
    )
    rules.add(
        "rgb_not_null", "the picture has bytes", "the picture has no bytes",
        gxe.ExpectColumnValuesToNotBeNull, column="rgb_bytes",
    )  # fmt: skip
    for column, wanted in (("height", size), ("width", size), ("rgb_bytes", size * size * 3)):
        rules.add(
            f"{column}_size",
            f"{column} is {wanted}",
            f"{column} is not {wanted}",
            gxe.ExpectColumnValuesToBeInSet,
            column=column,
            value_set=[wanted],
        )
    about = "Every picture decodes, at the right size."
    return Suite(name="pictures", table="pictures", about=about, rules=rules.rules)


def items_suite(config: Config, meta: Mapping[str, Any], columns: list[str]) -> Suite:
    """An item is named once, has words, lies inside the adapter's domains, and has a picture."""
    rules = config.rules("items").not_blank("item_id").unique("item_id").not_blank("title").not_null("text")
    _domains(rules, meta, columns)
    if "price" in columns:
        rules.between("price", config.value_above, config.value_max, above=True, settings=("value_above", "value_max"))
    rules.present(
        "has_picture", "picture_kept", "a picture of the item passed its rules", "the item has no usable picture"
    )
    about = "The catalogue, and that every item has a picture."
    return Suite(name="items", table="items", about=about, rules=rules.rules)


def picture_items_suite(config: Config) -> Suite:
    rules = config.rules("pictures").present(
        "item_kept", "item_kept", "the picture's item passed its rules", "its item is in quarantine"
    )
    about = "Pictures belong to items that were kept."
    return Suite(name="integrity of pictures", table="pictures", about=about, rules=rules.rules)


def events_suite(config: Config, meta: Mapping[str, Any], columns: list[str]) -> Suite:
    """An event says who, what, when and how much, in range."""
    rules = config.rules("events").not_blank("user_id").not_blank("item_id").not_null("timestamp").not_blank("kind")
    rules.not_null("value")
    low, high = moment(config.earliest, "earliest"), moment(config.latest, "latest")
    range_words = f"from {config.earliest} to {config.latest}"
    rules.between("timestamp", low, high, settings=("earliest", "latest"), words=range_words)
    rules.between("value", config.value_above, config.value_max, above=True, settings=("value_above", "value_max"))
    if "quantity" in columns:
        settings = ("quantity_above", "quantity_max")
        rules.between("quantity", config.quantity_above, config.quantity_max, above=True, settings=settings)
    _domains(rules, meta, columns)
    return Suite(name="events", table="events", about="What people did: who, what, when, how much.", rules=rules.rules)


def event_items_suite(config: Config) -> Suite:
    """The foreign key of events, in two steps: the item exists, and it was kept."""
    rules = config.rules("events").present(
        "item_exists", "item_found", "item_id names a row of items.parquet", "item_id names no row of items.parquet"
    )
    rules.present("item_kept", "item_kept", "the event's item passed its rules", "its item is in quarantine")
    return Suite(
        name="integrity of events", table="events", about="Events are about items that were kept.", rules=rules.rules
    )


def users_suite(config: Config, meta: Mapping[str, Any], columns: list[str]) -> Suite:
    rules = config.rules("users").not_blank("user_id").unique("user_id")
    _domains(rules, meta, columns)
    return Suite(name="users", table="users", about="People, each once.", rules=rules.rules)


def order_suite() -> Suite:
    rules = Rules(table="events", stop_share=0.0, warn_share=0.0).between(
        "since_previous_s", 0.0, None, words="not negative: the kept events of a user stand in the order of time"
    )
    return Suite(name="order", table="kept events", about="Kept events, sorted by user and time.", rules=rules.rules)


def histories_suite(config: Config) -> Suite:
    """Warns when most users have too little history; :func:`audience_suite` stops when too few have enough."""
    import great_expectations.expectations as gxe

    rules = Rules(table="users", stop_share=1.0, warn_share=config.warn_share_short).add(
        "history",
        f"a user has at least {config.min_groups} groups of kept events",
        f"a user has fewer than {config.min_groups} groups of kept events",
        gxe.ExpectColumnValuesToBeBetween,
        settings=("min_groups",),
        column="groups",
        min_value=config.min_groups,
    )
    return Suite(name="histories", table="histories", about="How much history the users have.", rules=rules.rules)


def audience_suite(config: Config) -> Suite:
    import great_expectations.expectations as gxe

    users = f"users have {config.min_groups} or more groups of kept events"
    rules = Rules(table="users", stop_share=0.0, warn_share=0.0).whole(
        "enough",
        f"at least {config.min_users} {users}",
        f"fewer than {config.min_users} {users}",
        gxe.ExpectTableRowCountToBeBetween,
        settings=("min_users", "min_groups"),
        min_value=config.min_users,
    )
    return Suite(name="audience", table="audience", about="Enough users with enough history.", rules=rules.rules)


def shares_suite(config: Config) -> Suite:
    """All rules together may not set aside more of a table than one rule may."""
    import great_expectations.expectations as gxe

    rules = []
    for table in TABLES:
        share = config.stop_share(table)
        made = Rules(table=table, stop_share=0.0, warn_share=0.0).whole(
            "share_set_aside",
            f"all rules together set aside at most {percent(share)} of the rows",
            f"all rules together set aside more than {percent(share)} of the rows",
            gxe.ExpectColumnMaxToBeBetween,
            settings=(f"stop_share_{table}",),
            column=table,
            max_value=share,
        )
        rules += made.rules
    return Suite(name="shares", table="shares", about="The share of each table that was set aside.", rules=rules)


def _domains(rules: Rules, meta: Mapping[str, Any], columns: list[str]) -> None:
    for column, values in sorted(meta.get("domains", {}).items()):
        if column in columns:
            rules.not_null(column).in_domain(column, list(values), f"that the adapter {meta['adapter']} allows")


def check_domains(raw: Mapping[str, pl.DataFrame], meta: Mapping[str, Any]) -> None:
    """Every domain of ``meta.json`` speaks of a column that some table has.

    Raises:
        DataError: one does not.
    """
    known = {name for frame in raw.values() for name in frame.columns}
    for column in meta.get("domains", {}):
        if column not in known:
            raise DataError(
                f"meta.json names the domain of a column {column!r} that no table has. "
                f"The columns are {', '.join(sorted(known))}. Mend the adapter and ingest again."
            )
