"""Tiles that people would tell apart, and a codec that is a list of them: what evaluation must read without mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from couturier.components.data.formats import Catalogue

SHAPES, GROUNDS, SIDE = 8, 3, 32


def catalogue() -> Catalogue:
    """24 tiles: a shape (category) on a ground (department), a corner for every second one (brand)."""
    rows: list[tuple[str, str, str, str]] = []
    tiles: list[np.ndarray] = []
    for shape in range(SHAPES):
        for ground in range(GROUNDS):
            own = (shape + ground) % 2 == 0
            tiles.append(_tile(shape, ground, own=own))
            rows.append((f"item-{len(rows):02d}", f"shape {shape}", f"ground {ground}", "own" if own else "other"))
    frame = pl.DataFrame(rows, schema=["item_id", "category", "department", "brand"], orient="row")
    frame = frame.with_columns(
        pl.col("item_id").alias("title"),
        pl.col("item_id").alias("text"),
        pl.Series("purchases", np.arange(len(rows), 0, -1)),
    )
    return Catalogue(
        items=frame, rgb_IHWC=np.stack(tiles), attributes=("category", "department", "brand"), attribution="by the test"
    )


def _tile(shape: int, ground: int, *, own: bool) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5
    angle = np.pi * shape / SHAPES
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    inside = (abs(along) < 12) & (abs(across) < 4) if shape % 2 else np.hypot(along / (1 + shape / 4), across) < 6
    tile = np.full((SIDE, SIDE, 3), 0, np.uint8)
    tile[:] = [(250, 220, 180), (190, 230, 250), (210, 250, 190)][ground]
    tile[inside] = [(200, 40, 40), (40, 90, 200), (30, 140, 60), (120, 40, 160)][shape // 2]
    if own:
        tile[:8, -8:][np.triu(np.ones((8, 8), bool))] = (30, 30, 60)
    return tile


class ListCodec:
    """Code ``[i, 0]`` stands for tile ``i``, ``[i, 1]`` for its blurred copy, ``[i, 2]`` for grey mush."""

    codebook_size, codes_per_picture, picture_size = SHAPES * GROUNDS, 2, SIDE

    def __init__(self, catalogue: Catalogue) -> None:
        self.tiles = torch.from_numpy(catalogue.rgb_IHWC).permute(0, 3, 1, 2).float() / 255
        self.decoded = 0

    def encode(self, rgb_N3HW: Tensor) -> Tensor:
        nearest = torch.cdist(rgb_N3HW.flatten(1), self.tiles.flatten(1)).argmin(1)
        return torch.stack([nearest, torch.zeros_like(nearest)], 1)

    def decode(self, codes_NL: Tensor) -> Tensor:
        self.decoded += len(codes_NL)
        tiles, how = self.tiles[codes_NL[:, 0]], codes_NL[:, 1, None, None, None]
        blurred = torch.nn.functional.avg_pool2d(tiles, 3, stride=1, padding=1, count_include_pad=False)
        return torch.where(how == 0, tiles, torch.where(how == 1, blurred, torch.full_like(tiles, 0.5)))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
