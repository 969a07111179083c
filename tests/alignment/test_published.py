"""Models in the published layout go through tokenise, fine-tuning and alignment by the name of their folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from couturier.components.alignment import align, sft
from couturier.components.alignment.distil import DistilConfig
from couturier.components.alignment.grpo import GrpoConfig
from couturier.components.alignment.prospect import ProspectConfig
from couturier.components.alignment.watch import WatchConfig
from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.generator import tokenise
from couturier.components.generator.codec import load_codec
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.generator.tokenise import load_eyes
from couturier.components.generator.types import load_generator
from couturier.components.lineage.checkpoints import Checkpoints

from ..generator.published import publish_emu3, publish_janus
from .conftest import HISTORY, KillAt, Killed, context

TUNE = sft.Config(
    threads=1,
    grounding_steps=0,
    steps=3,
    batch=4,
    targets=2,
    valid_every=3,
    valid_windows=6,
    checkpoint_every=2,
)
SMALL = GeneratorConfig(width=32, layers=1, heads=2, ffn=48, history=HISTORY)


def published(world: Path, family: str, folder: Path) -> str:
    catalogue = Catalogue.load(world / "sequences")
    if family == "emu3":
        return publish_emu3(catalogue, folder)
    eyes = load_eyes(world / "tokenise" / "eyes")
    return publish_janus(JanusGenerator.tiny(SMALL, catalogue, eyes=eyes, codebook=24, codes=4, seed=0), folder)


def tokenised(world: Path, base: str, name: str) -> Path:
    config = tokenise.Config(threads=1, base=base, base_pixels=8)
    ctx = context(world, name, config, {"sequences": "sequences"})
    tokenise.run(ctx)
    return ctx.out


def test_the_published_layout_is_tuned_by_the_same_stages(world: Path, tmp_path: Path) -> None:
    base = published(world, "janus", tmp_path / "published")
    codec = load_codec(tokenised(world, base, "published-tokenise") / "codec")
    assert codec.codes_per_picture == 4
    config = replace(TUNE, generator=GeneratorConfig(base=base, history=HISTORY, max_words=4))
    tuned = context(world, "published-sft", config, {"sequences": "sequences", "tokenise": "published-tokenise"})
    sft.run(tuned)
    assert tuned.facts["valid_nats"] > 0
    again = JanusGenerator.load(tuned.out / "model")
    assert again.prompts.picture_tokens == 4
    history = Catalogue.load(world / "sequences").items.height - 1
    assert again.sample(np.array([[history]]), 2, seeds=[1]).shape == (1, 2, 4)
    with pytest.raises(ConfigError, match="set it to janus"):
        wrong = replace(config, generator=replace(config.generator, family="emu3"))
        sft.run(context(world, "published-wrong", wrong, {"sequences": "sequences", "tokenise": "published-tokenise"}))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["janus", "emu3"])
def test_adapters_are_tuned_aligned_and_go_on_after_a_kill(started: Path, family: str, tmp_path: Path) -> None:
    base = published(started, family, tmp_path / "published")
    name = f"adapted-{family}"
    tokenised(started, base, f"{name}-tokenise")
    adapters = GeneratorConfig(
        family=family,
        base=base,
        history=2,
        max_words=2,
        lora_rank=2,
        lora_targets=("q_proj", "up_proj"),
        dtype="bfloat16",
    )
    inputs = {"sequences": "sequences", "tokenise": f"{name}-tokenise", "judge": "rl-judge", "sft": f"{name}-sft"}
    tuned = context(started, f"{name}-sft", replace(TUNE, generator=adapters), inputs)
    sft.run(tuned)
    config = align.Config(
        threads=1,
        prospect=ProspectConfig(windows=60, others_share=0.5),
        distil=DistilConfig(steps=2, prompts=4, targets=2),
        grpo=GrpoConfig(steps=3, prompts=4, group=4, lr=1e-3, kl=0.01),
        watch=WatchConfig(every=3, windows=4, pictures=2),
        checkpoint_every=4,
    )
    whole = context(started, f"{name}-rl", config, inputs)
    align.run(whole)
    with pytest.raises(Killed):
        align.run(context(started, f"{name}-killed", config, inputs, progress=KillAt(4)))
    again = context(started, f"{name}-killed", config, inputs)
    saved = Checkpoints(again.scratch / "checkpoints").newest()
    assert saved is not None and all(".lora_" in key for key in saved.tensors if key.startswith("model."))
    align.run(again)
    first, second = (load_generator(ctx.out / "model") for ctx in (whole, again))
    drawn = [each.sample(np.array([[1, 2]]), 3, seeds=[5]) for each in (first, second)]
    assert (drawn[0] == drawn[1]).all()
    a, b, before = (load_file(ctx.out / "model" / "adapter.safetensors") for ctx in (whole, again, tuned))
    assert all((a[key] == b[key]).all() for key in a) and any((a[key] != before[key]).any() for key in a)
