"""Stage ``sft``: supervised fine-tuning of the any-to-any model on what people took next.

First it is grounded: a fresh tiny model learns what each picture and each phrase looks like in codes, from made-up
histories ("draw this one", "copy one of these or draw what sells"), no person involved. Then it is fine-tuned: history
in, codes of the next basket's items out, loss on picture codes only (generation.md 1.4). A share of prompts loses its
condition, for guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from couturier.components.alignment.batches import WindowSampler, picture_codes
from couturier.components.alignment.loop import Loop, LoopConfig, Phase, Step
from couturier.components.alignment.sharding import spread
from couturier.components.data.formats import Catalogue, Windows
from couturier.components.errors import ConfigError
from couturier.components.generator.codec import load_codec
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.generator.language import LanguageGenerator
from couturier.components.generator.memory import PUBLISHED
from couturier.components.generator.published import check_settings, tell_memory
from couturier.components.generator.tokenise import load_eyes, one_cycle
from couturier.components.generator.types import FAMILIES, DiffusionConfig
from couturier.components.lineage.stages import StageContext
from couturier.components.runtime import seeded, threads
from couturier.components.together import rank, share, world

if TYPE_CHECKING:
    from couturier.components.generator.diffusion import DiffusionGenerator


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the generator is fine-tuned."""

    seed: int = 0
    threads: int = 2
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Of the other family; used where ``generator.family`` is "diffusion"."""
    grounding_steps: int = 160
    """Steps of "draw this", then "copy one of these", before people's data; 0 for a published model."""
    grounding_copies: float = 0.5
    """Share of grounding targets that come from the history, the rest is drawn by training popularity."""
    steps: int = 260
    batch: int = 48
    """Windows a step."""
    targets: int = 3
    """Items of the next basket learned a window; they share the prompt's computation."""
    lr: float = 1e-3
    grounding_lr: float = 3e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    condition_dropout: float = 0.1
    checkpoint_every: int = 100
    valid_every: int = 50
    valid_windows: int = 128
    strategy: str = "ddp"
    """How several processes hold the model: "ddp", each a copy, or "fsdp", each a share of every layer."""

    @property
    def history(self) -> int:
        """Favourites that the chosen family looks at."""
        return self.diffusion.history if self.generator.family == "diffusion" else self.generator.history


def run(ctx: StageContext) -> None:
    """``sequences``, ``tokenise`` → ``model/``, ``curves.parquet``; facts: nats of valid users, true and wrong."""
    config: Config = ctx.config
    with threads(config.threads):
        learner = _Learner(ctx, config)
        generator = learner.generator
        spread(generator, config.strategy)
        parameters = generator.parameters_to_train()
        loop = Loop(
            ctx,
            "sft",
            generator,
            parameters,
            [_Grounding(learner), _Tuning(learner)],
            learner.random,
            LoopConfig(clip=config.clip, checkpoint_every=config.checkpoint_every),
        )
        loop.run()
        generator.eval().save(ctx.out / "model")
        ctx.facts.update(learner.validate())
    if rank() == 0:
        loop.save_curves(ctx.out)
    ctx.facts["parameters"] = sum(p.numel() for p in parameters)


def build_generator(config: Config, ctx: StageContext, catalogue: Catalogue) -> LanguageGenerator | DiffusionGenerator:
    """The model to fine-tune, of the chosen family, on this catalogue; a Janus is tiny or published, an Emu3
    published.

    Raises:
        ConfigError: no such family, settings that do not fit each other, or a model that does not fit into memory.
    """
    chosen, tokenise = config.generator, ctx.inputs["tokenise"]
    if chosen.family not in FAMILIES:
        raise ConfigError(f"sft.generator.family is {chosen.family!r}; choose one of {', '.join(FAMILIES)}.")
    check_settings(chosen)
    codes_IL = load_file(tokenise / "codes.safetensors")["codes_IL"]
    if chosen.family in PUBLISHED and chosen.base:
        kept = {"windows": config.batch, "targets": config.targets, "items": len(catalogue)}
        kept["shares"] = world() if config.strategy == "fsdp" else 1
        needed = tell_memory(chosen, kept, edge=round(codes_IL.shape[1] ** 0.5))
        ctx.tracker.params({"memory_estimate_bytes": needed.total})
        if chosen.family == "emu3":
            from couturier.components.generator.emu3 import Emu3Generator

            return Emu3Generator.published(chosen, catalogue, codes_IL, seed=config.seed)
        return JanusGenerator.published(chosen, catalogue, seed=config.seed)
    if chosen.base:
        raise ConfigError(
            f"sft.generator.base is {chosen.base!r}, a Janus, but sft.generator.family is {chosen.family!r}. "
            "Leave the base empty (of tokenise, too), or set the family to janus."
        )
    codec, eyes = load_codec(tokenise / "codec"), load_eyes(tokenise / "eyes")
    if chosen.family == "diffusion":
        from couturier.components.generator.diffusion import DiffusionGenerator

        return DiffusionGenerator.fresh(
            config.diffusion, catalogue, eyes=eyes, codec=codec, codes_IL=codes_IL, seed=config.seed
        )
    return JanusGenerator.tiny(
        chosen, catalogue, eyes=eyes, codebook=codec.codebook_size, codes=codes_IL.shape[1], seed=config.seed
    )


class _Learner:
    """What grounding and fine-tuning share."""

    def __init__(self, ctx: StageContext, config: Config) -> None:
        self.config = config
        catalogue = Catalogue.load(ctx.inputs["sequences"])
        self.items = len(catalogue)
        self.popularity_I = torch.from_numpy(catalogue.items["purchases"].to_numpy().astype(np.float64))
        self.codes_IL = load_file(ctx.inputs["tokenise"] / "codes.safetensors")["codes_IL"]
        self.train = Windows.load(ctx.inputs["sequences"], "train")
        self.valid = Windows.load(ctx.inputs["sequences"], "valid")
        self.generator = build_generator(config, ctx, catalogue)
        self.random = seeded(config.seed, "sft", "batches")
        self.sampler = WindowSampler(self.train, self.random, targets=config.targets)

    def step(
        self,
        phase: Phase,
        histories_UK: np.ndarray | Tensor,
        keep_U: Tensor,
        codes_UnL: Tensor,
        rate: float,
        windows: np.ndarray,
    ) -> Step:
        """The generator's loss on this process's share of the codes of ``n`` pictures after each history."""
        own = share(len(windows))
        loss, tokens = self.generator.loss(histories_UK[own], codes_UnL[own], keep_U=keep_U[own], random=self.random)
        values = {f"{phase.name}_nats": float(loss.detach()) * codes_UnL.shape[-1]}
        return Step(loss=loss, rate=rate, windows=windows[own], values=values, tokens=tokens)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Nats a picture over validation users with their own, another user's and no history."""
        count = min(self.config.valid_windows, len(self.valid))
        rows = np.arange(count)
        targets = self.valid.basket[self.valid.basket_offsets[rows]]
        codes = picture_codes(self.codes_IL, targets)
        # The next user's history; windows lie user by user.
        wrong = other_users(self.valid)[rows]
        true = self.generator.nll(self.valid.favourites_WK[rows], codes)
        other = self.generator.nll(self.valid.favourites_WK[wrong], codes)
        none = self.generator.nll(self.valid.favourites_WK[rows], codes, unconditional=True)
        return {
            "valid_nats": float(true.mean()),
            "valid_nats_wrong": float(other.mean()),
            "valid_nats_unconditional": float(none.mean()),
            "valid_gap": float((other - true).mean()),
        }


class _Grounding:
    """Made-up histories of growing length; the targets are copies of shown items or drawn by what sells.

    The first half is "draw this one", then "copy one of four", then "copy one of these or draw what sells". Prompts
    without their condition always learn what sells. All of it is there so that fine-tuning starts with nothing
    large left to unlearn: otherwise it first forgets how to copy, and takes hundreds of steps to come back.
    """

    name, fresh, log_every, look_every = "grounding", True, 10, 0
    advice = "lower sft.grounding_lr"

    def __init__(self, learner: _Learner) -> None:
        self.learner, config = learner, learner.config
        self.steps, self.weight_decay = config.grounding_steps, config.weight_decay

    def begin(self) -> None:
        """Nothing is kept from step to step."""

    def take(self, at: int) -> Step:
        learner, config, random = self.learner, self.learner.config, self.learner.random
        done = at / config.grounding_steps
        k = 1 if done < 0.5 else min(4, config.history) if done < 0.75 else config.history
        copies = config.grounding_copies if done >= 0.75 else 1.0
        # Short prompts are cheap, so more of them make a step.
        count, each = (4 * config.batch, 1) if k == 1 else (config.batch, config.targets)
        weights = learner.popularity_I.expand(count, -1)
        shown = torch.multinomial(weights if copies < 1 else torch.ones(count, learner.items), k, generator=random)
        rank = torch.arange(k, dtype=torch.float64) + 2
        picks = torch.multinomial((1 / rank).expand(count, -1), each, replacement=True, generator=random)
        sells = torch.multinomial(weights, each, generator=random)
        keep = torch.rand(count, generator=random) >= (0.3 if k == 1 else config.condition_dropout)
        copied = (torch.rand(count, each, generator=random) < copies) & keep[:, None]
        codes = learner.codes_IL[torch.where(copied, shown.gather(1, picks), sells)]
        # Grounding keeps its rate: the cosine belongs to what people did.
        late = at >= config.grounding_steps // 2
        rate = config.grounding_lr * min(1.0, (at + 1) / 20) * (0.5 if late else 1.0)
        return learner.step(self, shown, keep, codes, rate, np.arange(count))

    def look(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing beyond the model."""


class _Tuning:
    """History in, codes of the next basket's items out."""

    # The moments of grounding are kept.
    name, fresh, log_every = "sft", False, 10
    advice = "lower sft.lr"

    def __init__(self, learner: _Learner) -> None:
        self.learner, config = learner, learner.config
        self.steps, self.weight_decay, self.look_every = config.steps, config.weight_decay, config.valid_every

    def begin(self) -> None:
        """Nothing is kept from step to step."""

    def take(self, at: int) -> Step:
        learner, config = self.learner, self.learner.config
        rows, targets = learner.sampler.draw(config.batch)
        keep = torch.rand(len(rows), generator=learner.random) >= config.condition_dropout
        histories, codes = learner.train.favourites_WK[rows], picture_codes(learner.codes_IL, targets)
        return learner.step(self, histories, keep, codes, config.lr * one_cycle(at, config.steps), rows)

    def look(self) -> dict[str, float]:
        return self.learner.validate()

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing beyond the model."""


def other_users(windows: Windows) -> np.ndarray:
    """For every window, a window of another user: the one half the users further on. int64 ``[W]``.

    Deterministic, so that every model is judged against the same wrong users.
    """
    users = len(windows.users)
    first = np.searchsorted(windows.user_W, np.arange(users), side="left")
    count = np.bincount(windows.user_W, minlength=users)
    partner = (windows.user_W + max(1, users // 2)) % users
    place = np.arange(len(windows)) - first[windows.user_W]
    return first[partner] + place % count[partner]
