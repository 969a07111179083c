"""A small world for the generator: forty items with pictures, an untrained codec and eyes, a tiny Janus."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from transformers import JanusVisionConfig, JanusVisionModel

from couturier.components.data.formats import Catalogue
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.runtime import global_seed

ITEMS, CODES, CODEBOOK = 40, 4, 24


def small_catalogue(size: int = 16, items: int = ITEMS) -> Catalogue:
    """Flat colours with a corner: distinct, and quick to learn."""
    rng = np.random.default_rng(0)
    rgb = np.repeat(np.repeat(rng.integers(0, 256, (items, 2, 2, 3), dtype=np.uint8), size // 2, 1), size // 2, 2)
    frame = pl.DataFrame(
        {
            "item_id": [f"item-{i:03d}" for i in range(items)],
            "title": [f"Item {i}" for i in range(items)],
            "text": [f"item {i}" for i in range(items)],
            "category": [f"kind {i % 5}" for i in range(items)],
            "brand": ["own" if i % 2 else "other" for i in range(items)],
            "purchases": [items - i for i in range(items)],
        }
    )
    return Catalogue(items=frame, rgb_IHWC=rgb, attributes=("category", "brand"), attribution="drawn by the test")


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return small_catalogue()


def tiny_generator(catalogue: Catalogue, *, seed: int = 0, history: int = 5) -> JanusGenerator:
    with global_seed(0, "eyes"):
        eyes = JanusVisionModel(
            JanusVisionConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=16,
                patch_size=16,
                num_image_tokens=1,
                mlp_ratio=2.0,
            )
        )
    config = GeneratorConfig(width=32, layers=2, heads=2, ffn=48, history=history)
    return JanusGenerator.tiny(config, catalogue, eyes=eyes, codebook=CODEBOOK, codes=CODES, seed=seed).eval()


@pytest.fixture
def generator(catalogue: Catalogue) -> JanusGenerator:
    return tiny_generator(catalogue)


@pytest.fixture
def histories() -> np.ndarray:
    """Three users: full, short and empty."""
    return np.array([[1, 2, 3, 4, 5], [6, 7, -1, -1, -1], [-1, -1, -1, -1, -1]])


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(0, CODEBOOK, (3, 4, CODES), generator=torch.Generator().manual_seed(0))
