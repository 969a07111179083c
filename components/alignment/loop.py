"""The one loop that trains a generator, whatever the method: phases, exact resume, guards, several processes.

    phase.take(at) ─▶ Step: loss, rate, figures ─▶ gradient (averaged over processes) ─▶ clip ─▶ AdamW
         ▲                                                                                        │
         └──────── next step ◀── checkpoint ◀── guards may stop ◀── phase.look(done) ◀────────────┘

A method is a list of phases (grounding, then fine-tuning; imitation, then GRPO). All randomness comes from one
generator whose state is in every checkpoint, so that a run killed at any instant ends on the bits of one left alone.
Under ``torchrun`` every process draws the same batch, works on its share of it, and gradients are averaged.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from couturier.components.alignment.sharding import clip, learned_state, load_whole, whole_state
from couturier.components.errors import TrainingError
from couturier.components.files import write_json
from couturier.components.lineage.checkpoints import (
    Checkpoint,
    Checkpoints,
    generator_tensor,
    load_optimiser,
    optimiser_tensors,
)
from couturier.components.lineage.stages import StageContext
from couturier.components.runtime import matmul_flops
from couturier.components.together import agree, as_kept, average_gradients, in_shares, means, rank, told, world


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a phase made of one step, before the update."""

    loss: Tensor
    rate: float
    """Learning rate of the update."""
    windows: np.ndarray
    """What the batch was made of: kept for replay when the loss is no number."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Figures for the curves."""
    note: str = ""
    """Shown beside the progress bar."""
    tokens: int = 0
    """Read by the model with a gradient."""
    drawn: int = 0
    """Tokens read or drawn without one."""
    pictures: int = 0
    """Drawn."""


class Phase(Protocol):
    """One part of a method."""

    name: str
    steps: int
    weight_decay: float
    fresh: bool
    """Whether the optimiser's moments start from nothing here; else they go on from the phase before."""
    log_every: int
    look_every: int
    """Ask ``look`` after so many of its steps, and at its end; 0: never."""
    advice: str
    """Which setting to change when the loss is no number."""

    def begin(self) -> None:
        """Called when the phase is reached for the first time, not after a resume."""

    def take(self, at: int) -> Step:
        """The ``at``-th step of the phase, from 0."""
        ...

    def look(self) -> dict[str, float]:
        """Figures that are too dear for every step."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What the phase keeps from step to step, beyond the model."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave."""


class Keeper(Protocol):
    """Something beside the phases that a checkpoint must hold: a fitted reward, the guards' memory."""

    def begin(self) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: Mapping[str, Tensor]) -> None: ...


class Guard(Protocol):
    """Decides after each step, and after each look, whether the run may go on."""

    def reason_to_stop(self, step: int, values: Mapping[str, float]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What all phases share."""

    clip: float = 1.0
    """Largest norm of the gradient."""
    checkpoint_every: int = 25


class Loop:
    """Runs phases one after the other over one model.

    Args:
        name: of the stage; it begins every error and the progress line.
        model: saved whole in checkpoints.
        parameters: those that learn.
        random: the generator that every phase draws from.
        keepers: saved in checkpoints by name; begun once, before the first step.
        guard: asked after every step and every look.
    """

    def __init__(
        self,
        ctx: StageContext,
        name: str,
        model: nn.Module,
        parameters: list[nn.Parameter],
        phases: Sequence[Phase],
        random: torch.Generator,
        config: LoopConfig,
        *,
        keepers: Mapping[str, Keeper] | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.ctx, self.name, self.model, self.parameters = ctx, name, model, parameters
        self.phases = [phase for phase in phases if phase.steps > 0]
        self.random, self.config = random, config
        self.keepers, self.guard = keepers or {}, guard
        self.checkpoints = Checkpoints(ctx.scratch / "checkpoints")
        self.curves: list[tuple[int, str, float]] = []
        self.step, self.stopped = 0, ""
        self.optimiser: torch.optim.AdamW | None = None
        self.meter = Meter(sum(p.numel() for p in parameters))
        saved = self.checkpoints.newest()
        self._check_together(saved.step if saved is not None else 0)
        if saved is not None:
            self._restore(saved)
        else:
            for keeper in self.keepers.values():
                keeper.begin()
                if world() > 1:  # what each fitted alone may differ in its last bits
                    kept = dict(keeper.state())
                    agree(kept.values())
                    keeper.load(kept)

    @property
    def total(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def run(self) -> None:
        """To the end of the last phase, or until a guard stops it.

        Raises:
            TrainingError: a loss that is no number; what the batch was made of is kept in ``replay.json``.
        """
        self.ctx.progress.start(self.name, self.total, done=self.step, unit="steps")
        while self.step < self.total and not self.stopped:
            phase, at = self._where()
            if at == 0:
                self._enter(phase)
            self._take(phase, at)
            if self.step % self.config.checkpoint_every == 0 and self.step < self.total:
                self._save()
        self.ctx.progress.stop()
        self._report_speed()

    def _where(self) -> tuple[Phase, int]:
        at = self.step
        for phase in self.phases:
            if at < phase.steps:
                return phase, at
            at -= phase.steps
        raise TrainingError(f"{self.name}: step {self.step} is beyond the last of {self.total}.")

    def _enter(self, phase: Phase) -> None:
        phase.begin()
        if phase.fresh or self.optimiser is None:
            self.optimiser = self._new_optimiser(phase)

    def _new_optimiser(self, phase: Phase) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self.parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=phase.weight_decay, foreach=self._foreach()
        )

    def _foreach(self) -> bool | None:
        """Torch's own choice; with parameters in shares beside whole ones they must be updated one by one."""
        return False if any(in_shares(value) for value in self.parameters) else None

    def _take(self, phase: Phase, at: int) -> None:
        began = time.perf_counter()
        step = phase.take(at)
        norm = self._update(phase, step)
        values = means({**step.values, "grad_norm": norm})
        self.meter.add(step, time.perf_counter() - began)
        self.ctx.progress.advance(note=step.note)
        if self.step % phase.log_every == 0:
            self._log(values)
        self.step += 1
        self._stop_if(values)
        done = at + 1
        if phase.look_every and (done % phase.look_every == 0 or done == phase.steps):
            found = told(phase.look)
            self._log(found)
            self._stop_if(found)

    def _stop_if(self, values: Mapping[str, float]) -> None:
        if self.guard is not None and not self.stopped:
            self.stopped = self.guard.reason_to_stop(self.step, values)

    def _update(self, phase: Phase, step: Step) -> float:
        assert self.optimiser is not None
        loss = means({"loss": float(step.loss.detach())})["loss"]
        if not np.isfinite(loss):
            part = f".{rank()}" if world() > 1 else ""
            replay = self.ctx.scratch / f"replay{part}.json"
            write_json(replay, {"step": self.step, "phase": phase.name, "windows": np.asarray(step.windows).tolist()})
            raise TrainingError(
                f"{self.name}: the loss is {loss} at step {self.step} ({phase.name}); the windows of its batch are in "
                f"{replay.name}. The last checkpoint is kept: {phase.advice} and run again."
            )
        for group in self.optimiser.param_groups:
            group["lr"] = step.rate
        self.optimiser.zero_grad(set_to_none=True)
        step.loss.backward()
        average_gradients(self.parameters)
        norm = clip(self.parameters, self.config.clip)
        self.optimiser.step()
        return norm

    def _log(self, values: Mapping[str, float]) -> None:
        self.curves += [(self.step, name, value) for name, value in values.items()]
        if rank() == 0:
            self.ctx.tracker.metrics(values, step=self.step)

    def log(self, values: Mapping[str, float]) -> None:
        """Add figures to the curves and the tracker, at the present step."""
        self._log(values)

    def last(self, steps: int = 20) -> dict[str, float]:
        """Every figure of the last steps, averaged."""
        found: dict[str, list[float]] = {}
        for step, name, value in self.curves:
            if step >= self.step - steps:
                found.setdefault(name, []).append(value)
        return {name: round(float(np.mean(values)), 5) for name, values in found.items()}

    def save_curves(self, folder: Path) -> None:
        """Every figure of every step → ``curves.parquet`` (step, name, value)."""
        schema = {"step": pl.Int64, "name": pl.String, "value": pl.Float64}
        pl.DataFrame(self.curves, schema=schema, orient="row").write_parquet(folder / "curves.parquet")

    def _report_speed(self) -> None:
        if rank() == 0 and self.meter.seconds:
            self.ctx.tracker.metrics(self.meter.figures(), step=self.step)

    def _save(self) -> None:
        """All processes put the tensors together; the first writes them."""
        assert self.optimiser is not None
        tensors, facts = optimiser_tensors("optimiser", self.optimiser)
        tensors |= {f"model.{name}": value for name, value in learned_state(self.model).items()}
        tensors["random"] = generator_tensor(self.random)
        phase, _ = self._where()
        parts: dict[str, Mapping[str, Tensor]] = {name: keeper.state() for name, keeper in self.keepers.items()}
        for name, state in {**parts, "phase": phase.state()}.items():
            tensors |= {f"{name}.{key}": value for key, value in state.items()}
        tensors = whole_state(tensors)
        if rank() == 0:
            told_too = {"optimiser": facts, "curves": self.curves, "stopped": self.stopped}
            self.checkpoints.save(self.step, tensors, told_too)

    def _restore(self, saved: Checkpoint) -> None:
        self.step, self.curves = saved.step, [tuple(row) for row in saved.facts["curves"]]
        self.stopped = saved.facts["stopped"]
        load_whole(self.model, _under("model", saved.tensors))
        self.random.set_state(saved.tensors["random"])
        for name, keeper in self.keepers.items():
            keeper.load(_under(name, saved.tensors))
        phase, at = self._where()
        if at:
            phase.load(_under("phase", saved.tensors))
        self.optimiser = self._new_optimiser(phase)
        load_optimiser("optimiser", self.optimiser, self._moments_as_kept(saved.tensors), saved.facts["optimiser"])
        for group in self.optimiser.param_groups:
            group["foreach"] = self._foreach()

    def _moments_as_kept(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimiser's state of a checkpoint, each tensor in this process's share of its parameter."""
        found = {}
        for name, value in tensors.items():
            group, _, key = name.partition(".")
            if group == "optimiser":
                parameter = self.parameters[int(key.partition(".")[0])]
                found[name] = as_kept(value, parameter) if value.shape == parameter.shape else value
        return found

    def _check_together(self, step: int) -> None:
        everyone = means({"step": float(step)})["step"]
        if everyone != step:
            raise TrainingError(
                f"{self.name}: this process goes on from step {step}, the others from {everyone:g} on average. "
                "The output folder must be one that all machines see."
            )


class Meter:
    """What the training cost: tokens and pictures a second, and the share of the machine's own matrix product.

    A token read with a gradient costs 6 operations a parameter, one read or drawn without 2 (Kaplan et al., arXiv
    2001.08361, section 2.1). The peak is measured on this machine, not read off a data sheet.
    """

    def __init__(self, parameters: int) -> None:
        self.parameters, self.seconds = parameters, 0.0
        self.tokens = self.drawn = self.pictures = 0

    def add(self, step: Step, seconds: float) -> None:
        self.seconds += seconds
        self.tokens, self.drawn = self.tokens + step.tokens, self.drawn + step.drawn
        self.pictures += step.pictures

    def figures(self) -> dict[str, float]:
        """``tokens_per_s``, ``pictures_per_s``, ``flops_per_s`` and ``mfu``, over all steps of this process."""
        flops = self.parameters * (6 * self.tokens + 2 * self.drawn) / self.seconds
        return {
            "tokens_per_s": (self.tokens + self.drawn) / self.seconds,
            "pictures_per_s": self.pictures / self.seconds,
            "flops_per_s": flops,
            "mfu": flops / matmul_flops(),
        }


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
