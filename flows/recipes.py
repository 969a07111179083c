"""Named, complete configurations. A recipe is a function; deriving one from another is ordinary Python.

``demo`` is the whole chain on real purchases in minutes on two cores. ``smoke`` is the same chain, every stage made
tiny: it proves that everything fits together and teaches a model next to nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from couturier.components.alignment import align, sft
from couturier.components.data import contract, raw, sequences
from couturier.components.errors import ConfigError, CouturierError
from couturier.components.evaluation import evaluate
from couturier.components.generator import tokenise
from couturier.components.interest import fit
from couturier.components.lineage import gate
from couturier.flows import overrides
from couturier.serving import package


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a retraining run depends on, apart from the data and the code."""

    name: str
    seed: int = 0
    threads: int = 2
    """torch threads. One repeats bit for bit on any machine, and is often fastest for tiny models."""
    ingest: raw.Config = field(default_factory=raw.Config)
    """Used when ``data/`` holds nothing yet; what lies there is never overwritten by a retraining."""
    contract: contract.Config = field(default_factory=contract.Config)
    sequences: sequences.Config = field(default_factory=sequences.Config)
    tokenise: tokenise.Config = field(default_factory=tokenise.Config)
    judge: fit.Config = field(default_factory=fit.Config)
    sft: sft.Config = field(default_factory=sft.Config)
    rl: align.Config = field(default_factory=align.Config)
    evaluate: evaluate.Config = field(default_factory=evaluate.Config)
    package: package.Config = field(default_factory=package.Config)
    gate: gate.Config = field(default_factory=gate.Config)


# Replacing one of these on the recipe replaces it in every part that has it.
SHARED = ("seed", "threads")


def demo() -> Recipe:
    """Real purchases of 2,469 households, every stage at the size that fits ten minutes on two cores."""
    return Recipe(name="demo")


def smoke() -> Recipe:
    """The same chain on the same data in about a minute: few users, few items, few steps, small models, one thread."""
    base = dataclasses.replace(demo(), name="smoke", threads=1)
    codec = dataclasses.replace(base.tokenise.codec, codebook=64, width=32, blocks=1)
    eyes = dataclasses.replace(base.judge.encoder, steps=40)
    tiny = dataclasses.replace(base.sft.generator, width=64, layers=2, ffn=128, history=6)
    denoiser = dataclasses.replace(base.sft.diffusion, width=64, layers=1, history=6, steps=6, nats_levels=4)
    ppd, pigeon = base.rl.ppd, base.rl.pigeon
    pairs = dataclasses.replace(pigeon.pairs, steps=4, batch=4, windows=16, valid_windows=8)
    made = dataclasses.replace(
        base,
        sequences=dataclasses.replace(base.sequences, max_users=160, max_items=96, windows_per_user=6),
        tokenise=dataclasses.replace(base.tokenise, codec=codec, steps=80, eyes_steps=20, checkpoint_every=20),
        judge=dataclasses.replace(base.judge, encoder=eyes, steps=60, batch=64, checkpoint_every=20),
        sft=dataclasses.replace(
            base.sft,
            generator=tiny,
            diffusion=denoiser,
            grounding_steps=8,
            steps=24,
            checkpoint_every=8,
            valid_every=16,
            valid_windows=32,
        ),
        rl=dataclasses.replace(
            base.rl,
            prospect=dataclasses.replace(base.rl.prospect, windows=160),
            distil=dataclasses.replace(base.rl.distil, steps=6, prompts=4, targets=3),
            grpo=dataclasses.replace(base.rl.grpo, steps=6, prompts=4, group=4),
            ppd=dataclasses.replace(ppd, steps=6, prompts=6, pairs=1, group=3),
            pigeon=dataclasses.replace(pigeon, steps=12, batch=8, shelf_windows=64, shelf_steps=20, pairs=pairs),
            watch=dataclasses.replace(base.rl.watch, every=3, windows=16, pictures=2),
            checkpoint_every=2,
        ),
        evaluate=dataclasses.replace(
            base.evaluate, pictures=4, windows_per_user=1, best_of=2, draws=200, shown_users=4
        ),
    )
    return _shared(made)


def janus_pro_1b() -> Recipe:
    """Janus-Pro-1B (arXiv 2501.17811) on the same chain: pictures of 384 pixels in 576 codes, adapters, bfloat16. For a
    GPU of 40 GB or more; ``python -m couturier.components.generator.memory`` tells what other settings take.

    Learning rates and the five pictures of history follow the one public re-implementation of Generate, Not Recommend
    (arXiv 2506.01704), for adapters raised as is usual; nothing here was tuned, since no GPU was at hand.
    """
    return _hub(demo(), "janus_pro_1b", "deepseek-community/Janus-Pro-1B")


def janus_pro_7b() -> Recipe:
    """The same with Janus-Pro-7B: a GPU of 80 GB, or several with ``torchrun`` and ``--strategy fsdp``."""
    base = _hub(demo(), "janus_pro_7b", "deepseek-community/Janus-Pro-7B")
    return dataclasses.replace(base, sft=dataclasses.replace(base.sft, batch=4, lr=5e-5))


def emu3_8b() -> Recipe:
    """Emu3 of 8 billion weights (arXiv 2409.18869): history and answer are tokens of one vocabulary. It draws pictures
    of any size; 128 pixels are 256 codes, so that five pictures of history fit its window beside the answer."""
    base = _hub(demo(), "emu3_8b", "BAAI/Emu3-Gen-hf")
    return dataclasses.replace(
        base,
        tokenise=dataclasses.replace(base.tokenise, base_pixels=128),
        sft=dataclasses.replace(
            base.sft, generator=dataclasses.replace(base.sft.generator, family="emu3"), batch=4, lr=5e-5
        ),
    )


def _hub(base: Recipe, name: str, model: str) -> Recipe:
    """A recipe whose generator and codec are a published model's, tuned by adapters."""
    generator = dataclasses.replace(
        base.sft.generator, base=model, history=5, max_words=16, dtype="bfloat16", lora_rank=16, checkpointing=True
    )
    return dataclasses.replace(
        base,
        name=name,
        tokenise=dataclasses.replace(base.tokenise, base=model),
        sft=dataclasses.replace(
            base.sft, generator=generator, grounding_steps=0, steps=1000, batch=8, targets=1, lr=1e-4, valid_windows=64
        ),
        rl=dataclasses.replace(
            base.rl,
            distil=dataclasses.replace(base.rl.distil, prompts=8, targets=2, lr=5e-5),
            grpo=dataclasses.replace(base.rl.grpo, prompts=8, lr=1e-5, kl=0.01),
            watch=dataclasses.replace(base.rl.watch, windows=32, pictures=4),
        ),
        evaluate=dataclasses.replace(base.evaluate, pictures=10),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "smoke": smoke,
    "janus_pro_1b": janus_pro_1b,
    "janus_pro_7b": janus_pro_7b,
    "emu3_8b": emu3_8b,
}


def named(name: str, settings: Iterable[str] = ()) -> Recipe:
    """The recipe of that name, with ``--set`` settings applied.

    Raises:
        ConfigError: no such recipe, or no such setting.

    Example:
        >>> named("smoke", ["seed=3"]).sequences.seed
        3
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"recipe {name!r} is unknown.{hint} Choose one of {', '.join(RECIPES)}.")
    recipe = RECIPES[name]()
    for setting in settings:
        recipe = overrides.override(recipe, [setting])
        if setting.partition("=")[0].strip() in SHARED:
            recipe = _shared(recipe)
    return recipe


def _shared(recipe: Recipe) -> Recipe:
    """The recipe's seed and threads in every part that has them."""
    parts: dict[str, Any] = {}
    for part in dataclasses.fields(recipe):
        value = getattr(recipe, part.name)
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            continue
        inner = {field.name for field in dataclasses.fields(value)}
        shared = {name: getattr(recipe, name) for name in SHARED if name in inner}
        parts[part.name] = dataclasses.replace(value, **shared)
    return dataclasses.replace(recipe, **parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m couturier.flows.recipes NAME --part sft``: the settings of one part, as JSON for ``torchrun``."""
    parser = argparse.ArgumentParser(prog="python -m couturier.flows.recipes", description=main.__doc__)
    parser.add_argument("name", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--part", choices=("tokenise", "judge", "sft", "rl", "evaluate"), required=True)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as of couturier retrain")
    given = parser.parse_args(arguments)
    try:
        recipe = named(given.name, given.set)
    except CouturierError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(1)
    parts = {part.name: getattr(recipe, part.name) for part in dataclasses.fields(recipe)}
    sys.stdout.write(json.dumps(dataclasses.asdict(parts[given.part]), indent=2) + "\n")


if __name__ == "__main__":
    main()
