"""A Janus in the published layout goes through tokenise and SFT by the name of its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import JanusConfig, JanusForConditionalGeneration

from couturier.components.alignment import sft
from couturier.components.data.formats import Catalogue
from couturier.components.generator import tokenise
from couturier.components.generator.codec import load_codec
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.generator.tokenise import load_eyes

from .conftest import HISTORY, context


def publish(world: Path, folder: Path) -> Path:
    """Write an untrained Janus as a hub holds it: config, tokenizer, weights, codec included."""
    catalogue = Catalogue.load(world / "sequences")
    eyes = load_eyes(world / "tokenise" / "eyes")
    small = GeneratorConfig(width=32, layers=1, heads=2, ffn=48, history=HISTORY)
    generator = JanusGenerator.tiny(small, catalogue, eyes=eyes, codebook=24, codes=4, seed=0)
    facts = generator.model.config.to_dict()
    facts["vision_config"] |= {"patch_size": 8, "num_image_tokens": 4}
    JanusForConditionalGeneration(JanusConfig(**facts)).save_pretrained(folder)
    generator.prompts.tokenizer.save_pretrained(folder)
    return folder


def test_the_published_layout_is_tuned_by_the_same_stages(world: Path, tmp_path: Path) -> None:
    base = str(publish(world, tmp_path / "published"))
    ctx = context(world, "published-tokenise", tokenise.Config(threads=1, base=base), {"sequences": "sequences"})
    tokenise.run(ctx)
    assert load_codec(ctx.out / "codec").codes_per_picture == 4
    config = sft.Config(
        threads=1,
        generator=GeneratorConfig(base=base, history=HISTORY, max_words=4),
        grounding_steps=0,
        steps=3,
        batch=4,
        targets=2,
        valid_every=3,
        valid_windows=6,
    )
    inputs = {"sequences": "sequences", "tokenise": "published-tokenise"}
    tuned = context(world, "published-sft", config, inputs)
    sft.run(tuned)
    assert tuned.facts["valid_nats"] > 0
    again = JanusGenerator.load(tuned.out / "model")
    assert again.prompts.picture_tokens == 4
    history = Catalogue.load(world / "sequences").items.height - 1
    assert again.sample(np.array([[history]]), 2, seeds=[1]).shape == (1, 2, 4)
