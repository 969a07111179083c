"""Imitation: fine-tuning on items that should be drawn (:mod:`~couturier.components.alignment.distil` says which).

Legend: U windows, T targets a window, I items, L codes a picture, K codebook entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from couturier.components.alignment.distil import DistilConfig, draw_evenly, imitation_loss
from couturier.components.alignment.loop import Step
from couturier.components.alignment.scene import Scene
from couturier.components.alignment.watch import Watch
from couturier.components.generator.tokenise import one_cycle
from couturier.components.together import share


@dataclass(frozen=True, kw_only=True)
class Imitated:
    """A batch's loss in nats a code, the same in nats a picture, its windows, and how many tokens were read."""

    loss: Tensor
    nats: float
    windows: np.ndarray
    tokens: int


class Imitator:
    """Draws items from what is wanted and measures how surprised the policy is by them."""

    def __init__(self, scene: Scene, config: DistilConfig) -> None:
        self.scene, self.config = scene, config

    def loss(self, prompts: int) -> Imitated:
        """Of this process's share of ``prompts`` fresh windows."""
        scene, config, policy = self.scene, self.config, self.scene.janus
        rows, _ = scene.sampler.draw(prompts)
        p_UI = scene.wanted(rows)
        items_UT = draw_evenly(p_UI, config.targets, scene.random)
        keep_U = torch.rand(len(rows), generator=scene.random) >= config.condition_dropout
        own = share(len(rows))
        built = policy.prompts.build(scene.history(rows[own]))
        built = built.where(keep_U[own], built.unconditional(policy.prompts.pad_id))
        logits_UTLK = policy.train().logits(built, scene.codes_IL[items_UT[own]])
        loss = imitation_loss(logits_UTLK, items_UT[own], p_UI[own], scene.codes_IL, scene.prefix_LI)
        return Imitated(
            loss=loss,
            nats=float(loss.detach()) * scene.codes_IL.shape[1],
            windows=rows[own],
            tokens=built.ids_UP.numel() + items_UT[own].numel() * (scene.codes_IL.shape[1] - 1),
        )


class Imitation:
    """A phase of the loop."""

    name = "imitation"
    fresh = True
    log_every = 1
    advice = "lower rl.distil.lr"

    def __init__(self, imitator: Imitator, watch: Watch) -> None:
        self.imitator, self.watch, config = imitator, watch, imitator.config
        self.steps, self.weight_decay, self.look_every = config.steps, config.weight_decay, config.steps

    def begin(self) -> None:
        """Nothing is kept from step to step."""

    def take(self, at: int) -> Step:
        """One step on items drawn from what is wanted."""
        config = self.imitator.config
        made = self.imitator.loss(config.prompts)
        return Step(
            loss=made.loss,
            rate=config.lr * one_cycle(at, config.steps),
            windows=made.windows,
            values={"distil_nats": made.nats},
            note=f"{made.nats:.2f} nats",
            tokens=made.tokens,
        )

    def look(self) -> dict[str, float]:
        """What an encoder outside the reward sees."""
        return self.watch.look(self.imitator.scene.janus.eval())

    def state(self) -> dict[str, Tensor]:
        """Nothing beyond the model."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
