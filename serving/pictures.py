"""Pixels to PNG, the same bytes every time: one picture, or a grid of them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image


def png_bytes(rgb_HWC: np.ndarray, *, scale: int = 1) -> bytes:
    """A uint8 ``[H, W, 3]`` picture as PNG, each pixel ``scale`` x ``scale`` large. No metadata, fixed compression.

    Example:
        >>> png_bytes(np.zeros((2, 2, 3), np.uint8))[:4]
        b'\\x89PNG'
    """
    picture = (
        Image.fromarray(np.ascontiguousarray(rgb_HWC), "RGB")
        if scale == 1
        else Image.fromarray(np.ascontiguousarray(rgb_HWC.repeat(scale, 0).repeat(scale, 1)), "RGB")
    )
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def grid(pictures: Sequence[np.ndarray], *, columns: int = 0, gap: int = 2) -> np.ndarray:
    """Pictures of one size on white, row by row; ``columns`` 0 makes it as square as it goes. uint8 ``[H, W, 3]``."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height, width, _ = pictures[0].shape
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet
