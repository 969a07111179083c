"""Pictures of a few test users for the report: what they had, what each model drew, what really came next.

Kept as two files: ``samples.json`` says who and what, ``samples.safetensors`` holds the pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from couturier.components.errors import LineageError
from couturier.components.files import read_json, write_json

FACTS, PIXELS = "samples.json", "samples.safetensors"


@dataclass(frozen=True)
class Tile:
    """One picture: ``rgb`` uint8 ``[H, W, 3]``, the index of the real item it looks most like, whether that item is in
    the history (``copied``) and whether it is in the true next basket (``hit``)."""

    rgb: np.ndarray
    item: int
    copied: bool
    hit: bool


@dataclass(frozen=True)
class Sample:
    """One moment of one test user. ``history`` and ``next_items`` are item indices of the catalogue, most important
    first; ``rows`` maps a row of the table (``grpo``, ``sft``, …) to its pictures, in the order they were drawn."""

    user_id: str
    history: list[int]
    rows: dict[str, list[Tile]]
    next_items: list[int]


class Samples(list[Sample]):
    """The moments shown in a report.

    Example:
        >>> Samples([Sample("u1", [3], {"sft": []}, [4])])[0].user_id
        'u1'
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        super().__init__(samples)

    def save(self, folder: Path) -> None:
        """Write both files into ``folder``. All tiles must have one size."""
        folder.mkdir(parents=True, exist_ok=True)
        tiles = [tile for sample in self for row in sample.rows.values() for tile in row]
        pixels = np.stack([tile.rgb for tile in tiles]) if tiles else np.zeros((0, 1, 1, 3), np.uint8)
        save_file({"rgb_NHWC": np.ascontiguousarray(pixels)}, folder / PIXELS)
        write_json(folder / FACTS, [_facts(sample) for sample in self])

    @classmethod
    def load(cls, folder: Path) -> Samples:
        """The samples saved in ``folder``.

        Raises:
            LineageError: the folder holds none.
        """
        if not (folder / FACTS).exists():
            raise LineageError(f"{folder} holds no {FACTS}. Run `couturier retrain` to evaluate again.")
        pixels = iter(load_file(folder / PIXELS)["rgb_NHWC"])
        samples = cls()
        for facts in read_json(folder / FACTS):
            # JSON objects are kept with sorted names: "order" says in which order rows were drawn and saved.
            rows = {
                name: [
                    Tile(next(pixels), int(t["item"]), bool(t["copied"]), bool(t["hit"])) for t in facts["rows"][name]
                ]
                for name in facts["order"]
            }
            samples.append(Sample(facts["user_id"], facts["history"], rows, facts["next_items"]))
        return samples


def _facts(sample: Sample) -> dict[str, object]:
    rows = {
        name: [{"item": int(t.item), "copied": bool(t.copied), "hit": bool(t.hit)} for t in tiles]
        for name, tiles in sample.rows.items()
    }
    return {
        "user_id": sample.user_id,
        "history": [int(i) for i in sample.history],
        "next_items": [int(i) for i in sample.next_items],
        "order": list(sample.rows),
        "rows": rows,
    }
