"""The page that says what a run proved: one HTML file that opens offline, and picture grids as PNG files.

table.json ─┐
samples ────┼─▶ words and figures ─▶ report.html (pictures inside as data URIs, no address outside it)
curves ─────┘                    └▶ grids/*.png
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, StrictUndefined

from couturier.components.data.formats import Catalogue
from couturier.components.evaluation import wording
from couturier.components.evaluation.charts import (
    HEIGHT,
    WIDTH,
    charts,
    data_uri,
    real_tiles,
    write_grid,
)
from couturier.components.evaluation.samples import Sample, Samples, Tile
from couturier.components.evaluation.wording import (
    GROUPS,
    METRICS,
    ROWS,
    SPOKEN,
    Triple,
    interval,
    number,
    plain,
    span,
    triple,
)
from couturier.components.files import written_beside

PAGE, GRIDS, PEOPLE, TILES = "report.html", "grids", 8, 10

GRID_ROWS = ("sft", "grpo", "grpo_guided", "sft_guided", "best_of_n")
TEASER = ("sft", "grpo", "sft_guided")


@dataclass(frozen=True)
class Cell:
    """One figure of the table: ``text`` and ``interval`` are shown, ``order`` is sorted by."""

    text: str
    interval: str
    order: float | None
    best: bool


@dataclass(frozen=True)
class Difference:
    """A paired difference in words; places are per cent of the interval plot's width."""

    words: str
    text: str
    interval: str
    verdict: str
    low: float
    high: float
    mean: float
    zero: float


def write_report(
    out: Path,
    *,
    table: dict[str, Any],
    samples: Samples,
    curves: dict[str, pl.DataFrame],
    catalogue: Catalogue,
) -> Path:
    """Write ``report.html`` and ``grids/*.png`` into ``out``.

    Args:
        table: what ``table.json`` holds. Only ``table`` must be there; a part that is missing is left off the page.
        samples: the people shown; the first eight are in the grids.
        curves: ``codec``, ``judge``, ``sft``, ``rl`` → frame ``step``, ``name``, ``value``; any may be missing.

    Returns:
        The page's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    if samples:
        _write_grids(out / GRIDS, Samples(samples[:PEOPLE]), catalogue)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"sha256": _sha256, "number": number}
    source = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    drawn = charts(curves)
    page = environment.from_string(source).render(
        headline=headline(table),
        acceptance=_acceptance(table.get("acceptance", {})),
        columns=_columns(table["table"]),
        groups=_groups(table["table"], table.get("users", {})),
        differences=_differences(table.get("differences", {})),
        figures=_figures(table),
        charts=[chart for chart in drawn if not chart.extra],
        more_charts=[chart for chart in drawn if chart.extra],
        plot=(WIDTH, HEIGHT),
        people=_people(samples, catalogue),
        items=len(catalogue),
        attribution=catalogue.attribution,
        facts=_facts(table),
    )
    with written_beside(out / PAGE) as beside:
        beside.write_text(page, encoding="utf-8")
    return out / PAGE


def headline(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was proven and what was not, one sentence each, with its interval: (``yes``/``no``/``open``, sentence)."""
    said = []
    if (gap := triple(table.get("nll", {}).get("wrong_minus_true"))) is not None:
        found = wording.verdict(gap)
        proven = {"yes": "matters", "no": "misleads", "open": "is not proven to matter"}[found]
        said.append((found, f"The history {proven}: a wrong person's costs {span(gap)} nats a picture over one's own."))
    for name, value in _told(table.get("differences", {})):
        parts, difference = wording.pair(name), triple(value)
        if parts is not None and difference is not None and parts[2] == "basket_precision":
            found = wording.verdict(difference)
            said.append((found, f"{_outcome(parts[0], parts[1], found)} {span(difference)}."))
    if (gauc := triple(wording.figures(table.get("judge", {})).get("gauc"))) is not None:
        found = wording.verdict((gauc[0] - 0.5, gauc[1] - 0.5, gauc[2] - 0.5))
        than = {"yes": "better than chance", "no": "worse than chance", "open": "not proven better than chance"}[found]
        said.append((found, f"The judge ranks what a person takes next at GAUC {span(gauc, signed=False)}, {than}."))
    return said


def _told(differences: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """In the order of the story: by metric, what GRPO does first, against its nearest rivals first."""
    rivals, metrics = ("wrong_user", "sft", "unconditional", *ROWS), list(METRICS)

    def place(item: tuple[str, Any]) -> tuple[int, bool, int]:
        parts = wording.pair(item[0])
        if parts is None:
            return len(metrics), True, 0
        metric = metrics.index(parts[2]) if parts[2] in metrics else len(metrics)
        return metric, parts[0] != "grpo", rivals.index(parts[1]) if parts[1] in rivals else len(rivals)

    return sorted(differences.items(), key=place)


def _outcome(left: str, right: str, verdict: str) -> str:
    """Who wins, in words: ``yes`` the left row, ``no`` the right row, ``open`` neither is shown to."""
    a, b = (SPOKEN.get(row, wording.row(row)[0]) for row in (left, right))
    if (left, right) == ("grpo", "wrong_user"):
        a = "the right person's history"
    told = {"yes": f"{a} beats {b} by", "no": f"{a} loses to {b}:", "open": f"{a} and {b} are not told apart:"}
    return told[verdict][:1].upper() + told[verdict][1:]


def _acceptance(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Chips, misses first: what was wanted, what was measured, whether it holds. Open goals are no promises."""
    chips = []
    for name, entry in found.items():
        passed, goal = bool(entry.get("passed")), bool(entry.get("goal"))
        chips.append(
            {
                "words": wording.title(name),
                "value": plain(entry.get("value")),
                "interval": interval(triple([entry.get("value"), entry.get("low"), entry.get("high")])),
                "wanted": plain(entry.get("wanted")),
                "passed": passed,
                "goal": goal,
                "state": ("pass" if passed else "miss") if not goal else "reached" if passed else "open",
            }
        )
    return sorted(chips, key=lambda chip: ("miss", "pass", "reached", "open").index(chip["state"]))


def _columns(table: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The metrics that any row has, known ones first, with their words."""
    present = list(dict.fromkeys(name for row in table.values() for name in row))
    order = [name for name in METRICS if name in present] + [name for name in present if name not in METRICS]
    return [
        dict(zip(("name", "words", "means", "better"), (name, *wording.metric(name)), strict=True)) for name in order
    ]


def _groups(table: Mapping[str, Mapping[str, Any]], people: Mapping[str, int]) -> list[dict[str, Any]]:
    """The rows by group, each with a cell a metric. A column's best is marked; the upper bound does not compete."""
    columns = [column["name"] for column in _columns(table)]
    best, digits = {}, {}
    for name in columns:
        means = {row: known[0] for row, cells in table.items() if (known := triple(cells.get(name))) is not None}
        digits[name] = 3 if max((abs(mean) for mean in means.values()), default=0) < 10 else 1
        better = wording.metric(name)[2]
        racing = [mean * better for row, mean in means.items() if wording.row(row)[2] != "oracle"]
        best[name] = max(racing) * better if racing and better else None
    found: dict[str, dict[str, Any]] = {key: {"key": key, "words": text, "rows": []} for key, text in GROUPS.items()}
    for name in [*(row for row in ROWS if row in table), *(row for row in table if row not in ROWS)]:
        text, meaning, group = wording.row(name)
        meaning += f" Measured on {people[name]:,} people." if name in people else ""
        cells = [_cell(table[name].get(c), digits[c], best[c] if group != "oracle" else None) for c in columns]
        found[group]["rows"].append({"name": name, "words": text, "means": meaning, "cells": cells})
    return [group for group in found.values() if group["rows"]]


def _cell(value: Any, digits: int, best: float | None) -> Cell:
    known = triple(value)
    if known is None:
        return Cell("–", "", None, False)
    return Cell(number(known[0], digits), interval(known, digits), known[0], best is not None and known[0] == best)


def _differences(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Paired differences, a block a metric, each drawn as an interval on one axis around zero."""
    blocks: dict[str, list[tuple[str, Triple]]] = {}
    for name, value in _told(found):
        known, parts = triple(value), wording.pair(name)
        if known is not None:
            text = f"{wording.row(parts[0])[0]} − {wording.row(parts[1])[0]}" if parts else wording.title(name)
            blocks.setdefault(wording.metric(parts[2])[0] if parts else "", []).append((text, known))
    return [{"metric": metric, "lines": _forest(lines)} for metric, lines in blocks.items()]


def _forest(lines: list[tuple[str, Triple]]) -> list[Difference]:
    low, high = min(0.0, *(known[1] for _, known in lines)), max(0.0, *(known[2] for _, known in lines))
    margin = 0.04 * (high - low or 1)
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return round((value - low) / (high - low) * 100, 2)

    return [
        Difference(
            words=text,
            text=number(known[0], signed=True),
            interval=interval(known),
            verdict=wording.verdict(known),
            low=place(known[1]),
            high=place(known[2]),
            mean=place(known[0]),
            zero=place(0.0),
        )
        for text, known in lines
    ]


def _figures(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The codec's, the language model's and the judge's own figures, as lists of (words, figure, interval)."""
    titles = {"codec": "Codec", "nll": "Nats a picture, unseen people", "judge": "Judge"}
    blocks = []
    for key, heading in titles.items():
        lines = []
        for name, value in wording.figures(table.get(key) or {}).items():
            known = triple(value)
            lines.append((wording.title(name), number(known[0]) if known else plain(value), interval(known)))
        if lines:
            blocks.append({"title": heading, "lines": lines})
    return blocks


def _facts(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    asked = {
        "windows": "Moments evaluated",
        "method": "Aligned by (the rows named GRPO)",
        "encoder": "Independent encoder",
        "seed": "Seed",
        "made_at": "Made",
        "machine": "Machine",
        "commit": "Commit",
    }
    return [(text, plain(table[key])) for key, text in asked.items() if table.get(key) not in (None, "")]


def _people(samples: Samples, catalogue: Catalogue) -> list[dict[str, Any]]:
    """A line a person: titled groups of tiles, from what they had to what came next."""
    titles = catalogue.items["title"].to_list()
    rows = _grid_rows(samples)
    return [{"user": sample.user_id} | _person(sample, rows, titles, catalogue) for sample in samples]


def _person(sample: Sample, rows: Sequence[str], titles: list[str], catalogue: Catalogue) -> dict[str, Any]:
    """``groups`` tell the story of one line; ``further`` are rows to compare it with."""

    def tile(tile: Tile, said: str, *, marked: bool = True) -> dict[str, Any]:
        notes = [said.format(titles[tile.item])]
        notes += ["also in the history"] if marked and tile.copied else []
        notes += ["in the next basket"] if marked and tile.hit else []
        copied, hit = marked and tile.copied, marked and tile.hit
        return {"uri": data_uri(tile.rgb), "title": " · ".join(notes), "copied": copied, "hit": hit}

    had = [tile(t, "{}", marked=False) for t in real_tiles(sample.history, catalogue)]
    took = [tile(t, "{}", marked=False) for t in real_tiles(sample.next_items[:TILES], catalogue)]
    drawn = {
        row: {
            "words": wording.row(row)[0],
            "kind": "drawn",
            "tiles": [tile(t, "most like: {}") for t in sample.rows[row]],
        }
        for row in rows
        if row in sample.rows
    }
    told = _teaser(list(drawn))
    more = f", {TILES} of {len(sample.next_items)}" if len(sample.next_items) > TILES else ""
    story = [
        {"words": "What they liked most", "kind": "real", "tiles": had},
        *(drawn[row] for row in told),
        {"words": f"What came next{more}", "kind": "real", "tiles": took},
    ]
    return {"groups": story, "further": [group for row, group in drawn.items() if row not in told]}


def _grid_rows(samples: Samples) -> list[str]:
    """Rows of the table that the samples hold pictures for, the story's order first."""
    held = list(dict.fromkeys(row for sample in samples for row in sample.rows))
    return [row for row in GRID_ROWS if row in held] + [row for row in held if row not in GRID_ROWS]


def _teaser(held: list[str]) -> list[str]:
    """The rows that stand between a history and what came next; others follow after."""
    return [row for row in TEASER if row in held] or held[:3]


def _write_grids(folder: Path, samples: Samples, catalogue: Catalogue) -> None:
    held = _grid_rows(samples)
    write_grid(folder / "personal.png", samples, [(row, wording.row(row)[0]) for row in _teaser(held)], catalogue)
    for row in held:
        write_grid(folder / f"{row}.png", samples, [(row, wording.row(row)[0])], catalogue)


def _sha256(text: str) -> str:
    """The digest that a content security policy names an inline script by."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
