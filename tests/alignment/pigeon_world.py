"""A planted world for Pigeon: a picture's left half says its style, its right half its motif.

Everybody keeps to one style and takes any motif, so the history tells one half of the next picture and nothing of the
other. A reference of another style asks for both at once: its motif in the person's style is an item, too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from couturier.components.alignment import sft
from couturier.components.data.formats import Catalogue, Windows
from couturier.components.generator import tokenise
from couturier.components.generator.codec import PatchVQConfig
from couturier.components.generator.janus import GeneratorConfig
from couturier.components.interest import fit

from .conftest import context

STYLES, MOTIFS, HISTORY, COLOURS = 5, 6, 4, 12
ITEMS = STYLES * MOTIFS
INPUTS = {"sequences": "sequences", "tokenise": "tokenise", "judge": "judge", "sft": "sft"}


def catalogue() -> Catalogue:
    """Item ``style * MOTIFS + motif``: coarse squares, two columns drawn by style and two by motif."""
    rng = np.random.default_rng(1)
    palette = rng.integers(0, 256, (COLOURS, 3), dtype=np.uint8)
    styles, motifs = (palette[rng.integers(0, COLOURS, (count, 4, 2))] for count in (STYLES, MOTIFS))
    coarse = np.stack([np.concatenate([style, motif], 1) for style in styles for motif in motifs])
    style = [i // MOTIFS for i in range(ITEMS)]
    frame = pl.DataFrame(
        {
            "item_id": [f"item-{i:02d}" for i in range(ITEMS)],
            "title": [f"Item {i}" for i in range(ITEMS)],
            "text": [f"item of style {s}" for s in style],
            "category": [f"style {s}" for s in style],
            "purchases": [10] * ITEMS,
        }
    )
    rgb = coarse.repeat(8, 1).repeat(8, 2)
    return Catalogue(items=frame, rgb_IHWC=rgb, attributes=("category",), attribution="drawn by the test")


def windows(users: int, per_user: int, seed: int) -> Windows:
    """Each user has one style; histories, baskets and futures are drawn among its items."""
    rng = np.random.default_rng(seed)
    style = np.repeat(rng.integers(0, STYLES, users), per_user)
    count = users * per_user

    def draw(size: int) -> np.ndarray:
        rows = [s * MOTIFS + rng.choice(MOTIFS, size, replace=False) for s in style]
        return np.stack(rows).astype(np.int32)

    history, basket, future = draw(HISTORY), draw(2), draw(2)
    return Windows(
        users=[f"user-{seed}-{i}" for i in range(users)],
        user_W=np.repeat(np.arange(users), per_user).astype(np.int32),
        time_W=np.arange(count, dtype=np.int64),
        favourites_WK=history,
        weight_WK=np.ones((count, HISTORY), np.float32),
        age_days_WK=np.ones((count, HISTORY), np.float32),
        recent_WK=history,
        basket=basket.ravel(),
        basket_offsets=np.arange(0, 2 * count + 1, 2, dtype=np.int64),
        future=future.ravel(),
        future_offsets=np.arange(0, 2 * count + 1, 2, dtype=np.int64),
    )


def build(root: Path, *, codec_steps: int = 150, grounding: int = 60, steps: int = 40) -> Path:
    """A folder with ``sequences``, ``tokenise``, ``judge`` and ``sft`` artifacts of this world."""
    (root / "sequences").mkdir()
    catalogue().save(root / "sequences")
    for split, users in (("train", 80), ("valid", 24), ("test", 12), ("latest", 12)):
        windows(users, 3, seed=len(split)).save(root / "sequences", split)
    codec = PatchVQConfig(size=32, codebook=32, width=16, code_width=8, blocks=1)
    eyes = {"eyes_width": 16, "eyes_layers": 1, "eyes_steps": 60, "eyes_batch": 32}
    config = tokenise.Config(threads=1, codec=codec, steps=codec_steps, batch=16, **eyes)  # type: ignore[arg-type]
    tokenise.run(context(root, "tokenise", config, {"sequences": "sequences"}))
    fit.run(context(root, "judge", fit.Config(threads=1), {"sequences": "sequences"}))
    tuned = sft.Config(
        threads=1,
        generator=GeneratorConfig(width=32, layers=2, heads=2, ffn=48, history=HISTORY),
        grounding_steps=grounding,
        steps=steps,
        batch=16,
        targets=2,
        lr=3e-3,
        valid_every=100,
    )
    sft.run(context(root, "sft", tuned, {"sequences": "sequences", "tokenise": "tokenise"}))
    return root
