"""Rejection sampling: fine-tuning on the policy's own best pictures, and on what it should fall back to.

    windows ─▶ candidates ─▶ reward ─▶ the best few that beat the fallback ─┐
                  fallback: items of the catalogue that are wanted ─────────┴▶ fine-tuning on their codes

The accept-or-fall-back rule is that of Nextdoor's subject lines (arXiv 2312.12457): what was generated is used only
where the reward model prefers it to what was there anyway. Fine-tuning on accepted samples is RAFT (Dong et al.,
arXiv 2304.06767). As targets, fallbacks keep the policy from learning only from people it already serves well.

Legend: U windows, n candidates, T targets a window, L codes a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from couturier.components.alignment.distil import evenly
from couturier.components.alignment.loop import Step
from couturier.components.alignment.rewards import score
from couturier.components.alignment.scene import Scene
from couturier.components.alignment.watch import Watch
from couturier.components.errors import ConfigError
from couturier.components.generator.accept import accept_or_fall_back
from couturier.components.together import share


@dataclass(frozen=True, kw_only=True)
class RejectionConfig:
    """How many pictures compete, and how many are learned."""

    steps: int = 40
    prompts: int = 32
    """Windows a step."""
    candidates: int = 16
    """Drawn a window."""
    targets: int = 6
    """Learned a window: accepted candidates, best first, then fallbacks."""
    temperature: float = 1.0
    lr: float = 2e-4
    warm_up_steps: int = 5
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.targets <= self.candidates:
            raise ConfigError(
                f"rl.rejection.targets is {self.targets} of rl.rejection.candidates={self.candidates}; it must be at "
                "least 1, and cannot be more than are drawn."
            )


class Rejection:
    """A phase of the loop."""

    name = "rejection"
    fresh = True
    log_every = 1
    advice = "lower rl.rejection.lr"

    def __init__(self, scene: Scene, config: RejectionConfig, watch: Watch, *, look_every: int) -> None:
        self.scene, self.config, self.watch = scene, config, watch
        self.steps, self.look_every, self.weight_decay = config.steps, look_every, config.weight_decay

    def begin(self) -> None:
        """Nothing is kept from step to step."""

    def take(self, at: int) -> Step:
        """Draw, compare with the fallbacks, learn what stands."""
        config, scene = self.config, self.scene
        rows, seeds = scene.choose(config.prompts)
        policy = scene.janus.eval()
        codes_UnL = policy.sample(scene.history(rows), config.candidates, seeds=seeds, temperature=config.temperature)
        targets_UTL, values = self.targets(rows, codes_UnL)
        prompts = policy.prompts.build(scene.history(rows))
        loss = -policy.train().log_prob(prompts, targets_UTL).mean()
        u, n, length = codes_UnL.shape
        return Step(
            loss=loss,
            rate=config.lr * min(1.0, (at + 1) / max(1, config.warm_up_steps)),
            windows=rows,
            values={"rejection_nats": float(loss.detach()) * length, **values},
            note=f"reward {values['reward']:.2f}",
            tokens=prompts.ids_UP.numel() + targets_UTL.numel(),
            drawn=prompts.ids_UP.numel() + u * n * length,
            pictures=u * n,
        )

    def targets(self, rows: np.ndarray, codes_UnL: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Codes to learn ``[U, T, L]`` for candidates of windows, and figures. Candidates and fallbacks are judged in
        one group each, so that what a picture adds to its group means the same for both."""
        config, scene = self.config, self.scene
        rollout = scene.rollout(rows, codes_UnL)
        reward_Un, terms = score(rollout, scene.weights)
        # Drawn for the whole batch, so that several processes draw what one would.
        offset_U1 = torch.rand(config.prompts, 1, generator=scene.random, dtype=torch.float64)[share(config.prompts)]
        items_UT = evenly(rollout.wanted_UI, config.targets, offset_U1)
        fallback_UTL = scene.codes_IL[items_UT]
        fallback_UT, _ = score(scene.rollout(rows, fallback_UTL), scene.weights)
        place_UT, accepted_UT = accept_or_fall_back(reward_Un, fallback_UT)
        best_UTL = codes_UnL.gather(1, place_UT[..., None].expand(-1, -1, codes_UnL.shape[-1]))
        values = scene.describe(rollout, reward_Un, terms) | {
            "accepted": float(accepted_UT.float().mean()),
            "fallback_reward": float(fallback_UT.mean()),
        }
        return torch.where(accepted_UT[..., None], best_UTL, fallback_UTL), values

    def look(self) -> dict[str, float]:
        """What an encoder outside the reward sees."""
        return self.watch.look(self.scene.janus.eval())

    def state(self) -> dict[str, Tensor]:
        """Nothing beyond the model."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
