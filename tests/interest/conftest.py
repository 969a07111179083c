"""Planted worlds. The small one: sixteen items in four colours; each person takes only items of one colour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from couturier.components.data.formats import Catalogue, Windows
from couturier.components.interest import fit
from couturier.components.interest.encoder import EncoderConfig
from couturier.components.interest.items import FeatureConfig
from couturier.components.interest.judge import JUDGES, load_judge
from couturier.components.interest.judges.attention import AttentionConfig
from couturier.components.interest.types import Judge
from couturier.components.lineage.stages import Silent, StageContext
from couturier.components.lineage.workspace import Workspace

from . import planted

ITEMS, KINDS, HISTORY = 16, 4, 6
StageOf = Callable[[str], StageContext]
SMALL = fit.Config(
    threads=1,
    encoder=EncoderConfig(side=16, width=16, channels=8, steps=40, batch=32),
    attention=AttentionConfig(heads=2, head_width=8, hidden=16),
    features=FeatureConfig(words=8),
    steps=80,
    batch=32,
    eval_every=20,
    eval_negatives=8,
    checkpoint_every=25,
    calibration_users=32,
)


def planted_catalogue() -> Catalogue:
    """Item ``i`` is of colour ``i % 4``; a stripe of its own tells it from the others of its colour."""
    colours = np.array([[220, 30, 30], [30, 200, 40], [40, 60, 220], [210, 200, 40]], dtype=np.uint8)
    rgb = np.repeat(np.repeat(colours[np.arange(ITEMS) % KINDS][:, None, None], 16, 1), 16, 2).copy()
    for item in range(ITEMS):
        rgb[item, 4 * (item // KINDS) : 4 * (item // KINDS) + 3, 2:14] = 255
    frame = pl.DataFrame(
        {
            "item_id": [f"item-{i:02d}" for i in range(ITEMS)],
            "title": [f"Thing {i // KINDS}" for i in range(ITEMS)],
            "text": [f"kind{i % KINDS}" for i in range(ITEMS)],
            "kind": [f"kind{i % KINDS}" for i in range(ITEMS)],
            "purchases": [1] * ITEMS,
        }
    )
    return Catalogue(items=frame, rgb_IHWC=rgb, attributes=("kind",), attribution="drawn by the test")


def planted_windows(users: int, *, seed: int, windows_a_user: int = 4) -> Windows:
    """Each window: three items of the person's colour in the history, two of that colour taken next."""
    rng, count = np.random.default_rng(seed), users * windows_a_user
    user_W = np.repeat(np.arange(users), windows_a_user)
    favourites = np.full((count, HISTORY), -1, dtype=np.int32)
    basket = np.empty((count, 2), dtype=np.int32)
    for row, user in enumerate(user_W):
        own = np.arange(user % KINDS, ITEMS, KINDS)
        favourites[row, :3] = rng.choice(own, 3, replace=False)
        basket[row] = rng.choice(own, 2, replace=False)
    real = favourites >= 0
    return Windows(
        users=[f"user-{i}" for i in range(users)],
        user_W=user_W.astype(np.int32),
        time_W=np.arange(count, dtype=np.int64),
        favourites_WK=favourites,
        weight_WK=(rng.uniform(0.5, 3, favourites.shape) * real).astype(np.float32),
        age_days_WK=(rng.uniform(0, 60, favourites.shape) * real).astype(np.float32),
        recent_WK=favourites,
        basket=basket.ravel(),
        basket_offsets=np.arange(count + 1, dtype=np.int64) * 2,
        future=np.zeros(0, dtype=np.int32),
        future_offsets=np.zeros(count + 1, dtype=np.int64),
    )


@dataclass(frozen=True, kw_only=True)
class Fitted:
    context: StageContext
    catalogue: Catalogue
    test: Windows

    @property
    def folder(self) -> Path:
        return self.context.out / "judge"


def context_of(
    sequences: Path, folder: Path, config: fit.Config, *, progress: Silent | None = None, out: str = "out"
) -> StageContext:
    (folder / out).mkdir(parents=True)
    (folder / "scratch").mkdir(exist_ok=True)
    return StageContext(
        inputs={"sequences": sequences},
        config=config,
        out=folder / out,
        scratch=folder / "scratch",
        workspace=Workspace(folder, folder),
        progress=progress or Silent(),
    )


@pytest.fixture(scope="session")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequences")
    planted_catalogue().save(folder)
    for split, users, seed in (("train", 60, 0), ("valid", 16, 1), ("test", 40, 2)):
        planted_windows(users, seed=seed).save(folder, split)
    return folder


@pytest.fixture(scope="session")
def fitted(sequences: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    context = context_of(sequences, tmp_path_factory.mktemp("fit"), SMALL)
    fit.run(context)
    return Fitted(context=context, catalogue=planted_catalogue(), test=Windows.load(sequences, "test"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> planted.World:
    """The larger planted world, in which tastes change with time."""
    return planted.plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="session")
def stage_of(world: planted.World, tmp_path_factory: pytest.TempPathFactory) -> StageOf:
    """The judge stage after it ran on that world, by the judge's name; each runs once."""

    @cache
    def finish(name: str) -> StageContext:
        config = replace(planted.QUICK, model=name, **planted.PACE.get(name, {}))
        context = planted.context(world, tmp_path_factory.mktemp(name), config)
        fit.run(context)
        return context

    return finish


@pytest.fixture(scope="session", params=sorted(JUDGES))
def finished(request: pytest.FixtureRequest, stage_of: StageOf) -> StageContext:
    """The judge stage after it ran on that world, once for every kind of judge."""
    return stage_of(request.param)


@pytest.fixture(scope="session")
def judge(finished: StageContext) -> Judge:
    return load_judge(finished.out / "judge")
