"""The Complete Journey adapter: on the real package once, and on tables of a few rows for each rule."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from couturier.components.data.adapter_complete_journey import load
from couturier.components.data.art import product_categories
from couturier.components.data.raw import Config, RawTables
from couturier.components.errors import DataError

TRANSACTIONS, PRODUCTS, HOUSEHOLDS = 1_469_307, 92_331, 2_469


@pytest.fixture(scope="module")
def journey() -> RawTables:
    return load(Config())


def test_every_transaction_becomes_an_event(journey: RawTables) -> None:
    events = journey.events
    assert events.height == TRANSACTIONS
    assert events.null_count().sum_horizontal().item() == 0
    assert events["kind"].unique().to_list() == ["purchase"]
    assert events["timestamp"].is_sorted()
    assert events.schema["timestamp"] == pl.Datetime("us", "UTC")
    # The known dirt is still there for the contract to find.
    assert (events["quantity"] <= 0).sum() == 8_869
    assert (events["value"] <= 0).sum() == 11_226


def test_a_group_is_one_basket_of_one_household_at_one_moment(journey: RawTables) -> None:
    baskets = journey.events.group_by("group_id").agg(pl.col("user_id").n_unique(), pl.col("timestamp").n_unique())
    assert baskets["user_id"].max() == 1
    assert baskets["timestamp"].max() == 1


def test_items_are_tiles_with_readable_ids(journey: RawTables) -> None:
    items = journey.items
    assert items["item_id"].is_sorted() and items["item_id"].is_unique().all()
    assert set(journey.events["item_id"].unique()) == set(items["item_id"])
    assert items.select("category", "brand", "tier").is_unique().all()
    one = items.row(by_predicate=pl.col("item_id") == "soft-drinks.national.mid", named=True)
    assert one["title"] == "Soft drinks, national brand, mid price"
    assert one["text"] == "soft drinks, national brand, mid price, grocery"
    assert (one["category"], one["department"], one["brand"], one["tier"]) == (
        "SOFT DRINKS",
        "GROCERY",
        "National",
        "mid",
    )
    assert 0.5 < one["price"] < 5
    assert journey.meta["attributes"] == ["category", "department", "brand", "tier"]
    prices = {tier: items.filter(item_id=f"soft-drinks.national.{tier}")["price"].item() for tier in ("low", "high")}
    assert prices["low"] < one["price"] < prices["high"]


def test_what_is_no_product_gets_an_item_without_a_picture(journey: RawTables) -> None:
    both = journey.items.join(journey.pictures, on="item_id", how="left")
    assert both.height == journey.items.height == journey.pictures.height
    bare = both.filter(pl.col("rgb").is_null())
    assert set(bare["category"].unique()) & product_categories() == set()
    assert {"COUPON/MISC ITEMS", "FUEL", None} <= set(bare["category"].unique())
    assert bare.filter(category="FUEL")["error"][0] == "no art for category FUEL"
    assert bare.filter(pl.col("category").is_null())["error"][0] == "no art for category null"
    assert bare.filter(pl.col("category").is_null())["item_id"].str.starts_with("unknown.").all()
    drawn = both.filter(pl.col("rgb").is_not_null())
    assert drawn["error"].null_count() == drawn.height
    assert drawn["rgb"].bin.size().unique().to_list() == [32 * 32 * 3]
    assert set(drawn["category"]) <= set(journey.meta["domains"]["category"])


def test_users_are_households_with_what_is_known_of_them(journey: RawTables) -> None:
    assert journey.users.height == HOUSEHOLDS
    assert set(journey.users["user_id"]) == set(journey.events["user_id"].unique())
    assert journey.users["age"].drop_nulls().len() == 801
    assert all(dtype == pl.String for dtype in journey.users.schema.values())


def test_the_credit_names_the_data_the_art_and_who_drew(journey: RawTables) -> None:
    for words in ("dunnhumby", "Complete Journey", "OpenMoji", "CC BY-SA 4.0", "drawn by us"):
        assert words in journey.meta["attribution"]


def tiny(folder: Path, *, prices: dict[int, float | None], products: list[tuple[object, ...]] | None = None) -> Path:
    """Each product bought once by household 1; price None means a quantity of zero."""
    when = datetime(2017, 1, 1, 12)
    pl.DataFrame(
        [
            (household, 100 * household + product, product, int(price is not None), price or 0.0, when)
            for household in (1, 2)
            for product, price in prices.items()
        ],
        schema=[
            "household_id",
            "basket_id",
            "product_id",
            "quantity",
            "sales_value",
            "transaction_timestamp",
        ],
        orient="row",
    ).with_columns(pl.col("transaction_timestamp").cast(pl.Datetime("ns"))).write_parquet(
        folder / "transactions.parquet"
    )
    rows = products or [(product, "GROCERY", "National", "SOFT DRINKS") for product in prices]
    schema = {"product_id": pl.Int64, "department": pl.String, "brand": pl.String, "product_category": pl.String}
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(folder / "products.parquet")
    pl.DataFrame({"household_id": [1], "age": ["25-34"]}).write_parquet(folder / "demographics.parquet")
    return folder


def tiers(raw: RawTables) -> list[str]:
    """The tiers of household 1's events by product id, which is their order."""
    return raw.events.filter(user_id="1")["item_id"].str.extract(r"\.(\w+)$").to_list()


@pytest.mark.parametrize(
    ("prices", "wanted"),
    [
        ({1: 2.0}, ["mid"]),
        ({1: 2.0, 2: 1.0}, ["high", "low"]),
        ({1: 3.0, 2: 1.0, 3: 2.0}, ["high", "low", "mid"]),
        ({1: 1.0, 2: 1.0, 3: 1.0}, ["low", "mid", "high"]),  # a tie is ranked by product id
        ({1: 1.0, 2: 2.0, 3: 3.0, 4: None}, ["low", "mid", "high", "mid"]),  # no price: the middle
        ({1: None}, ["mid"]),
        ({n: float(n) for n in range(1, 7)}, ["low", "low", "mid", "mid", "high", "high"]),
    ],
)
def test_price_tiers_are_terciles_within_the_category(
    tmp_path: Path, prices: dict[int, float | None], wanted: list[str]
) -> None:
    assert tiers(load(Config(folder=str(tiny(tmp_path, prices=prices))))) == wanted


def test_unknown_products_and_the_most_common_department(tmp_path: Path) -> None:
    folder = tiny(
        tmp_path,
        prices={1: 1.0, 2: 1.0, 3: 1.0, 4: 9.0, 5: 9.0},
        products=[
            (1, "DELI", "National", "CHEESES"),
            (2, "DELI", "National", "CHEESES"),
            (3, "GROCERY", "National", "CHEESES"),
            (4, "MISCELLANEOUS", "Private", None),
        ],
    )
    raw = load(Config(folder=str(folder)))
    assert raw.events.height == 10
    assert set(raw.items["item_id"]) == {
        "cheeses.national.low",
        "cheeses.national.mid",
        "cheeses.national.high",
        "unknown.private.low",
        "unknown.unknown.high",  # product 5 is in no table
    }
    assert raw.items.filter(item_id="cheeses.national.low")["department"].item() == "DELI"
    assert raw.items.filter(item_id="unknown.unknown.high").select("category", "brand", "department").row(0) == (
        None,
        None,
        None,
    )


def test_fewer_users_see_the_same_catalogue(tmp_path: Path) -> None:
    folder = tiny(tmp_path, prices={1: 1.0, 2: 2.0, 3: 3.0})
    everyone, one = load(Config(folder=str(folder))), load(Config(folder=str(folder), max_users=1))
    assert one.users.height == 1 and one.events["user_id"].n_unique() == 1
    assert one.events.height == everyone.events.height // 2
    assert one.items.equals(everyone.items) and one.pictures.equals(everyone.pictures)


def test_a_missing_file_and_a_missing_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="transactions.parquet is missing"):
        load(Config(folder=str(tmp_path)))
    tiny(tmp_path, prices={1: 1.0})
    pl.read_parquet(tmp_path / "products.parquet").drop("brand").write_parquet(tmp_path / "products.parquet")
    with pytest.raises(DataError, match=r"products.parquet has no column 'brand'"):
        load(Config(folder=str(tmp_path)))


def test_a_category_unknown_to_the_art_table_has_no_picture(tmp_path: Path) -> None:
    folder = tiny(tmp_path, prices={1: 1.0}, products=[(1, "GROCERY", "National", "NEW THINGS")])
    raw = load(Config(folder=str(folder)))
    assert raw.pictures["error"].to_list() == ["no art for category NEW THINGS"]
    assert raw.items["item_id"].to_list() == ["new-things.national.mid"]


def test_two_categories_with_one_slug_are_refused(tmp_path: Path) -> None:
    folder = tiny(
        tmp_path,
        prices={1: 1.0, 2: 1.0},
        products=[(1, "GROCERY", "National", "TOYS & GAMES"), (2, "GROCERY", "National", "TOYS/GAMES")],
    )
    with pytest.raises(DataError, match="the same item_id 'toys-games.national.mid'"):
        load(Config(folder=str(folder)))
