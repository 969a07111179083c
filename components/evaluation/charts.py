"""What a report draws: learning curves as points for inline SVG, picture grids as PNG files, tiles as data URIs."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image, ImageDraw, ImageFont

from couturier.components.data.formats import Catalogue
from couturier.components.evaluation.samples import Samples, Tile
from couturier.components.evaluation.wording import number, words
from couturier.components.files import written_beside

WIDTH, HEIGHT = 320, 150  # of a curve's drawing area, in SVG units
_POINTS = 240  # more than a small multiple can show
_INK, _SOFT, _PAPER, _COPIED, _HIT = "#16181d", "#6b7280", "#ffffff", "#d97706", "#059669"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small multiple: which curves it shows and how.

    ``series`` maps a curve's name to the words shown for it; ``wanted`` is a level drawn as a dashed line;
    ``late`` fits the axis to the later 80 % of the steps, where a loss that falls steeply at first becomes readable.
    """

    stage: str
    title: str
    series: dict[str, str]
    wanted: float | None = None
    late: bool = False


PANELS = (
    Panel(stage="codec", title="Codec: likeness to the real tile, dB", series={"codec_psnr_db": "PSNR"}, wanted=26.0),
    Panel(stage="codec", title="Picture encoder: loss", series={"eyes_loss": "loss"}, late=True),
    Panel(
        stage="sft",
        title="SFT, unseen people: nats a picture",
        series={"valid_nats": "true person", "valid_nats_wrong": "wrong person", "valid_nats_unconditional": "nobody"},
        late=True,
    ),
    Panel(
        stage="sft", title="SFT: wrong person − true person, nats", series={"valid_gap": "gap"}, wanted=0.15, late=True
    ),
    Panel(
        stage="sft",
        title="SFT: training nats a picture",
        series={"sft_nats": "next item"},
        late=True,
    ),
    Panel(
        stage="sft", title="Grounding: nats to draw what is named", series={"grounding_nats": "named item"}, late=True
    ),
    Panel(stage="rl", title="Imitation of what should be drawn: nats", series={"distil_nats": "training"}, late=True),
    Panel(stage="rl", title="RL: reward", series={"reward": "sum of all terms"}),
    Panel(
        stage="rl",
        title="RL: reward, term by term",
        series={
            f"reward_{name}": name for name in ("slate", "coverage", "future", "copying", "validity", "dissimilarity")
        },
    ),
    Panel(
        stage="rl",
        title="RL: share of drawn pictures",
        series={
            "basket_precision": "in the next basket",
            "copied": "in the history",
            "distinct": "distinct",
            "valid": "valid",
        },
    ),
    Panel(
        stage="rl",
        title="RL watch: next basket, by an encoder no reward has seen",
        series={"watch_basket_precision": "basket precision"},
    ),
    Panel(stage="rl", title="RL: drift from where GRPO began, nats a picture", series={"kl_nats": "KL"}),
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve in SVG coordinates: ``raw`` as measured, ``smooth`` a running mean (empty for a short curve)."""

    label: str
    raw: str
    smooth: str
    last: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn panel. ``y_ticks`` and ``x_ticks`` are (place in SVG units, words)."""

    stage: str
    title: str
    lines: list[Line]
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]
    wanted_y: float | None
    late: bool
    extra: bool = field(default=False)


def charts(curves: dict[str, pl.DataFrame]) -> list[Chart]:
    """Every curve of every stage: the panels above first, whatever they leave over one by one, marked ``extra``.

    Args:
        curves: stage name → frame ``step`` int, ``name`` str, ``value`` float. Values that are not finite are left out.
    """
    drawn: list[Chart] = []
    for stage, frame in curves.items():
        series = _series(frame)
        panels = [panel for panel in PANELS if panel.stage == stage]
        named = {name for panel in panels for name in panel.series}
        for name in series:
            if name not in named:
                panels.append(
                    Panel(stage=stage, title=f"{_stage_words(stage)}: {words(name)}", series={name: words(name)})
                )
        for panel in panels:
            chosen = {label: series[name] for name, label in panel.series.items() if name in series}
            if chosen:
                extra = stage != "judge" and not named & set(panel.series)
                drawn.append(_chart(panel, chosen, extra=extra))
    return drawn


def _stage_words(stage: str) -> str:
    return stage.upper() if stage in ("sft", "rl") else stage.capitalize()


def _series(frame: pl.DataFrame) -> dict[str, np.ndarray]:
    """Name → float ``[N, 2]`` of (step, value), sorted by step, in the order names first appear."""
    found = {}
    finite = frame.filter(pl.col("value").is_finite())
    for name in finite["name"].unique(maintain_order=True):
        rows = finite.filter(pl.col("name") == name).sort("step", maintain_order=True)
        found[str(name)] = rows.select(pl.col("step", "value").cast(pl.Float64)).to_numpy()
    return found


def _chart(panel: Panel, series: dict[str, np.ndarray], *, extra: bool) -> Chart:
    steps = np.concatenate([points[:, 0] for points in series.values()])
    x_low, x_high = float(steps.min()), float(steps.max())
    late_from = x_low + 0.2 * (x_high - x_low) if panel.late else x_low
    shown = np.concatenate([points[points[:, 0] >= late_from, 1] for points in series.values()])
    levels = [*shown.tolist(), *([panel.wanted] if panel.wanted is not None else [])]
    y_ticks = _ticks(min(levels), max(levels))
    y_low, y_high = min(*levels, y_ticks[0]), max(*levels, y_ticks[-1])
    if y_low == y_high:
        y_low, y_high = y_low - 0.5, y_high + 0.5

    def place(points: np.ndarray) -> str:
        x = (points[:, 0] - x_low) / max(1e-9, x_high - x_low) * WIDTH
        y = (1 - (points[:, 1] - y_low) / (y_high - y_low)) * HEIGHT
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    lines = [
        Line(label=label, raw=place(_thin(points)), smooth=place(_thin(_smooth(points))), last=float(points[-1, 1]))
        for label, points in series.items()
    ]
    height_of = {tick: (1 - (tick - y_low) / (y_high - y_low)) * HEIGHT for tick in y_ticks}
    return Chart(
        stage=panel.stage,
        title=panel.title,
        lines=lines,
        y_ticks=[(round(y, 1), number(tick, _digits(y_ticks))) for tick, y in height_of.items()],
        x_ticks=[(0.0, number(x_low, 0)), (float(WIDTH), f"{number(x_high, 0)} steps")],
        wanted_y=None if panel.wanted is None else round((1 - (panel.wanted - y_low) / (y_high - y_low)) * HEIGHT, 1),
        late=panel.late and late_from > x_low,
        extra=extra,
    )


def _ticks(low: float, high: float) -> list[float]:
    """Two to five round levels from ``low`` to ``high``."""
    if high - low < 1e-9:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    while (high - low) / step > 5:
        step *= 2.5 if round(step / 10 ** math.floor(math.log10(step))) == 2 else 2
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def _digits(ticks: list[float]) -> int:
    gap = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=abs(ticks[0]) or 1.0)
    return next((d for d in range(7) if abs(round(gap, d) - gap) < gap * 1e-3), 6)


def _smooth(points: np.ndarray) -> np.ndarray:
    """Centred running mean over about a fifteenth of a long curve; nothing for a short one."""
    if len(points) < 30:
        return points[:0]
    width = max(3, len(points) // 15) | 1
    padded = np.pad(points[:, 1], width // 2, mode="edge")
    return np.column_stack([points[:, 0], np.convolve(padded, np.ones(width) / width, mode="valid")])


def _thin(points: np.ndarray) -> np.ndarray:
    if len(points) <= _POINTS:
        return points
    return points[np.unique(np.linspace(0, len(points) - 1, _POINTS).round().astype(int))]


def data_uri(rgb_HWC: np.ndarray) -> str:
    """``rgb_HWC`` uint8 as a ``data:image/png`` address."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb_HWC)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True, kw_only=True)
class GridSize:
    """Pixels of a PNG grid."""

    tile: int = 64
    """Edge of a shown tile; tiles are scaled to it without blurring, so a whole multiple of theirs looks best."""
    across: int = 5
    down: int = 2
    gap: int = 6
    between: int = 36
    """Between the groups of one person and between people."""
    head: int = 54
    label: int = 128
    type: int = 24
    """Size of the titles; the small print has three quarters of it."""

    def shape(self, people: int, groups: int, foot: int) -> tuple[int, int]:
        """(width, height) of the whole picture with ``foot`` lines of small print."""
        width = self.label + groups * (self.group_width + self.between)
        return width, self.head + people * (self.group_height + self.between) + self.leading * foot + self.gap

    @property
    def leading(self) -> int:
        """Between lines of small print."""
        return self.type

    @property
    def group_width(self) -> int:
        return self.across * (self.tile + self.gap) - self.gap

    @property
    def group_height(self) -> int:
        return self.down * (self.tile + self.gap) - self.gap


def write_grid(
    path: Path, samples: Samples, rows: Sequence[tuple[str, str]], catalogue: Catalogue, size: GridSize | None = None
) -> None:
    """Write a PNG: a line a person, history → one group for each of ``rows`` → what really came next.

    Args:
        rows: (row of the table, words above its group). A person who lacks a row gets an empty place.
    """
    size = size or GridSize()
    titles = ["What they liked most", *(label for _, label in rows), "What came next"]
    across = 2 * len(titles) * (size.group_width + size.between) // size.leading * 10 // 9
    said = "Outlined: also in the history. Dot: in the next basket. What people took is real, the pictures are drawn."
    foot = [said, *textwrap.wrap(catalogue.attribution, across)]
    sheet = Image.new("RGB", size.shape(len(samples), len(titles), len(foot)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(size=size.type), ImageFont.load_default(size=size.type * 3 // 4)
    for column, title in enumerate(titles):
        x = size.label + column * (size.group_width + size.between)
        draw.text((x, size.head - 14), title, fill=_INK, font=font, anchor="ls")
    for line, sample in enumerate(samples):
        y = size.head + line * (size.group_height + size.between)
        middle = y + size.group_height // 2
        draw.text((size.label - 18, middle), f"Person {line + 1}", fill=_SOFT, font=small, anchor="rm")
        groups = [
            real_tiles(sample.history, catalogue),
            *(sample.rows.get(row, []) for row, _ in rows),
            real_tiles(sample.next_items, catalogue),
        ]
        for column, tiles in enumerate(groups):
            x = size.label + column * (size.group_width + size.between)
            marked = 0 < column < len(groups) - 1
            _group(sheet, draw, (x, y), tiles[: size.across * size.down], size, marked=marked)
    y = size.head + len(samples) * (size.group_height + size.between)
    for i, text in enumerate(foot):
        draw.text((size.label, y + size.leading * i), text, fill=_SOFT, font=small, anchor="la")
    with written_beside(path) as beside:
        sheet.save(beside, format="PNG")


def real_tiles(items: Sequence[int], catalogue: Catalogue) -> list[Tile]:
    """The catalogue's pictures of ``items``; padding (-1) is left out."""
    return [Tile(catalogue.rgb_IHWC[i], int(i), False, False) for i in items if i >= 0]


def _group(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    tiles: list[Tile],
    size: GridSize,
    *,
    marked: bool,
) -> None:
    for k, tile in enumerate(tiles):
        x = corner[0] + k % size.across * (size.tile + size.gap)
        y = corner[1] + k // size.across * (size.tile + size.gap)
        picture = Image.fromarray(np.ascontiguousarray(tile.rgb)).resize(
            (size.tile, size.tile), Image.Resampling.NEAREST
        )
        sheet.paste(picture, (x, y))
        if marked and tile.copied:
            draw.rectangle((x - 3, y - 3, x + size.tile + 2, y + size.tile + 2), outline=_COPIED, width=3)
        if marked and tile.hit:
            right = x + size.tile
            draw.ellipse((right - 14, y - 5, right + 5, y + 14), fill=_HIT, outline=_PAPER, width=3)
