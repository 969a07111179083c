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
    "MEAT-PCKGD": "#eb9c7e",
    "MEAT": "#f4cdd0",
    "DELI": "#f5c987",
    "PASTRY": "#f7b6e2",
    "NUTRITION": "#a5d6c2",
    "SEAFOOD-PCKGD": "#8fd0e6",
    "SEAFOOD": "#5b8fd0",
    "SALAD BAR": "#d3e77a",
    "COSMETICS": "#cb9cf0",
    "FLORAL": "#f5f283",
    "SPIRITS": "#b79ad0",
    "GARDEN CENTER": "#8fc98f",
    "RESTAURANT": "#d9b48f",
    "CHEF SHOPPE": "#ded2ff",
    "TRAVEL & LEISURE": "#5fd8c8",
    "FROZEN GROCERY": "#d5ecf7",
    "MISCELLANEOUS": "#cfcfcf",
    "FUEL": "#a8a8b0",
    "COUPON": "#fcfcfc",
    "GM MERCH EXP": "#8f9a6a",
    "AUTOMOTIVE": "#6f83a8",
    "PHOTO & VIDEO": "#a9b4e8",
    "CNTRL/STORE SUP": "#c4b8a8",
    "POSTAL CENTER": "#cd8f62",
    "PROD-WHS SALES": "#9dba45",
    "TOYS": "#ff8f2e",
    "ELECT &PLUMBING": "#cdb53a",
    "HOUSEWARES": "#b5819f",
    "CHARITABLE CONT": "#f5a5c0",
}
NO_DEPARTMENT_COLOUR = "#e0e0e0"

# A cue that many tiles carry gets a disc of its own colour, so that "frozen" is seen before the snowflake is read.
CUE_COLOURS: dict[str, str] = {
    "2744": "#7cc7ff",  # frozen
    "1F343": "#e3f7a8",  # natural-food aisle
    "1F96B": "#ffd23f",  # in a can
    "1F525": "#4a3a5a",  # hot or smoked
    "26A1": "#a01a58",  # sports drink
}
PLAIN_CUE_COLOUR = "#ffffff"

# The 19 genres of MovieLens-100K, and the names that later MovieLens releases changed or added.
GENRE_ART: dict[str, str] = {
    "Action": "1F4A5",
    "Adventure": "1F9ED",
    "Animation": "1F42D",
    "Children's": "1F9F8",
    "Children": "1F9F8",
    "Comedy": "1F602",
    "Crime": "1F4B0",
    "Documentary": "1F3A5",
    "Drama": "1F3AD",
    "Fantasy": "1F409",
    "Film-Noir": "1F303",
    "Horror": "1F47B",
    "Musical": "1F3B5",
    "Mystery": "1F50D",
    "Romance": "2764",
    "Sci-Fi": "1F680",
    "Thriller": "1F631",
    "War": "1FA96",
    "Western": "1F920",
    "IMAX": "1F39E",
    "unknown": "2753",
    "(no genres listed)": "2753",
}
DECADE_COLOURS: dict[int, str] = {
    1900: "#bdb5a8",
    1910: "#cfc8bc",
    1920: "#e2dccb",
    1930: "#e8cf9a",
    1940: "#d9a98a",
    1950: "#f2a6a0",
    1960: "#f7c873",
    1970: "#e0e07a",
    1980: "#f2a9dc",
    1990: "#a9d3f5",
    2000: "#9fe0c0",
    2010: "#c9b8f5",
    2020: "#7fd3e8",
}
NO_DECADE_COLOUR = "#e0e0e0"


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
