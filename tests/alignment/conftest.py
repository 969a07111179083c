"""A planted world for learning: everybody keeps taking items of one kind, so the history tells what comes next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from couturier.components.alignment import align, sft
from couturier.components.alignment.distil import DistilConfig
from couturier.components.alignment.grpo import GrpoConfig
from couturier.components.alignment.guards import Guards
from couturier.components.alignment.prospect import ProspectConfig
from couturier.components.alignment.watch import WatchConfig
from couturier.components.data.formats import Catalogue, Windows
from couturier.components.generator import tokenise
from couturier.components.generator.codec import PatchVQConfig
from couturier.components.generator.janus import GeneratorConfig
from couturier.components.interest import fit
from couturier.components.lineage.stages import Silent, StageContext
from couturier.components.lineage.workspace import Workspace

ITEMS, KINDS, HISTORY = 30, 5, 4
INPUTS = {"sequences": "sequences", "tokenise": "tokenise", "judge": "rl-judge", "sft": "rl-sft"}
OFF = Guards(kl_nats=0, entropy_nats=0, distinct=0, copied=0, zero_variance_groups=0, watch_tolerance=0)
CONFIG = align.Config(
    threads=1,
    prospect=ProspectConfig(windows=60, others_share=0.5),
    distil=DistilConfig(steps=12, prompts=8, targets=3, copies=0.3),
    grpo=GrpoConfig(steps=18, prompts=8, group=4, lr=1e-3, kl=0.01, warm_up_steps=2),
    checkpoint_every=6,
    watch=WatchConfig(every=12, windows=8, pictures=2),
    guards=OFF,
)


def _catalogue() -> Catalogue:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (ITEMS, 2, 2, 3), dtype=np.uint8)
    rgb = np.repeat(np.repeat(coarse, 8, 1), 8, 2)
    frame = pl.DataFrame(
        {
            "item_id": [f"item-{i:02d}" for i in range(ITEMS)],
            "title": [f"Item {i}" for i in range(ITEMS)],
            "text": [f"item kind {i % KINDS}" for i in range(ITEMS)],
            "category": [f"kind {i % KINDS}" for i in range(ITEMS)],
            "purchases": [10 + i % 3 for i in range(ITEMS)],
        }
    )
    return Catalogue(items=frame, rgb_IHWC=rgb, attributes=("category",), attribution="drawn by the test")


def _windows(users: int, per_user: int, seed: int) -> Windows:
    rng = np.random.default_rng(seed)
    kinds = np.repeat(rng.integers(0, KINDS, users), per_user)
    count = users * per_user

    def draw(size: int) -> np.ndarray:
        rows = [rng.choice(np.arange(kind, ITEMS, KINDS), size, replace=False) for kind in kinds]
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


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``sequences`` and ``tokenise`` artifacts of the planted world."""
    root = tmp_path_factory.mktemp("planted")
    (root / "sequences").mkdir()
    _catalogue().save(root / "sequences")
    for split, users in (("train", 60), ("valid", 12), ("test", 12), ("latest", 12)):
        _windows(users, 3, seed=len(split)).save(root / "sequences", split)
    config = tokenise.Config(
        threads=1,
        codec=PatchVQConfig(size=16, codebook=32, width=16, code_width=8, blocks=1),
        steps=120,
        batch=16,
        eyes_width=16,
        eyes_layers=1,
        eyes_steps=60,
        eyes_batch=32,
    )
    tokenise.run(context(root, "tokenise", config, {"sequences": "sequences"}))
    return root


def context(
    root: Path, name: str, config: object, inputs: dict[str, str], *, progress: Silent | None = None
) -> StageContext:
    """What the artifact store would give the stage, with folders under ``root``."""
    out, scratch = root / name, root / "scratch" / name
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    return StageContext(
        inputs={key: root / value for key, value in inputs.items()},
        config=config,
        out=out,
        scratch=scratch,
        workspace=Workspace(project=root, root=root / ".couturier"),
        progress=progress or Silent(),
    )


@pytest.fixture(scope="session")
def started(world: Path) -> Path:
    """A judge and a lightly tuned generator to start from."""
    judge = fit.Config(threads=1)
    fit.run(context(world, "rl-judge", judge, {"sequences": "sequences"}))
    config = sft.Config(
        threads=1,
        generator=GeneratorConfig(width=32, layers=2, heads=2, ffn=48, history=HISTORY),
        grounding_steps=60,
        steps=30,
        batch=16,
        targets=2,
        lr=3e-3,
        valid_every=100,
    )
    sft.run(context(world, "rl-sft", config, {"sequences": "sequences", "tokenise": "tokenise"}))
    return world


class Killed(Exception):
    """What a test raises in the middle of a loop."""


class KillAt(Silent):
    """Raises after that many steps."""

    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self, n: int = 1, *, note: str = "") -> None:
        self.left -= n
        if self.left < 0:
            raise Killed


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model in a stage's folder."""
    return load_file(folder / "model" / "model.safetensors")
