"""One tiny model of every kind, trained for a moment, packed once and served once for the whole session."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from couturier.components.data import sequences
from couturier.components.data.formats import Catalogue
from couturier.components.files import write_json
from couturier.components.generator import tokenise
from couturier.components.generator.codec import PatchVQConfig, load_codec
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.interest import fit
from couturier.components.interest.encoder import EncoderConfig
from couturier.components.lineage.stages import StageContext
from couturier.components.lineage.workspace import Workspace
from couturier.serving import package
from couturier.serving.client import ServedBento, serve_bento

ITEMS, USERS, GROUPS, SIZE = 24, 24, 12, 32


@dataclass(frozen=True, kw_only=True)
class Made:
    """A workspace with finished stages, and the context of the package stage that ran in it."""

    workspace: Workspace
    inputs: dict[str, Path]
    package: StageContext


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("serving")
    workspace = Workspace(project=root, root=root / ".couturier")
    inputs = {name: root / name for name in ("validate", "sequences", "tokenise", "judge", "rl")}
    _raw(inputs["validate"])

    def context(name: str, config: Any, *before: str) -> StageContext:
        out, scratch = root / name, workspace.scratch / f"{name}-0123456789abcdef"
        out.mkdir(exist_ok=True)
        scratch.mkdir(parents=True)
        return StageContext(
            inputs={key: inputs[key] for key in before}, config=config, out=out, scratch=scratch, workspace=workspace
        )

    cut = sequences.Config(min_item_events=2, min_item_users=2, min_history=3, history=8)
    sequences.run(context("sequences", cut, "validate"))
    codec = PatchVQConfig(size=SIZE, codebook=32, width=16, code_width=8, blocks=1)
    quick = tokenise.Config(
        codec=codec, steps=40, eyes_width=16, eyes_layers=1, eyes_steps=10, eyes_batch=16, threads=1
    )
    tokenise.run(context("tokenise", quick, "sequences"))
    quick_eyes = EncoderConfig(steps=20, batch=16, width=16, channels=8)
    fit.run(context("judge", fit.Config(encoder=quick_eyes, steps=20, batch=16), "sequences"))
    _generator(inputs)
    ctx = context("package", package.Config(golden_users=2, golden_pictures=2), "sequences", "tokenise", "judge", "rl")
    _as_after_a_kill(ctx)
    package.run(ctx)
    return Made(workspace=workspace, inputs=inputs, package=ctx)


@pytest.fixture(scope="session")
def served(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedBento]:
    folder = tmp_path_factory.mktemp("served")
    with serve_bento(
        made.package.facts["tag"],
        bentoml_home=made.workspace.bentos,
        feedback=folder / "feedback",
        log=folder / "serve.log",
        registered={"model": "couturier", "version": 7, "run_id": "abc", "alias": "champion"},
    ) as up:
        yield up


@pytest.fixture(scope="session")
def feedback_folder(served: ServedBento, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(folder for folder in tmp_path_factory.getbasetemp().glob("served*") if folder.is_dir()) / "feedback"


def _as_after_a_kill(ctx: StageContext) -> None:
    """What a ``kill -9`` in the middle of the stage leaves behind; the stage must not trip over it."""
    for leftover in (
        "context/couturier/old.py",
        "context/model/old.json",
        "build/bentos/old",
        "feedback/events-old.jsonl",
    ):
        path = ctx.scratch / leftover
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")


def _generator(inputs: dict[str, Path]) -> None:
    """An untrained generator: what it draws is noise, but the same noise for the same history and seed."""
    catalogue = Catalogue.load(inputs["sequences"])
    codec = load_codec(inputs["tokenise"] / "codec")
    shape = GeneratorConfig(width=16, layers=2, heads=2, ffn=32, history=8)
    generator = JanusGenerator.tiny(
        shape,
        catalogue,
        eyes=tokenise.load_eyes(inputs["tokenise"] / "eyes"),
        codebook=codec.codebook_size,
        codes=codec.codes_per_picture,
        seed=0,
    )
    generator.save(inputs["rl"] / "model")


def _raw(folder: Path) -> None:
    """Users who like one of three colours of tiles, in the form that ``validate`` leaves."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    ids = [f"item/{i:02d}" for i in range(ITEMS)]  # a slash is fine in an id: no id ever becomes a path
    colours = ["red", "green", "blue"]
    pl.DataFrame(
        {
            "item_id": ids,
            "title": [f"{colours[i % 3]} tile {i}" for i in range(ITEMS)],
            "text": [f"a {colours[i % 3]} tile" for i in range(ITEMS)],
            "colour": [colours[i % 3] for i in range(ITEMS)],
        }
    ).write_parquet(folder / "items.parquet")
    rgb = rng.integers(0, 90, (ITEMS, SIZE, SIZE, 3), np.uint8)
    for i in range(ITEMS):
        rgb[i, 4 + i % 8 : 20 + i % 8, 6:26, i % 3] = 230
    pl.DataFrame(
        {
            "item_id": ids,
            "height": [SIZE] * ITEMS,
            "width": [SIZE] * ITEMS,
            "rgb": [picture.tobytes() for picture in rgb],
            "error": [None] * ITEMS,
        },
        schema={"item_id": pl.String, "height": pl.Int32, "width": pl.Int32, "rgb": pl.Binary, "error": pl.String},
    ).write_parquet(folder / "pictures.parquet")
    start = datetime(2024, 1, 1, tzinfo=UTC)
    events = [
        {
            "user_id": f"user-{u:02d}",
            "item_id": ids[int(i)],
            "timestamp": start + timedelta(days=7 * g),
            "kind": "purchase",
            "value": 1.0,
            "group_id": f"{u}-{g}",
        }
        for u in range(USERS)
        for g in range(GROUPS)
        for i in rng.choice(np.arange(u % 3, ITEMS, 3), 3, replace=False)
    ]
    pl.DataFrame(events).with_columns(pl.col("timestamp").dt.cast_time_unit("us")).write_parquet(
        folder / "events.parquet"
    )
    pl.DataFrame({"user_id": [f"user-{u:02d}" for u in range(USERS)]}).write_parquet(folder / "users.parquet")
    write_json(folder / "meta.json", {"attributes": ["colour"], "attribution": "Tiles drawn for the tests, CC0."})
