"""Imitation: fine-tuning on items that should be drawn (:mod:`~couturier.components.alignment.distil` says which).

Legend: U windows, T targets a window, I items, L codes a picture, K codebook entries.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from couturier.components.alignment.distil import DistilConfig, draw_evenly, imitation_loss
from couturier.components.alignment.loop import Step
from couturier.components.alignment.scene import Scene
from couturier.components.alignment.watch import Watch
from couturier.components.generator.tokenise import one_cycle
from couturier.components.together import share


class Imitation:
    """A phase of the loop."""

    name = "imitation"
    fresh = True
    log_every = 1
    advice = "lower rl.distil.lr"

    def __init__(self, scene: Scene, config: DistilConfig, watch: Watch) -> None:
        self.scene, self.config, self.watch = scene, config, watch
        self.steps, self.weight_decay, self.look_every = config.steps, config.weight_decay, config.steps

    def begin(self) -> None:
        """Nothing is kept from step to step."""

    def take(self, at: int) -> Step:
        """One step on items drawn from what is wanted."""
        scene, config, policy = self.scene, self.config, self.scene.policy
        rows, _ = scene.sampler.draw(config.prompts)
        p_UI = scene.wanted(rows)
        items_UT = draw_evenly(p_UI, config.targets, scene.random)
        keep_U = torch.rand(len(rows), generator=scene.random) >= config.condition_dropout
        own = share(len(rows))
        prompts = policy.prompts.build(scene.history(rows[own]))
        prompts = prompts.where(keep_U[own], prompts.unconditional(policy.prompts.pad_id))
        logits_UTLK = policy.train().logits(prompts, scene.codes_IL[items_UT[own]])
        loss = imitation_loss(logits_UTLK, items_UT[own], p_UI[own], scene.codes_IL, scene.prefix_LI)
        nats = float(loss.detach()) * scene.codes_IL.shape[1]
        return Step(
            loss=loss,
            rate=config.lr * one_cycle(at, config.steps),
            windows=rows[own],
            values={"distil_nats": nats},
            note=f"{nats:.2f} nats",
            tokens=prompts.ids_UP.numel() + items_UT[own].numel() * (scene.codes_IL.shape[1] - 1),
        )

    def look(self) -> dict[str, float]:
        """What an encoder outside the reward sees."""
        return self.watch.look(self.scene.policy.eval())

    def state(self) -> dict[str, Tensor]:
        """Nothing beyond the model."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
