"""A planted world: people like two categories of eight, take unseen items of them, and nothing else tells them apart.

The right answer is known: a candidate of a liked category is taken, another is not. Every item is taken as often as any
other but for a planted popularity, which negatives match. Time is planted too: the first half of each history is
old and of a category that the person no longer likes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from couturier.components.data.formats import Catalogue, Windows
from couturier.components.interest.encoder import EncoderConfig
from couturier.components.interest.fit import Config
from couturier.components.interest.items import FeatureConfig
from couturier.components.interest.judges.attention import AttentionConfig
from couturier.components.interest.judges.din import DinConfig
from couturier.components.interest.judges.mqsa_ted import MqsaTedConfig
from couturier.components.interest.judges.sdim import SdimConfig
from couturier.components.lineage.stages import Progress, Silent, StageContext
from couturier.components.lineage.workspace import Workspace

CATEGORIES, PER_CATEGORY, SIDE, HISTORY = 8, 6, 16, 8
ITEMS = CATEGORIES * PER_CATEGORY
QUICK = Config(
    threads=1,
    encoder=EncoderConfig(side=SIDE, width=16, channels=8, steps=80, batch=48),
    attention=AttentionConfig(heads=2, head_width=8, hidden=16),
    mqsa_ted=MqsaTedConfig(heads=4, alpha=0.2, long=4, dropout=0.0),
    din=DinConfig(ages=True),
    sdim=SdimConfig(short=4),
    features=FeatureConfig(words=8),
    steps=160,
    batch=48,
    negatives=4,
    views=2,
    eval_every=20,
    eval_negatives=16,
    checkpoint_every=30,
    calibration_users=64,
)

# Judges that learn this world more slowly than the others, and what they need.
PACE: dict[str, dict[str, Any]] = {"din": {"learning_rate": 1e-2}, "sasrec": {"steps": 400}}
PACE["profile"] = {"steps": 400}


@dataclass(frozen=True, kw_only=True)
class World:
    """A ``sequences`` artifact and what is true in it. ``likes`` maps a split to ``[W, 2]``: the liked categories."""

    folder: Path
    likes: dict[str, np.ndarray]


def category_of(items: np.ndarray) -> np.ndarray:
    """The category of each item index."""
    return np.asarray(items) // PER_CATEGORY


def plant(folder: Path, *, seed: int = 0, train_users: int = 120) -> World:
    """Write the world into ``folder``."""
    random = np.random.default_rng(seed)
    _catalogue(random).save(folder)
    likes = {}
    for split, users in (("train", train_users), ("valid", 16), ("test", 60)):
        windows, likes[split] = _windows(random, users, per_user=4 if split == "train" else 2)
        windows.save(folder, split)
    return World(folder=folder, likes=likes)


def context(world: World, root: Path, config: Config, *, progress: Progress | None = None) -> StageContext:
    """What the judge stage is given; the scratch folder outlives an interruption, the output folder does not."""
    out, scratch = root / "out", root / "scratch"
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    return StageContext(
        inputs={"sequences": world.folder},
        config=config,
        out=out,
        scratch=scratch,
        workspace=Workspace(project=root, root=root / ".couturier"),
        progress=progress or Silent(),
    )


def _catalogue(random: np.random.Generator) -> Catalogue:
    """Tiles: a colour a category, a pattern of four patches an item."""
    category = category_of(np.arange(ITEMS))
    colour_C3 = random.integers(40, 216, size=(CATEGORIES, 3))
    rgb = np.repeat(np.repeat(colour_C3[category][:, None, None], SIDE, 1), SIDE, 2)
    for item in range(ITEMS):
        corners = random.permutation(16)[: 1 + item % PER_CATEGORY]
        for corner in corners:
            top, left = 4 * (corner // 4), 4 * (corner % 4)
            rgb[item, top : top + 2, left : left + 2] = 255
    items = pl.DataFrame(
        {
            "item_id": [f"item-{item:03d}" for item in range(ITEMS)],
            "title": [f"Kind {kind}" for kind in category],
            "text": [f"kind{kind} number{item % PER_CATEGORY}" for item, kind in enumerate(category)],
            "category": [f"kind{kind}" for kind in category],
            "purchases": [10] * ITEMS,
        }
    )
    return Catalogue(items=items, rgb_IHWC=rgb.astype(np.uint8), attributes=("category",), attribution="planted")


def _windows(random: np.random.Generator, users: int, *, per_user: int) -> tuple[Windows, np.ndarray]:
    count = users * per_user
    favourites = np.full((count, HISTORY), -1, dtype=np.int32)
    age = np.zeros((count, HISTORY), dtype=np.float32)
    popularity_P = np.arange(1, PER_CATEGORY + 1) / np.arange(1, PER_CATEGORY + 1).sum()
    baskets, likes = [], np.zeros((count, 2), dtype=np.int64)
    for window in range(count):
        if window % per_user == 0:
            liked = random.permutation(CATEGORIES)[:3]
        likes[window] = liked[:2]
        half = HISTORY // 2
        kinds = np.concatenate([random.choice(liked[:2], half), np.full(half, liked[2])])
        favourites[window] = kinds * PER_CATEGORY + random.choice(PER_CATEGORY, HISTORY, p=popularity_P)
        age[window] = np.concatenate([random.uniform(0, 10, half), random.uniform(150, 250, half)])
        taken = random.choice(liked[:2], 3) * PER_CATEGORY + random.choice(PER_CATEGORY, 3, p=popularity_P)
        baskets.append(taken.astype(np.int32))
    offsets = np.arange(count + 1, dtype=np.int64) * 3
    windows = Windows(
        users=[f"user-{user}" for user in range(users)],
        user_W=np.repeat(np.arange(users, dtype=np.int32), per_user),
        time_W=np.arange(count, dtype=np.int64),
        favourites_WK=favourites,
        weight_WK=np.ones((count, HISTORY), dtype=np.float32),
        age_days_WK=age,
        recent_WK=favourites,
        basket=np.concatenate(baskets),
        basket_offsets=offsets,
        future=np.zeros(0, dtype=np.int32),
        future_offsets=np.zeros(count + 1, dtype=np.int64),
    )
    return windows, likes
