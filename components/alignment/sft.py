"""Stage ``sft``: supervised fine-tuning of the any-to-any model on what people took next.

First it is grounded: a fresh tiny model learns what each picture and each phrase looks like in codes, from made-up
histories ("draw this one", "copy one of these or draw what sells"), no person involved. Then it is fine-tuned: history
in, codes of the next basket's items out, loss on picture codes only (generation.md 1.4). A share of prompts loses its
condition, for guidance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from couturier.components.alignment.batches import WindowSampler, picture_codes
from couturier.components.data.formats import Catalogue, Windows
from couturier.components.errors import TrainingError
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.generator.tokenise import load_eyes, one_cycle
from couturier.components.lineage.checkpoints import (
    Checkpoints,
    generator_tensor,
    load_module,
    load_optimiser,
    module_tensors,
    optimiser_tensors,
)
from couturier.components.lineage.stages import StageContext
from couturier.components.runtime import seeded, threads


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the generator is fine-tuned."""

    seed: int = 0
    threads: int = 2
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
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


def run(ctx: StageContext) -> None:
    """``sequences``, ``tokenise`` → ``model/``, ``curves.parquet``; facts: nats of valid users, true and wrong."""
    config: Config = ctx.config
    ctx.tracker.params(_flat(asdict(config)))
    with threads(config.threads):
        trainer = _Trainer(ctx, config)
        trainer.fit()
        trainer.generator.eval().save(ctx.out / "model")
        ctx.facts.update(trainer.validate())
    frame = pl.DataFrame(
        trainer.curves, schema={"step": pl.Int64, "name": pl.String, "value": pl.Float64}, orient="row"
    )
    frame.write_parquet(ctx.out / "curves.parquet")
    ctx.facts["parameters"] = sum(p.numel() for p in trainer.generator.parameters_to_train())


def build_generator(config: GeneratorConfig, ctx: StageContext, catalogue: Catalogue, seed: int) -> JanusGenerator:
    """The model to fine-tune, tiny or published, on this catalogue."""
    if config.base:
        return JanusGenerator.published(config, catalogue)
    codes_IL = load_file(ctx.inputs["tokenise"] / "codes.safetensors")["codes_IL"]
    from couturier.components.generator.codec import load_codec

    codec = load_codec(ctx.inputs["tokenise"] / "codec")
    return JanusGenerator.tiny(
        config,
        catalogue,
        eyes=load_eyes(ctx.inputs["tokenise"] / "eyes"),
        codebook=codec.codebook_size,
        codes=codes_IL.shape[1],
        seed=seed,
    )


class _Trainer:
    """One loop over grounding and fine-tuning steps; its whole state goes into a checkpoint."""

    def __init__(self, ctx: StageContext, config: Config) -> None:
        self.ctx, self.config = ctx, config
        catalogue = Catalogue.load(ctx.inputs["sequences"])
        self.items = len(catalogue)
        self.popularity_I = torch.from_numpy(catalogue.items["purchases"].to_numpy().astype(np.float64))
        self.codes_IL = load_file(ctx.inputs["tokenise"] / "codes.safetensors")["codes_IL"]
        self.train = Windows.load(ctx.inputs["sequences"], "train")
        self.valid = Windows.load(ctx.inputs["sequences"], "valid")
        self.generator = build_generator(config.generator, ctx, catalogue, config.seed)
        self.parameters = self.generator.parameters_to_train()
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        self.random = seeded(config.seed, "sft", "batches")
        self.sampler = WindowSampler(self.train, self.random, targets=config.targets)
        self.checkpoints = Checkpoints(ctx.scratch / "checkpoints")
        self.curves: list[tuple[int, str, float]] = []
        self.step = 0
        if (saved := self.checkpoints.newest()) is not None:
            load_module("model", self.generator, saved.tensors)
            load_optimiser("optimiser", self.optimiser, saved.tensors, saved.facts["optimiser"])
            self.random.set_state(saved.tensors["random"])
            self.step, self.curves = saved.step, [tuple(row) for row in saved.facts["curves"]]

    def fit(self) -> None:
        config, total = self.config, self.config.grounding_steps + self.config.steps
        self.ctx.progress.start("sft", total, done=self.step, unit="steps")
        while self.step < total:
            grounding = self.step < config.grounding_steps
            at, of = (
                (self.step, config.grounding_steps) if grounding else (self.step - config.grounding_steps, config.steps)
            )
            # Grounding keeps its rate: the cosine belongs to what people did.
            rate = self._grounding_rate() if grounding else config.lr * one_cycle(at, of)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            loss = self._grounding_loss() if grounding else self._loss()
            norm = self._update(loss)
            self._log("grounding" if grounding else "sft", float(loss.detach()), norm)
            self.step += 1
            self.ctx.progress.advance()
            if self.step % config.checkpoint_every == 0 and self.step < total:
                self._save()
        self.ctx.progress.stop()

    def _grounding_rate(self) -> float:
        late = self.step >= self.config.grounding_steps // 2
        return self.config.grounding_lr * min(1.0, (self.step + 1) / 20) * (0.5 if late else 1.0)

    def _loss(self) -> Tensor:
        rows, targets = self.sampler.draw(self.config.batch)
        prompts = self.generator.prompts.build(self.train.favourites_WK[rows])
        keep = torch.rand(len(rows), generator=self.random) >= self.config.condition_dropout
        prompts = prompts.where(keep, prompts.unconditional(self.generator.prompts.pad_id))
        return -self.generator.log_prob(prompts, picture_codes(self.codes_IL, targets)).mean()

    def _grounding_loss(self) -> Tensor:
        """Made-up histories of growing length; the targets are copies of shown items or drawn by what sells.

        The first half is "draw this one", then "copy one of four", then "copy one of these or draw what sells". Prompts
        without their condition always learn what sells. All of it is there so that fine-tuning starts with nothing
        large left to unlearn: otherwise it first forgets how to copy, and takes hundreds of steps to come back.
        """
        config, random = self.config, self.random
        at = self.step / config.grounding_steps
        k = 1 if at < 0.5 else min(4, config.generator.history) if at < 0.75 else config.generator.history
        copies = config.grounding_copies if at >= 0.75 else 1.0
        # Short prompts are cheap, so more of them make a step.
        count, each = (4 * config.batch, 1) if k == 1 else (config.batch, config.targets)
        weights = self.popularity_I.expand(count, -1)
        shown = torch.multinomial(weights if copies < 1 else torch.ones(count, self.items), k, generator=random)
        rank = torch.arange(k, dtype=torch.float64) + 2
        picks = torch.multinomial((1 / rank).expand(count, -1), each, replacement=True, generator=random)
        sells = torch.multinomial(weights, each, generator=random)
        keep = torch.rand(count, generator=random) >= (0.3 if k == 1 else config.condition_dropout)
        copied = (torch.rand(count, each, generator=random) < copies) & keep[:, None]
        prompts = self.generator.prompts.build(shown)
        prompts = prompts.where(keep, prompts.unconditional(self.generator.prompts.pad_id))
        return -self.generator.log_prob(
            prompts, self.codes_IL[torch.where(copied, shown.gather(1, picks), sells)]
        ).mean()

    def _update(self, loss: Tensor) -> float:
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"sft: the loss is {float(loss.detach())} at step {self.step}. The last checkpoint is kept; "
                f"lower sft.lr (now {self.config.lr}) and run again."
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimiser.step()
        return float(norm)

    def _log(self, phase: str, loss: float, norm: float) -> None:
        nats = loss * self.codes_IL.shape[1]
        values = {f"{phase}_nats": nats, "grad_norm": norm}
        if phase == "sft" and (self.step + 1) % self.config.valid_every == 0:
            found = self.validate()
            values |= found
            self.ctx.progress.advance(0, note=f"gap {found['valid_gap']:.2f} nats")
        if self.step % 10 == 0 or "valid_gap" in values:
            self.curves += [(self.step, name, value) for name, value in values.items()]
            self.ctx.tracker.metrics(values, step=self.step)

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

    def _save(self) -> None:
        tensors, facts = optimiser_tensors("optimiser", self.optimiser)
        tensors |= module_tensors("model", self.generator) | {"random": generator_tensor(self.random)}
        self.checkpoints.save(self.step, tensors, {"optimiser": facts, "curves": self.curves})


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


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
