"""The watcher sees what a policy draws for validation users, and the same every time it looks at the same policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from couturier.components.alignment.watch import Watch, WatchConfig
from couturier.components.data.formats import Catalogue, Windows
from couturier.components.generator.codec import PatchVQConfig, load_codec, pictures
from couturier.components.generator.tokenise import Config, run
from couturier.components.lineage.stages import StageContext
from couturier.components.lineage.workspace import Workspace

ITEMS, SIDE, WINDOWS, PICTURES = 12, 16, 6, 4


def _catalogue() -> Catalogue:
    import polars as pl

    quarters = np.random.default_rng(0).integers(0, 256, (ITEMS, 2, 2, 3), dtype=np.uint8)
    frame = pl.DataFrame({"item_id": [f"{i:02d}" for i in range(ITEMS)], "purchases": [1] * ITEMS})
    frame = frame.with_columns(pl.col("item_id").alias("title"), pl.col("item_id").alias("text"))
    rgb = quarters.repeat(SIDE // 2, axis=1).repeat(SIDE // 2, axis=2)
    return Catalogue(items=frame, rgb_IHWC=rgb, attributes=(), attribution="test")


def _windows() -> Windows:
    """Window w had items w and w + 1 and takes w + 2, w + 3."""
    w = np.arange(WINDOWS)
    empty, zeros = np.zeros((WINDOWS, 2), np.float32), np.zeros(WINDOWS + 1, np.int64)
    return Windows(
        users=[f"u{i}" for i in w],
        user_W=w.astype(np.int32),
        time_W=w.astype(np.int64),
        favourites_WK=np.stack([w, w + 1], 1).astype(np.int32),
        weight_WK=empty,
        age_days_WK=empty,
        recent_WK=np.stack([w + 1, w], 1).astype(np.int32),
        basket=np.stack([w + 2, w + 3], 1).flatten().astype(np.int32),
        basket_offsets=(2 * np.arange(WINDOWS + 1)).astype(np.int64),
        future=np.zeros(0, np.int32),
        future_offsets=zeros,
    )


class Planted:
    """A generator whose pictures are known: item ``first favourite + step``, the same ``n`` times."""

    def __init__(self, codes_IL: torch.Tensor, *steps: int) -> None:
        self.codes_IL, self.steps = codes_IL, steps

    def sample(self, favourites_UK: np.ndarray, n: int, *, seeds: list[int]) -> torch.Tensor:
        assert len(seeds) == len(favourites_UK)
        step = np.resize(self.steps, n)
        return self.codes_IL[torch.from_numpy(favourites_UK[:, :1].astype(np.int64) + step)]


@pytest.fixture(scope="module")
def watch_and_codes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watch, torch.Tensor]:
    root = tmp_path_factory.mktemp("watch")
    catalogue = _catalogue()
    catalogue.save(root / "sequences")
    _windows().save(root / "sequences", "valid")
    codec_config = PatchVQConfig(size=SIDE, codebook=32, width=32, code_width=8, blocks=1)
    ctx = StageContext(
        inputs={"sequences": root / "sequences"},
        config=Config(codec=codec_config, steps=150, eyes_width=16, eyes_layers=1, eyes_steps=1, threads=1),
        out=root,
        scratch=root,
        workspace=Workspace(project=root, root=root),
    )
    run(ctx)
    codec = load_codec(root / "codec")
    codes_IL = codec.encode(pictures(catalogue, SIDE))
    return Watch(ctx, catalogue, codec, WatchConfig(pictures=PICTURES, windows=5)), codes_IL


def test_what_comes_next_copies_and_neither_are_told_apart(watch_and_codes: tuple[Watch, torch.Tensor]) -> None:
    watch, codes = watch_and_codes
    right, copied, neither = (watch.look(Planted(codes, *steps)) for steps in ((2, 3), (0, 1), (5,)))
    assert (right["watch_basket_precision"], right["watch_copied"], right["watch_distinct"]) == (1.0, 0.0, 0.5)
    assert (copied["watch_basket_precision"], copied["watch_copied"]) == (0.0, 1.0)
    assert (neither["watch_basket_precision"], neither["watch_distinct"]) == (0.0, 0.25)
    assert right["watch_sim_next"] > copied["watch_sim_next"] + 0.2
    assert right["watch_sim_next"] > neither["watch_sim_next"] + 0.2


def test_a_second_look_says_the_same(watch_and_codes: tuple[Watch, torch.Tensor]) -> None:
    watch, codes = watch_and_codes
    assert watch.look(Planted(codes, 2, 0, 5)) == watch.look(Planted(codes, 2, 0, 5))


def test_only_the_first_windows_are_looked_at(watch_and_codes: tuple[Watch, torch.Tensor]) -> None:
    watch, _ = watch_and_codes
    assert watch.rows.tolist() == [0, 1, 2, 3, 4]
    assert len(set(watch.seeds)) == 5


def test_no_validation_user_is_no_figure(watch_and_codes: tuple[Watch, torch.Tensor], tmp_path: Path) -> None:
    watch, codes = watch_and_codes
    _windows().save(tmp_path, "valid")
    catalogue = _catalogue()
    ctx = StageContext(
        inputs={"sequences": tmp_path},
        config=None,
        out=tmp_path,
        scratch=tmp_path,
        workspace=Workspace(project=tmp_path, root=tmp_path),
    )
    nobody = Watch(ctx, catalogue, watch.codec, WatchConfig(pictures=PICTURES, windows=0))
    assert set(nobody.look(Planted(codes, 2)).values()) == {0.0}
