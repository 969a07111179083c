"""The tables every room speaks: the raw contract form, the catalogue, and the training windows.

Raw form, in ``data/`` (what an adapter writes) and again in the ``validate`` artifact (what the contract kept):

* ``events.parquet``: ``user_id`` str, ``item_id`` str, ``timestamp`` datetime[us, UTC], ``kind`` str, ``value`` f64,
  ``quantity`` f64 (optional), ``group_id`` str (optional: events that happened together, such as a basket).
* ``items.parquet``: ``item_id`` str, ``title`` str, ``text`` str, and any further string columns as attributes.
* ``pictures.parquet``: ``item_id`` str, ``height`` i32, ``width`` i32, ``rgb`` binary (row-major HWC bytes; null when
  the picture could not be decoded), ``error`` str (null when it could).
* ``users.parquet``: ``user_id`` str and any string columns (demographics; may have none).
* ``meta.json``: ``adapter``, ``settings``, ``attributes`` (list of item columns), ``rows`` per table, ``attribution``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from safetensors.numpy import load_file, save_file

from couturier.components.errors import DataError
from couturier.components.files import read_json, write_json

EVENTS, ITEMS, PICTURES, USERS, META = (
    "events.parquet",
    "items.parquet",
    "pictures.parquet",
    "users.parquet",
    "meta.json",
)
EVENT_COLUMNS = {
    "user_id": pl.String,
    "item_id": pl.String,
    "timestamp": pl.Datetime("us", "UTC"),
    "kind": pl.String,
    "value": pl.Float64,
}
SPLITS = ("train", "valid", "test", "latest")  # latest: every user at the end of the log, no target


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Items a model may draw; row ``i`` of everything is item index ``i``, sorted by ``item_id``.

    ``items`` has item_id, title, text, the ``attributes`` columns and ``purchases`` (training events);
    ``rgb_IHWC`` uint8 ``[I, H, W, 3]``; ``attribution`` is the credit line to show wherever pictures are shown.
    """

    items: pl.DataFrame
    rgb_IHWC: np.ndarray
    attributes: tuple[str, ...]
    attribution: str

    def __len__(self) -> int:
        return self.items.height

    @property
    def item_ids(self) -> list[str]:
        return self.items["item_id"].to_list()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.items.write_parquet(folder / "catalogue.parquet")
        save_file({"rgb_IHWC": np.ascontiguousarray(self.rgb_IHWC)}, folder / "pictures.safetensors")
        write_json(folder / "catalogue.json", {"attributes": list(self.attributes), "attribution": self.attribution})

    @classmethod
    def load(cls, folder: Path) -> Catalogue:
        facts = read_json(folder / "catalogue.json")
        return cls(
            items=pl.read_parquet(folder / "catalogue.parquet"),
            rgb_IHWC=load_file(folder / "pictures.safetensors")["rgb_IHWC"],
            attributes=tuple(facts["attributes"]),
            attribution=facts["attribution"],
        )


@dataclass(frozen=True, kw_only=True)
class Windows:
    """``W`` moments: what a person had done before, and what they took next. Item indices; -1 pads on the right.

    favourites_WK  int32, items of earlier groups by falling recency-decayed count (the history a model sees)
    weight_WK      float32, that decayed count;  age_days_WK float32, days since the item was last taken
    recent_WK      int32, the last distinct items, newest first
    basket, basket_offsets    jagged int32 / int64 ``[W + 1]``: items of the next group, order shuffled by seed
    future, future_offsets    jagged: items of the following groups (after the next one), for the reward only
    user_W         int32, index into ``users`` (str ids);  time_W int64, microseconds since 1970 of the next group
    """

    users: list[str]
    user_W: np.ndarray
    time_W: np.ndarray
    favourites_WK: np.ndarray
    weight_WK: np.ndarray
    age_days_WK: np.ndarray
    recent_WK: np.ndarray
    basket: np.ndarray
    basket_offsets: np.ndarray
    future: np.ndarray
    future_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.user_W)

    def basket_of(self, window: int) -> np.ndarray:
        return self.basket[self.basket_offsets[window] : self.basket_offsets[window + 1]]

    def future_of(self, window: int) -> np.ndarray:
        return self.future[self.future_offsets[window] : self.future_offsets[window + 1]]

    def save(self, folder: Path, split: str) -> None:
        arrays = {name: np.ascontiguousarray(value) for name, value in vars(self).items() if name != "users"}
        save_file(arrays, folder / f"windows-{split}.safetensors")
        write_json(folder / f"users-{split}.json", self.users)

    @classmethod
    def load(cls, folder: Path, split: str) -> Windows:
        """The windows of one split of a ``sequences`` artifact; ``latest`` has one window a user and no baskets."""
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}.")
        return cls(
            users=read_json(folder / f"users-{split}.json"), **load_file(folder / f"windows-{split}.safetensors")
        )
