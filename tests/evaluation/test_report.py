"""The report: whole, offline, escaped, and honest in its words."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from couturier.components.data.formats import Catalogue
from couturier.components.evaluation.charts import GridSize, charts
from couturier.components.evaluation.report import headline, write_report
from couturier.components.evaluation.samples import Sample, Samples, Tile
from couturier.components.evaluation.wording import METRICS, ROWS, number

HOSTILE = '<script>alert("x")</script> & \'"><img src=x onerror=alert(1)>'
EDGE, PICTURES = 8, 10


class Page(HTMLParser):
    """The tags, attributes and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def classed(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.tags if name in attributes.get("class", "").split()]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    rgb = np.random.default_rng(0).integers(0, 256, (20, EDGE, EDGE, 3), dtype=np.uint8)
    titles = [HOSTILE if i == 3 else f"Item {i}" for i in range(20)]
    items = pl.DataFrame({"item_id": [f"i{i:02}" for i in range(20)], "title": titles, "text": titles})
    return Catalogue(items=items, rgb_IHWC=rgb, attributes=(), attribution="Art: OpenMoji <CC BY-SA 4.0>, openmoji.org")


@pytest.fixture(scope="module")
def samples(catalogue: Catalogue) -> Samples:
    def tiles(start: int) -> list[Tile]:
        return [
            Tile(catalogue.rgb_IHWC[(start + k) % 20], (start + k) % 20, copied=k == 0, hit=k == 1)
            for k in range(PICTURES)
        ]

    people = range(10)
    return Samples(
        Sample(
            f"user {u} {HOSTILE}",
            [3, 4, u, -1],
            {"sft": tiles(u), "grpo": tiles(u + 1), "wrong_user": tiles(0)},
            [1, 2],
        )
        for u in people
    )


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    rows = {row: {metric: [0.1 + 0.01 * at, 0.05, 0.2] for metric in METRICS} for at, row in enumerate(ROWS)}
    rows["nearest_item_eq"]["judge"] = [float("nan")] * 3
    return {
        "table": rows,
        "differences": {
            "grpo-wrong_user:basket_precision": [0.061, 0.05, 0.07],
            "grpo-popularity:basket_precision": [-0.05, -0.06, -0.04],
            "grpo-sft_guided:basket_precision": [0.001, -0.01, 0.01],
            "grpo-sft:judge": [0.93, 0.87, 1.01],
        },
        "judge": {"gauc": 0.631, "gauc_low": 0.608, "gauc_high": 0.652, "gauc_wrong_user": [0.495, 0.47, 0.52]},
        "nll": {"true": 6.3, "wrong": 6.7, "wrong_minus_true": [0.365, 0.28, 0.45]},
        "codec": {"psnr_db": 28.45, "codes_used": 1.0},
        "acceptance": {
            "judge_gauc": {"value": 0.631, "low": 0.608, "high": 0.652, "wanted": ">= 0.60", "passed": True},
            "copied": {"value": 0.53, "low": 0.51, "high": 0.55, "wanted": "at most 0.5", "passed": False},
            "grpo-popularity_eq:basket_precision": {"value": -0.1, "wanted": "", "passed": False, "goal": True},
        },
        "seed": 7,
        "made_at": "2026-11-22 03:20 UTC",
        "machine": {"cores": 2, "system": HOSTILE, "gpu": None},
        "users": {"grpo": 1234},
        "commit": "abc1234",
    }


@pytest.fixture(scope="module")
def curves() -> dict[str, pl.DataFrame]:
    def frame(*names: str) -> pl.DataFrame:
        rows = [(step, name, 9.0 / (1 + step)) for name in names for step in range(60)]
        return pl.DataFrame(rows, schema={"step": pl.Int64, "name": pl.String, "value": pl.Float64}, orient="row")

    return {
        "codec": frame("codec_psnr_db"),
        "judge": frame("loss"),
        "sft": frame("valid_nats", "valid_nats_wrong", "valid_nats_unconditional"),
        "rl": frame(
            "reward", "reward_coverage", "kl_nats", "distinct", "copied", "watch_basket_precision", "grad_norm"
        ),
    }


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
    table: dict[str, Any],
    samples: Samples,
    curves: dict[str, pl.DataFrame],
    catalogue: Catalogue,
) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert write_report(out, table=table, samples=samples, curves=curves, catalogue=catalogue) == out / "report.html"
    return out


@pytest.fixture(scope="module")
def text(written: Path) -> str:
    return (written / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_nothing_outside_the_file_is_referred_to(text: str, page: Page) -> None:
    assert not page.all("link") and not page.all("iframe")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert not [attributes for _, attributes in page.tags if "href" in attributes or "srcset" in attributes]
    assert not re.search(r"https?://|@import|url\(|//[a-z]+\.", text)
    assert all("src" not in script for script in page.all("script"))


def test_the_policy_lets_the_pages_own_script_run_and_no_other(text: str, page: Page) -> None:
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_every_row_and_metric_is_there(page: Page) -> None:
    assert {row["data-row"] for row in page.all("tr") if "data-row" in row} == set(ROWS)
    for words, meaning, _ in METRICS.values():
        assert words in page.words
        assert any(button.get("title", "").startswith(meaning) for button in page.all("button"))
    assert any(span.get("title", "").endswith("Measured on 1,234 people.") for span in page.all("span"))
    assert sum("data-v" in cell for cell in page.all("td")) == len(ROWS) * len(METRICS) - 1  # one is no number


def test_the_best_is_marked_by_its_direction_and_the_oracle_does_not_compete(text: str) -> None:
    cells = {row: body for row, body in re.findall(r'<tr data-row="(\w+)">(.*?)</tr>', text, re.DOTALL)}
    best = {
        row: [n for n, cell in enumerate(re.findall(r"<td.*?>", body)) if "best" in cell] for row, body in cells.items()
    }
    names = list(METRICS)
    rising = [n for n, name in enumerate(names) if METRICS[name][2] == 1 and name != "judge"]
    falling = [n for n, name in enumerate(names) if METRICS[name][2] == -1]
    assert best["oracle"] == [] and best["grpo"] == falling and best["nearest_item_eq"] == rising


def test_hostile_words_stay_words(text: str, page: Page) -> None:
    assert "onerror" not in {name for _, attributes in page.tags for name in attributes}
    assert len(page.all("script")) == 1 and HOSTILE not in text
    assert HOSTILE in page.words  # the machine and the user ids, as written
    assert any(HOSTILE in image["title"] for image in page.all("img"))
    assert "<CC BY-SA 4.0>, openmoji.org" in page.words


def test_promises_kept_and_missed_are_both_shown(page: Page) -> None:
    assert len(page.classed("pass")) == 1 and len(page.classed("miss")) == 1
    assert (
        "1 of 2 promises are kept" in page.words
        and "wanted: at most 0.5" in page.words
        and "0 of 1 open goals is reached" in page.words
    )


def test_a_claim_is_made_only_where_the_interval_allows_it(table: dict[str, Any]) -> None:
    said = {sentence: verdict for verdict, sentence in headline(table)}
    assert said["The right person's history beats a wrong person's history by +.061 [.050, .070]."] == "yes"
    assert said["GRPO loses to popularity: −.050 [−.060, −.040]."] == "no"
    assert said["GRPO and guided SFT are not told apart: +.001 [−.010, .010]."] == "open"
    rows = [row for sentence in said for row in ("wrong person's", "guided SFT", "popularity") if row in sentence]
    assert rows == ["wrong person's", "wrong person's", "guided SFT", "popularity"]  # the nearest rivals first
    chance = headline({"judge": {"gauc": [0.52, 0.49, 0.55]}})
    assert chance == [
        ("open", "The judge ranks what a person takes next at GAUC .520 [.490, .550], not proven better than chance.")
    ]


def test_a_person_is_a_line_with_marks_on_drawn_tiles_only(page: Page) -> None:
    assert len(page.classed("person")) == 10
    assert len(page.classed("batch")) == 10 * 5  # liked, two models, next; a further row to compare with
    drawn = 10 * 3
    tiles = page.classed("tile")
    assert sum("copied" in tile["class"] for tile in tiles) == sum("hit" in tile["class"] for tile in tiles) == drawn
    assert len(tiles) == drawn * PICTURES + 10 * (3 + 2)  # the padding of a history is left out


def test_tiles_are_the_pictures_bit_for_bit(page: Page, catalogue: Catalogue) -> None:
    first = page.all("img")[0]["src"].removeprefix("data:image/png;base64,")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(first)))), catalogue.rgb_IHWC[3])


def test_curves_are_drawn_and_the_rest_is_folded_away(page: Page, curves: dict[str, pl.DataFrame]) -> None:
    drawn = charts(curves)
    assert len(page.all("figure")) == len(drawn) == 9
    assert [chart.title for chart in drawn if chart.extra] == ["RL: grad norm"]
    points = [tuple(map(float, point.split(","))) for point in drawn[0].lines[0].raw.split()]
    assert points[0][0] == 0 and points[-1][0] == 320 and points[0][1] < points[-1][1]  # falls: down is larger


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 1e-7], [-1e9, 1e9], [float("nan"), 3.0]])
def test_any_curve_can_be_drawn(values: list[float]) -> None:
    frame = pl.DataFrame({"step": range(len(values)), "name": ["loss"] * len(values), "value": values})
    (chart,) = charts({"judge": frame})
    assert all(-0.2 <= place <= 150.2 for place, _ in chart.y_ticks) and len(chart.y_ticks) <= 6


def test_a_bare_table_is_enough(tmp_path: Path, catalogue: Catalogue) -> None:
    bare = {"table": {"grpo": {"basket_precision": [0.1, 0.09, 0.11], "made up": None}, "a new row": {}}}
    page = Page(write_report(tmp_path, table=bare, samples=Samples(), curves={}, catalogue=catalogue).read_text())
    assert not (tmp_path / "grids").exists() and not page.classed("person") and not page.all("figure")
    assert "a new row" in page.words and "made up" in page.words and "promises" not in page.words


def test_grids_are_pictures_of_the_size_they_say(written: Path, samples: Samples, catalogue: Catalogue) -> None:
    size = GridSize()
    found = {path.name: Image.open(path) for path in (written / "grids").iterdir()}
    assert set(found) == {"personal.png", "sft.png", "grpo.png", "wrong_user.png"}
    for name, groups in {"personal.png": 4, "grpo.png": 3}.items():
        assert found[name].format == "PNG" and found[name].size == size.shape(8, groups, foot=2)
    grid = np.asarray(found["personal.png"])
    corner = grid[size.head : size.head + size.tile, size.label : size.label + size.tile]
    factor = size.tile // EDGE
    assert np.array_equal(corner[::factor, ::factor], catalogue.rgb_IHWC[samples[0].history[0]])


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.1074, ".107"), (-0.02, "−.020"), (12.345, "12.35"), (123.4, "123.4"), (0.0, "0"), (-0.0001, "0"), (None, "–")],
)
def test_figures_read_as_people_write_them(value: float | None, shown: str) -> None:
    assert number(value) == shown
