"""Named, complete configurations. A recipe is a function; deriving one from another is ordinary Python.

``demo`` is the whole chain on real purchases in minutes on two cores. ``smoke`` is the same chain, every stage made
tiny: it proves that everything fits together and teaches a model next to nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from couturier.components.alignment import align, sft
from couturier.components.data import contract, raw, sequences
from couturier.components.errors import ConfigError
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
    made = dataclasses.replace(
        base,
        sequences=dataclasses.replace(base.sequences, max_users=160, max_items=96, windows_per_user=6),
        tokenise=dataclasses.replace(base.tokenise, codec=codec, steps=80, eyes_steps=20, checkpoint_every=20),
        judge=dataclasses.replace(base.judge, encoder=eyes, steps=60, batch=64, checkpoint_every=20),
        sft=dataclasses.replace(
            base.sft, generator=tiny, grounding_steps=8, steps=24, checkpoint_every=8, valid_every=16, valid_windows=32
        ),
        rl=dataclasses.replace(
            base.rl,
            prospect=dataclasses.replace(base.rl.prospect, windows=160),
            distil=dataclasses.replace(base.rl.distil, steps=6, prompts=4, targets=3),
            grpo=dataclasses.replace(base.rl.grpo, steps=6, prompts=4, group=4),
            watch=dataclasses.replace(base.rl.watch, every=3, windows=16, pictures=2),
            checkpoint_every=2,
        ),
        evaluate=dataclasses.replace(
            base.evaluate, pictures=4, windows_per_user=1, best_of=2, draws=200, shown_users=4
        ),
    )
    return _shared(made)


RECIPES: dict[str, Callable[[], Recipe]] = {"demo": demo, "smoke": smoke}


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
