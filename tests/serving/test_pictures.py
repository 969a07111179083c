import io

import numpy as np
from PIL import Image

from couturier.serving.pictures import grid, png_bytes


def test_png_keeps_every_pixel_and_every_byte():
    rgb_HWC = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    png = png_bytes(rgb_HWC)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), rgb_HWC)
    assert png == png_bytes(rgb_HWC.copy())
    assert Image.open(io.BytesIO(png)).info == {}, "a picture carries no metadata"


def test_scaling_repeats_pixels():
    rgb_HWC = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = np.asarray(Image.open(io.BytesIO(png_bytes(rgb_HWC, scale=3))))
    assert large.shape == (6, 6, 3) and np.array_equal(large[::3, ::3], rgb_HWC)


def test_grid_places_pictures_row_by_row():
    pictures = [np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)]
    sheet = grid(pictures, columns=3, gap=2)
    assert sheet.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    assert [sheet[2 + 6 * (i // 3), 2 + 6 * (i % 3), 0] for i in range(5)] == [10, 20, 30, 40, 50]
    assert (sheet[8:, 14:] == 255).all(), "the place of a sixth picture stays white"
