"""The page that says what a run proved: one HTML file that opens offline, and picture grids as PNG files.

table.json ─┐
samples ────┼─▶ words and figures ─▶ report.html (pictures inside as data URIs, no address outside it)
curves ─────┘                    └▶ grids/*.png
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, StrictUndefined

from couturier.components.data.formats import Catalogue
from couturier.components.evaluation.charts import (
    HEIGHT,
    WIDTH,
    charts,
    data_uri,
    number,
    real_tiles,
    words,
    write_grid,
)
from couturier.components.evaluation.samples import Sample, Samples, Tile
from couturier.components.evaluation.wording import GROUPS, METRICS, ROWS, SPOKEN
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
    shown = Samples(samples[:PEOPLE])
    if shown:
        _write_grids(out / GRIDS, shown, catalogue)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"sha256": _sha256, "number": number}
    source = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    drawn = charts(curves)
    page = environment.from_string(source).render(
        headline=headline(table),
        acceptance=_acceptance(table.get("acceptance", {})),
        columns=_columns(table["table"]),
        groups=_groups(table["table"]),
        differences=_differences(table.get("differences", {})),
        figures=_figures(table),
        charts=[chart for chart in drawn if not chart.extra],
        more_charts=[chart for chart in drawn if chart.extra],
        plot=(WIDTH, HEIGHT),
        people=_people(shown, catalogue),
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
    nll = table.get("nll", {})
    if (gap := _triple(nll.get("wrong_minus_true", nll.get("gap")))) is not None:
        verdict = _verdict(gap)
        proven = {
            "yes": "The history matters",
            "no": "The history misleads",
            "open": "The history is not proven to matter",
        }
        said.append(
            (verdict, f"{proven[verdict]}: a wrong person's costs {_span(gap)} nats a picture more than one's own.")
        )
    for name, value in table.get("differences", {}).items():
        found, triple = _parse_difference(name), _triple(value)
        if found is None or triple is None or found[2] not in ("", "basket_precision"):
            continue
        verdict = _verdict(triple)
        said.append((verdict, f"{_outcome(found[0], found[1], verdict)} {_span(triple)}."))
    judge = table.get("judge", {})
    if (gauc := _triple(judge.get("gauc"))) is not None:
        own = _triple((gauc[0] - 0.5, gauc[1] - 0.5, gauc[2] - 0.5)) or gauc
        tail = "better than chance" if _verdict(own) == "yes" else "not proven better than chance"
        said.append(
            (_verdict(own), f"The judge ranks what a person takes next at GAUC {_span(gauc, signed=False)}, {tail}.")
        )
    return said


def _outcome(left: str, right: str, verdict: str) -> str:
    """Who wins, in words: ``yes`` the left row, ``no`` the right row, ``open`` neither is shown to."""
    if left == "grpo" and right == "wrong_user":
        a, b = "the right person's history", "a wrong person's"
    else:
        a, b = (SPOKEN.get(row, _row_words(row)) for row in (left, right))
    told = {"yes": f"{a} beats {b} by", "no": f"{a} loses to {b}:", "open": f"{a} and {b} are not told apart:"}
    text = told[verdict]
    return text[:1].upper() + text[1:]


def _acceptance(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Chips, misses first: what was promised, what was measured, whether it holds."""
    chips = [
        {
            "words": _name_words(name),
            "value": _plain(entry.get("value")),
            "interval": _interval(_triple([entry.get("value"), entry.get("low"), entry.get("high")])),
            "wanted": _plain(entry.get("wanted")).replace("<=", "≤").replace(">=", "≥"),
            "passed": bool(entry.get("passed")),
        }
        for name, entry in found.items()
    ]
    return sorted(chips, key=lambda chip: chip["passed"])


def _columns(table: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The metrics that any row has, known ones first, with their words."""
    present = list(dict.fromkeys(name for row in table.values() for name in row))
    order = [name for name in METRICS if name in present] + [name for name in present if name not in METRICS]
    return [dict(zip(("name", "words", "means", "better"), (name, *_metric(name)), strict=True)) for name in order]


def _groups(table: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows by group, each with a cell a metric. The best of a column is marked; the upper bound does not compete."""
    columns = [column["name"] for column in _columns(table)]
    best, digits = {}, {}
    for name in columns:
        means = {row: triple[0] for row, cells in table.items() if (triple := _triple(cells.get(name))) is not None}
        digits[name] = 3 if max((abs(mean) for mean in means.values()), default=0) < 10 else 1
        better = _metric(name)[2]
        racing = [mean * better for row, mean in means.items() if _row(row)[2] != "oracle"]
        best[name] = max(racing) * better if racing and better else None
    found: dict[str, dict[str, Any]] = {key: {"key": key, "words": text, "rows": []} for key, text in GROUPS.items()}
    for name in [*(row for row in ROWS if row in table), *(row for row in table if row not in ROWS)]:
        text, means_, group = _row(name)
        cells = [_cell(table[name].get(c), digits[c], best[c] if group != "oracle" else None) for c in columns]
        found[group]["rows"].append({"name": name, "words": text, "means": means_, "cells": cells})
    return [group for group in found.values() if group["rows"]]


def _cell(value: Any, digits: int, best: float | None) -> Cell:
    triple = _triple(value)
    if triple is None:
        return Cell("–", "", None, False)
    return Cell(number(triple[0], digits), _interval(triple, digits), triple[0], best is not None and triple[0] == best)


def _differences(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Paired differences, a block a metric, each drawn as an interval on one axis around zero."""
    blocks: dict[str, list[tuple[str, tuple[float, float, float]]]] = {}
    for name, value in _flat(found).items():
        triple, parsed = _triple(value), _parse_difference(name)
        if triple is not None:
            title = f"{_row_words(parsed[0])} − {_row_words(parsed[1])}" if parsed else words(name)
            blocks.setdefault(_metric(parsed[2])[0] if parsed and parsed[2] else "", []).append((title, triple))
    drawn = []
    for metric, lines in blocks.items():
        low, high = min(0.0, *(t[1] for _, t in lines)), max(0.0, *(t[2] for _, t in lines))
        low, high = low - 0.04 * (high - low or 1), high + 0.04 * (high - low or 1)

        def place(value: float, low: float = low, high: float = high) -> float:
            return round((value - low) / (high - low) * 100, 2)

        drawn.append(
            {
                "metric": metric,
                "lines": [
                    Difference(
                        words=title,
                        text=number(t[0], signed=True),
                        interval=_interval(t),
                        verdict=_verdict(t),
                        low=place(t[1]),
                        high=place(t[2]),
                        mean=place(t[0]),
                        zero=place(0.0),
                    )
                    for title, t in lines
                ],
            }
        )
    return drawn


def _figures(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The judge's, the language model's and the codec's own figures, as lists of (words, figure, interval)."""
    titles = {"codec": "Codec", "nll": "Nats a picture, unseen people", "judge": "Judge"}
    blocks = []
    for key, title in titles.items():
        lines = []
        for name, value in _flat(table.get(key) or {}).items():
            triple = _triple(value)
            lines.append(
                (_name_words(name), number(triple[0]), _interval(triple))
                if triple
                else (words(name), _plain(value), "")
            )
        if lines:
            blocks.append({"title": title, "lines": lines})
    return blocks


def _facts(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    asked = {"seed": "Seed", "made_at": "Made", "machine": "Machine", "commit": "Commit"}
    return [(text, _plain(table[key])) for key, text in asked.items() if table.get(key) not in (None, "")]


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
        row: {"words": _row_words(row), "kind": "drawn", "tiles": [tile(t, "most like: {}") for t in sample.rows[row]]}
        for row in rows
        if row in sample.rows
    }
    told = _teaser(list(drawn))
    more = f", {TILES} of {len(sample.next_items)}" if len(sample.next_items) > TILES else ""
    story = [
        {"words": "What they liked", "kind": "real", "tiles": had},
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
    write_grid(folder / "personal.png", samples, [(row, _row_words(row)) for row in _teaser(held)], catalogue)
    for row in held:
        write_grid(folder / f"{row}.png", samples, [(row, _row_words(row))], catalogue)


def _row(name: str) -> tuple[str, str, str]:
    return ROWS.get(name, (words(name), "A further row of this run.", "controls"))


def _row_words(name: str) -> str:
    return _row(name)[0]


def _metric(name: str) -> tuple[str, str, int]:
    return METRICS.get(name, (words(name), "A further figure of this run.", 0))


def _name_words(name: str) -> str:
    """Words for a name of ``acceptance``, ``judge``, ``nll`` or ``codec``: a difference, a metric, or the name itself."""
    if (parsed := _parse_difference(name)) is not None:
        metric = _metric(parsed[2])[0].lower() if parsed[2] else ""
        return f"{_row_words(parsed[0])} − {_row_words(parsed[1])}" + (f", {metric}" if metric else "")
    text = words(name)
    for short in ("nll", "rl", "sft", "grpo", "psnr", "gauc"):
        text = re.sub(rf"\b{short}\b", short.upper(), text)
    return text[:1].upper() + text[1:]


_DIFFERENCE = re.compile(
    r"(?:(?P<before>[\w@]+)[:/.\s]+)?(?P<left>\w+?)(?:_minus_|_vs_|\s*[-−–]\s*|\s+(?:minus|vs)\s+)(?P<right>\w+?)"
    r"(?:[:/.\s]+(?P<after>[\w@]+))?"
)


def _parse_difference(name: str) -> tuple[str, str, str] | None:
    """``grpo-sft:basket_precision`` or ``grpo_minus_sft`` → (left row, right row, metric or nothing)."""
    match = _DIFFERENCE.fullmatch(name)
    if match is None:
        return None
    right, metric = match["right"], match["after"] or match["before"] or ""
    if not metric and right not in ROWS:
        metric = next((known for known in METRICS if right.endswith("_" + known)), "")
        right = right.removesuffix("_" + metric) if metric else right
    return match["left"], right, metric


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by a colon."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}:") if isinstance(value, Mapping) else {before + name: value}
    return flat


def _triple(value: Any) -> tuple[float, float, float] | None:
    """(mean, low, high) of a list of three or a lone number; None for anything else or a figure that is no number."""
    parts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value, value]
    numbers = [float(p) for p in parts if isinstance(p, int | float) and not isinstance(p, bool) and math.isfinite(p)]
    return (numbers[0], numbers[1], numbers[2]) if len(parts) == len(numbers) == 3 else None


def _verdict(triple: tuple[float, float, float]) -> str:
    return "yes" if triple[1] > 0 else "no" if triple[2] < 0 else "open"


def _interval(triple: tuple[float, float, float] | None, digits: int | None = None) -> str:
    """``[low, high]``, or nothing where there is no interval to show."""
    if triple is None or triple[1] == triple[2]:
        return ""
    return f"[{number(triple[1], digits)}, {number(triple[2], digits)}]"


def _span(triple: tuple[float, float, float], *, signed: bool = True) -> str:
    return f"{number(triple[0], signed=signed)} {_interval(triple)}".strip()


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, int | float) else "–" if value is None else str(value)


def _sha256(text: str) -> str:
    """The digest that a content security policy names an inline script by."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
