"""What the report is given comes back from disk as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from couturier.components.errors import LineageError
from couturier.components.evaluation.samples import Sample, Samples, Tile


def _tile(seed: int) -> Tile:
    rgb = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Tile(rgb, item=seed, copied=seed % 2 == 0, hit=seed % 3 == 0)


def test_people_and_pictures_come_back_in_order(tmp_path: Path) -> None:
    rows = {"sft": [_tile(1), _tile(2)], "grpo": [_tile(3)], "a row without pictures": []}
    samples = Samples([Sample("käte/7", [5, 2, 9], rows, [1, 4]), Sample("", [], {"grpo": [_tile(6)]}, [])])
    samples.save(tmp_path)
    found = Samples.load(tmp_path)
    assert [(s.user_id, s.history, s.next_items, list(s.rows)) for s in found] == [
        (s.user_id, s.history, s.next_items, list(s.rows)) for s in samples
    ]
    for mine, saved in zip(samples, found, strict=True):
        for name, tiles in mine.rows.items():
            for tile, other in zip(tiles, saved.rows[name], strict=True):
                assert (tile.item, tile.copied, tile.hit) == (other.item, other.copied, other.hit)
                assert np.array_equal(tile.rgb, other.rgb)


def test_nobody_is_fine_and_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="retrain"):
        Samples.load(tmp_path)
    Samples().save(tmp_path)
    assert Samples.load(tmp_path) == []
