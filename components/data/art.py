"""Which picture stands for which product category of The Complete Journey, and which colour for which department.

The table is made by hand and checked by eye on the contact sheet; matching names to emoji by sentence embedding makes
mistakes such as yogurt -> yo-yo. Where no emoji tells two categories apart, a second small glyph, the ``cue``, does: a
snowflake for frozen, a can for shelf-stable, a leaf for the natural-food aisle.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import polars as pl

TABLE = Path(__file__).with_name("art_complete_journey.csv")

DEPARTMENT_COLOURS: dict[str, str] = {
    "GROCERY": "#f7e3b5",
    "DRUG GM": "#bcd6f5",
    "PRODUCE": "#b9e3a8",
    "MEAT-PCKGD": "#f2b8a8",
    "MEAT": "#e89aa0",
    "DELI": "#f5c987",
    "PASTRY": "#f7cfe4",
    "NUTRITION": "#a5d6c2",
    "SEAFOOD-PCKGD": "#8ec7dd",
    "SEAFOOD": "#7fb2e0",
    "SALAD BAR": "#d3e77a",
    "COSMETICS": "#dcb5ea",
    "FLORAL": "#f4f0a0",
    "SPIRITS": "#b79ad0",
    "GARDEN CENTER": "#8fc98f",
    "RESTAURANT": "#d9b48f",
    "CHEF SHOPPE": "#e3d4c1",
    "TRAVEL & LEISURE": "#9fe3e0",
    "FROZEN GROCERY": "#d5ecf7",
    "MISCELLANEOUS": "#cfcfcf",
    "FUEL": "#a8a8b0",
    "COUPON": "#f0f0f0",
    "GM MERCH EXP": "#b5bfa0",
    "AUTOMOTIVE": "#97a3b8",
    "PHOTO & VIDEO": "#a9b4e8",
    "CNTRL/STORE SUP": "#c4b8a8",
    "POSTAL CENTER": "#e8c3b0",
    "PROD-WHS SALES": "#c6d9b0",
    "TOYS": "#ffb07a",
    "ELECT &PLUMBING": "#e6dc6a",
    "HOUSEWARES": "#c9a5b8",
    "CHARITABLE CONT": "#f5a5c0",
}
NO_DEPARTMENT_COLOUR = "#e0e0e0"


@cache
def art_table() -> pl.DataFrame:
    """The hand-made table, one row a category: ``category``, ``codepoint``, ``cue`` (str, null when none), ``product``.

    ``codepoint`` and ``cue`` name files of OpenMoji (``svg/CODEPOINT.svg``). ``product`` is false for what is rung up
    at the till but is no product (coupons, fuel, deposits); such rows carry no art.
    """
    table = pl.read_csv(TABLE, schema_overrides={"codepoint": pl.String, "cue": pl.String})
    return table.select("category", "codepoint", "cue", product=pl.col("kind") == "product")


def product_categories() -> set[str]:
    """The categories that are products: the domain that the contract allows."""
    return set(art_table().filter("product")["category"])
