"""The one loop that fits a judge, whatever feeds it: exact resume, early stopping, several processes, mixed precision.

    examples ─▶ TrainBatch ─▶ judge.loss ─▶ gradient (averaged over processes) ─▶ AdamW, one cycle
                                                 │ every eval_every steps
                                                 └▶ validate(judge) ─▶ best weights kept, patience

Every step draws from generators of its own, seeded by its number, so a resumed run sees what the whole one saw. Under
``torchrun`` each process takes its share of every batch and gradients are averaged: the same run, in float tolerance,
as one process, for every loss that is a mean over users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from couturier.components.errors import ConfigError, TrainingError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.types import TrainBatch
from couturier.components.lineage.checkpoints import (
    Checkpoints,
    load_module,
    load_optimiser,
    module_tensors,
    optimiser_tensors,
)
from couturier.components.lineage.stages import Progress, Silent
from couturier.components.runtime import seeded
from couturier.components.together import average_gradients, from_first, rank, world

_UNDECAYED = "items.identity.weight"


class Examples(Protocol):
    """What feeds the loop. ``state`` and ``seek`` are its place in the data, for resume."""

    def batch(self, judge: ContentJudge, step: int) -> TrainBatch:
        """The batch of a step."""
        ...

    def rows(self) -> list[int]:
        """What the last batch was made of, named when its loss is no number."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON facts that ``seek`` takes back; empty where a step's number says it all."""
        ...

    def seek(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast."""

    seed: int = 0
    steps: int = 250
    learning_rate: float = 3e-3
    """Peak of a one-cycle schedule (AdamW)."""
    weight_decay: float = 0.05
    clip: float = 0.0
    """Largest norm of the gradient; 0 for no limit."""
    eval_every: int = 50
    patience: int = 6
    """Looks at validation without a better figure before the fit stops."""
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "patience", "checkpoint_every"):
            if vars(self)[name] < 1:
                raise ConfigError(f"judge.{name} is {vars(self)[name]}; it must be at least 1.")


class FitLoop:
    """Fits ``judge`` on ``examples``.

    Args:
        validate: a judge's figure on validation, higher is better; NaN when it cannot be had.
        checkpoints: where the loop saves itself; None for no resume.
        first: the number of the first step, for curves and seeds.
        log: called with named values and the step.
    """

    def __init__(
        self,
        judge: ContentJudge,
        examples: Examples,
        validate: Callable[[ContentJudge], float],
        config: LoopConfig,
        *,
        checkpoints: Checkpoints | None = None,
        first: int = 0,
        progress: Progress | None = None,
        log: Callable[[Mapping[str, float], int], None] = lambda values, step: None,
    ) -> None:
        self.judge, self.examples, self.validate, self.config = judge, examples, validate, config
        self.checkpoints, self.first, self.progress, self.log = checkpoints, first, progress or Silent(), log
        trained = [value for value in judge.parameters() if value.requires_grad]
        self.trained = trained
        # An identity that is not in the batch must not shrink: no decay there.
        rows = [value for name, value in judge.named_parameters() if value.requires_grad and name.endswith(_UNDECAYED)]
        groups: list[dict[str, Any]] = [
            {"params": [value for value in trained if all(value is not row for row in rows)]}
        ]
        groups += [{"params": rows, "weight_decay": 0.0}] if rows else []
        self.optimiser = torch.optim.AdamW(
            groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
        )
        self.step, self.best_figure, self.best_step, self.stopped = first, -math.inf, first, False
        self.best: dict[str, Tensor] = {}
        self.curves: list[tuple[int, str, float]] = []
        self._resume()

    @property
    def last(self) -> int:
        return self.first + self.config.steps

    def run(self) -> ContentJudge:
        """Fit to the end or until validation says enough; the judge of the best look, frozen.

        Raises:
            TrainingError: a loss that is no number; the message names what the batch was made of.
        """
        while self.step < self.last and not self.stopped:
            loss = self._step()
            self.step += 1
            if self.checkpoints and self.step % self.config.checkpoint_every == 0 and self.step < self.last:
                self._save(self.checkpoints)
            shown = f" valid {self.best_figure:.3f}" if self.best else ""
            self.progress.advance(note=f"loss {loss:.3f}{shown}")
        if self.best:
            load_module("best", self.judge, self.best)
        return self.judge.eval().requires_grad_(False)

    def _step(self) -> float:
        config, done = self.config, self.step - self.first
        one_cycle(self.optimiser, done, config.steps, config.learning_rate)
        # Told every part of a judge, which is not free.
        judge = self.judge if self.judge.training else self.judge.train()
        batch = self.examples.batch(judge, self.step)
        own = [f"process {rank()}"] if world() > 1 else []
        noise = seeded(config.seed, "judge", "loss", str(self.step), *own)
        device = self.judge.calibration.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss, parts = self.judge.loss(batch, noise)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"judge: the loss is {value} at step {self.step}, on training windows {self.examples.rows()}. "
                f"Lower judge.learning_rate (now {config.learning_rate}) and run again: the last checkpoint is kept."
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.trained)
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.trained, config.clip)
        self.optimiser.step()
        if done % 10 == 0:
            self._log({"loss": value} | {f"loss {name}": float(part) for name, part in parts.items()})
        if (done + 1) % config.eval_every == 0 or self.step + 1 == self.last:
            self._look()
        return value

    def _look(self) -> None:
        found = from_first(lambda: self.validate(self.judge.eval()))
        self._log({"valid_gauc": found})
        if math.isnan(found) or found > self.best_figure:
            self.best_figure, self.best_step = (self.best_figure if math.isnan(found) else found), self.step + 1
            self.best = {name: value.clone() for name, value in module_tensors("best", self.judge).items()}
        elif self.step + 1 - self.best_step >= self.config.patience * self.config.eval_every:
            self.stopped = True

    def _log(self, values: dict[str, float]) -> None:
        self.curves += [(self.step, name, value) for name, value in values.items() if not math.isnan(value)]
        self.log(values, self.step)

    def _save(self, checkpoints: Checkpoints) -> None:
        if rank() > 0:
            return
        tensors, facts = optimiser_tensors("optimiser", self.optimiser)
        tensors |= module_tensors("judge", self.judge) | self.best
        figure = None if math.isinf(self.best_figure) else self.best_figure
        best = {"figure": figure, "step": self.best_step, "stopped": self.stopped}
        place = self.examples.state()
        checkpoints.save(self.step, tensors, {"optimiser": facts, "best": best, "place": place, "curves": self.curves})

    def _resume(self) -> None:
        saved = self.checkpoints.newest() if self.checkpoints else None
        if saved is None:
            return
        self.step = saved.step
        load_module("judge", self.judge, saved.tensors)
        load_optimiser("optimiser", self.optimiser, saved.tensors, saved.facts["optimiser"])
        self.best = {name: value for name, value in saved.tensors.items() if name.startswith("best.")}
        best = saved.facts["best"]
        self.best_figure = -math.inf if best["figure"] is None else best["figure"]
        self.best_step, self.stopped = best["step"], best["stopped"]
        self.curves = [tuple(row) for row in saved.facts["curves"]]
        self.examples.seek(saved.facts["place"])


def one_cycle(optimiser: torch.optim.Optimizer, done: int, total: int, peak: float) -> None:
    """Set the learning rate of a step: up over the first tenth, then down a cosine."""
    rise = max(1, total // 10)
    share = (done - rise) / max(1, total - rise)
    rate = peak * ((done + 1) / rise if done < rise else 0.5 * (1 + math.cos(math.pi * share)))
    for group in optimiser.param_groups:
        group["lr"] = rate
