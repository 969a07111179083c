"""Finished stages of a very small demo: real codec and judge, trained for a moment, and two untrained generators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from couturier.components.data.formats import Catalogue, Windows
from couturier.components.evaluation import evaluate
from couturier.components.files import write_json
from couturier.components.generator import tokenise
from couturier.components.generator.codec import PatchVQConfig, load_codec
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.interest import fit
from couturier.components.interest.encoder import EncoderConfig
from couturier.components.lineage.stages import FACTS, Progress, Silent, StageContext
from couturier.components.lineage.workspace import Workspace

ITEMS, SIDE, HISTORY, BASKET = 24, 16, 6, 4
QUICK = evaluate.Config(threads=1, pictures=4, batch=8, best_of=2, nll_targets=2, draws=200, shown_users=3)


@dataclass(frozen=True, kw_only=True)
class Made:
    """Folders of finished stages by name, and where a stage may run."""

    root: Path
    inputs: dict[str, Path]

    def context(
        self,
        name: str,
        config: Any,
        *inputs: str,
        progress: Progress | None = None,
        others: dict[str, Path] | None = None,
    ) -> StageContext:
        """A fresh context; running the same name again finds its scratch folder as it was left."""
        out, scratch = self.root / name, self.root / "scratch" / name
        out.mkdir(exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        return StageContext(
            inputs={key: self.inputs[key] for key in inputs} | (others or {}),
            config=config,
            out=out,
            scratch=scratch,
            workspace=Workspace(project=self.root, root=self.root),
            progress=progress or Silent(),
        )


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("evaluation")
    made = Made(root=root, inputs={name: root / name for name in ("sequences", "tokenise", "judge", "sft", "rl")})
    sequences = made.inputs["sequences"]
    small_catalogue().save(sequences)
    for split, users in (("train", 30), ("valid", 6), ("test", 9)):
        small_windows(split, users).save(sequences, split)
    codec = PatchVQConfig(size=SIDE, codebook=48, width=32, code_width=8, blocks=1)
    quick = tokenise.Config(codec=codec, steps=120, eyes_width=16, eyes_layers=1, eyes_steps=5, threads=1)
    tokenise.run(made.context("tokenise", quick, "sequences"))
    judging = fit.Config(encoder=EncoderConfig(side=SIDE, steps=10, batch=16, width=16, channels=8), steps=10, batch=16)
    ctx = made.context("judge", judging, "sequences")
    fit.run(ctx)
    write_json(ctx.out / FACTS, ctx.facts)
    for seed, name in enumerate(("sft", "rl")):
        generator(made, seed=seed).save(made.inputs[name] / "model")
    return made


@pytest.fixture(scope="session")
def evaluated(made: Made) -> StageContext:
    """The evaluation of that demo, run once."""
    ctx = made.context("evaluate", QUICK, "sequences", "tokenise", "judge", "sft", "rl")
    evaluate.run(ctx)
    write_json(ctx.out / FACTS, ctx.facts)
    return ctx


def generator(made: Made, *, seed: int) -> JanusGenerator:
    """An untrained generator over the small catalogue."""
    codec = load_codec(made.inputs["tokenise"] / "codec")
    return JanusGenerator.tiny(
        GeneratorConfig(width=16, layers=1, heads=2, ffn=32, history=HISTORY),
        small_catalogue(),
        eyes=tokenise.load_eyes(made.inputs["tokenise"] / "eyes"),
        codebook=codec.codebook_size,
        codes=codec.codes_per_picture,
        seed=seed,
    ).eval()


def small_catalogue() -> Catalogue:
    """Four flat colours a tile: distinct, and quick to learn."""
    rng = np.random.default_rng(3)
    quarters = rng.integers(0, 256, (ITEMS, 2, 2, 3), dtype=np.uint8)
    frame = pl.DataFrame(
        {
            "item_id": [f"item-{i:02d}" for i in range(ITEMS)],
            "title": [f"Item {i}" for i in range(ITEMS)],
            "text": [f"item {i}" for i in range(ITEMS)],
            "category": [f"kind {i % 6}" for i in range(ITEMS)],
            "brand": ["own" if i % 2 else "other" for i in range(ITEMS)],
            "purchases": [10 * (ITEMS - i) for i in range(ITEMS)],
        }
    )
    rgb = quarters.repeat(SIDE // 2, axis=1).repeat(SIDE // 2, axis=2)
    return Catalogue(items=frame, rgb_IHWC=rgb, attributes=("category", "brand"), attribution="drawn by the test")


def small_windows(split: str, users: int) -> Windows:
    """Two windows a user; histories of two to six items; the next basket takes some of them and some new ones."""
    rng = np.random.default_rng([users, len(split)])
    count = 2 * users
    favourites = np.full((count, HISTORY), -1, np.int32)
    baskets = []
    for row in favourites:
        length = rng.integers(2, HISTORY + 1)
        row[:length] = rng.choice(ITEMS, length, replace=False)
        others = rng.choice(ITEMS, BASKET - 1, replace=False)
        basket = np.unique([row[0], *others])
        rng.shuffle(basket)
        baskets.append(basket.astype(np.int32))
    known = favourites >= 0
    offsets = np.concatenate([[0], np.cumsum([len(basket) for basket in baskets])]).astype(np.int64)
    return Windows(
        users=[f"{split}-{i:02d}" for i in range(users)],
        user_W=np.repeat(np.arange(users), 2).astype(np.int32),
        time_W=np.arange(count, dtype=np.int64),
        favourites_WK=favourites,
        weight_WK=known.astype(np.float32),
        age_days_WK=np.where(known, 3.0, 0.0).astype(np.float32),
        recent_WK=favourites[:, ::-1].copy(),
        basket=np.concatenate(baskets),
        basket_offsets=offsets,
        future=np.zeros(0, np.int32),
        future_offsets=np.zeros(count + 1, np.int64),
    )
