"""Group-relative policy optimisation of the generator.

    windows ─▶ prompts ─▶ sampler: n pictures a user ─▶ picture book ─▶ reward terms ─▶ advantages ─┐
                  ▲                (current policy)      (decode, judge)                             │
                  └──────────── updates: log-probabilities, ratio, KL to where GRPO began ◀──────────┘

Everything waits for everything. With one update a batch the ratio is 1 and nothing is clipped (generation.md 1.6).
Rollouts use no guidance by default: samples and gradients then belong to the same distribution; with guidance, the
gradient goes through the guided distribution too, so that they still do.

Legend: U users (windows), n pictures a user (a group), L codes a picture, K codebook entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from couturier.components.alignment.credit import CreditConfig, credited
from couturier.components.alignment.loop import Step
from couturier.components.alignment.rewards import advantages, score
from couturier.components.alignment.scene import Scene
from couturier.components.alignment.sharding import frozen_copy, learned_state, load_whole
from couturier.components.alignment.watch import Watch
from couturier.components.errors import ConfigError
from couturier.components.generator.language import LanguageGenerator
from couturier.components.generator.prompt import Prompts
from couturier.components.together import everyones, mean_over, means, share


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """How the policy is improved."""

    steps: int = 20
    """Updates."""
    prompts: int = 32
    """Windows a batch."""
    group: int = 8
    """Pictures a window."""
    temperature: float = 1.0
    guidance: float = 1.0
    """Of rollouts and, with them, of the gradient; 1 for none."""
    lr: float = 1.5e-4
    warm_up_steps: int = 5
    kl: float = 0.02
    """Weight of the per-code KL estimate to the policy that GRPO began with (k3 of Schulman); 0 leaves it out."""
    advantage_by_std: bool = True
    """Divide by the group's standard deviation; without, hard and easy groups count by their spread (Dr. GRPO)."""
    updates: int = 1
    """Updates a batch of samples."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """The ratio to the sampling policy counts between 1 - clip_low and 1 + clip_high; only of use with more than one
    update a batch (asymmetric as in DAPO, arXiv 2503.14476)."""
    drop_zero_variance: bool = False
    """Leave groups whose pictures all earn the same out of the mean, KL included (DAPO's filter)."""
    credit: CreditConfig = field(default_factory=CreditConfig)
    """Which codes of a picture that earned much count more; evenly by default."""

    def __post_init__(self) -> None:
        if self.updates < 1 or self.group < 2:
            raise ConfigError(
                f"rl.grpo.updates is {self.updates} and rl.grpo.group {self.group}; at least 1 update a batch and 2 "
                "pictures a group are needed, since a picture is compared with the others of its group."
            )


def policy_loss(
    lp_UnL: Tensor,
    old_UnL: Tensor,
    reference_UnL: Tensor,
    advantage_Un: Tensor,
    *,
    kl: float,
    clip: tuple[float, float] = (0.2, 0.28),
) -> tuple[Tensor, Tensor]:
    """``-mean_t[min(ratio * A, clip(ratio) * A) - kl * k3]`` (generation.md 1.6.6; clipping as in PPO, 1707.06347).

    Args:
        lp_UnL: log-probability of each code under the policy;  old_UnL: under the one that drew it (no gradient), so
            ratio = exp(lp - old);  reference_UnL: under the model it must stay close to.
        advantage_Un: one a picture, or ``[U, n, L]``, one a code.
        clip: how far below and above 1 the ratio counts.

    Returns:
        The loss of each code ``[U, n, L]``, and the KL estimate of each code ``k3 = exp(ref - lp) - (ref - lp) - 1``.
    """
    gap = reference_UnL - lp_UnL
    k3 = gap.exp() - gap - 1
    ratio = (lp_UnL - old_UnL).exp()
    a = advantage_Un[..., None] if advantage_Un.ndim == 2 else advantage_Un
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip[0], 1 + clip[1]) * a)
    return kl * k3 - gain, k3


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Samples that one or more updates learn from."""

    rows: np.ndarray
    codes_UnL: Tensor
    old_UnL: Tensor | None
    reference_UnL: Tensor | None
    advantage_Un: Tensor
    """Or ``[U, n, L]``, where codes share it unevenly."""
    values: dict[str, float]


class Grpo:
    """A phase of the loop."""

    name = "grpo"
    fresh = True
    log_every = 1
    weight_decay = 0.0
    advice = "lower rl.grpo.lr"

    def __init__(self, scene: Scene, config: GrpoConfig, watch: Watch, *, look_every: int) -> None:
        self.scene, self.config, self.watch = scene, config, watch
        self.steps, self.look_every = config.steps, look_every
        self.reference: LanguageGenerator | None = None
        self.batch: _Batch | None = None

    def begin(self) -> None:
        """GRPO must stay close to the policy it begins with."""
        self.reference = frozen_copy(self.scene.janus)

    def take(self, at: int) -> Step:
        """One update; every ``updates``-th draws new pictures first."""
        config, scene = self.config, self.scene
        fresh = at % config.updates == 0 or self.batch is None
        if fresh:
            self.batch = self._draw()
        batch = self.batch
        assert batch is not None and self.reference is not None
        prompts = scene.janus.prompts.build(scene.history(batch.rows))
        logits_UnLK = self._logits(scene.janus, prompts, batch)
        lp_UnL = _log_prob(logits_UnLK, batch.codes_UnL)
        if batch.old_UnL is None or batch.reference_UnL is None:
            reference_UnL = lp_UnL.detach()
            if config.kl:
                with torch.no_grad():
                    reference_UnL = _log_prob(self._logits(self.reference, prompts, batch), batch.codes_UnL)
            batch = self.batch = _Batch(**{**vars(batch), "old_UnL": lp_UnL.detach(), "reference_UnL": reference_UnL})
        assert batch.old_UnL is not None and batch.reference_UnL is not None
        per_code, k3 = policy_loss(
            lp_UnL,
            batch.old_UnL,
            batch.reference_UnL,
            batch.advantage_Un,
            kl=config.kl,
            clip=(config.clip_low, config.clip_high),
        )
        even_U = batch.advantage_Un.abs().flatten(1).amax(1) == 0
        loss = per_code.mean()
        if config.drop_zero_variance:
            kept_U = (~even_U).float()
            loss = mean_over((per_code.mean((1, 2)) * kept_U).sum(), kept_U.sum())
        ratio_UnL = (lp_UnL.detach() - batch.old_UnL).exp()
        u, n, length = batch.codes_UnL.shape
        branches = 1 if config.guidance == 1 else 2
        read = branches * (prompts.ids_UP.numel() + u * n * (length - 1))
        return Step(
            loss=loss,
            rate=config.lr * min(1.0, (at + 1) / max(1, config.warm_up_steps)),
            windows=batch.rows,
            values={
                "loss": float(loss.detach()),
                "kl_nats": float(k3.detach().sum(-1).mean()),
                "nats": float(-lp_UnL.detach().sum(-1).mean()),
                "entropy_nats": float(_entropy(logits_UnLK.detach()).mean()),
                "clipped": float((ratio_UnL - 1).abs().gt(config.clip_low).float().mean()),
                "zero_variance_groups": float(even_U.float().mean()),
                **batch.values,
            },
            note=f"reward {batch.values['reward']:.2f}",
            tokens=read,
            drawn=read * fresh * (1 + bool(config.kl) + config.credit.looks),
            pictures=u * n * fresh,
        )

    def _draw(self) -> _Batch:
        config, scene = self.config, self.scene
        rows, seeds = scene.choose(config.prompts)
        codes_UnL = scene.janus.eval().sample(
            scene.history(rows), config.group, seeds=seeds, temperature=config.temperature, guidance=config.guidance
        )
        rollout = scene.rollout(rows, codes_UnL)
        reward_Un, terms = score(rollout, scene.weights)
        advantage, shares = credited(
            scene.janus,
            scene.janus.prompts.build(scene.history(rows)),
            codes_UnL,
            advantages(reward_Un, by_std=config.advantage_by_std),
            config.credit,
        )
        return _Batch(
            rows=rows,
            codes_UnL=codes_UnL,
            old_UnL=None,
            reference_UnL=None,
            advantage_Un=advantage,
            values=dict(sorted((scene.describe(rollout, reward_Un, terms) | shares).items())),
        )

    def _logits(self, policy: LanguageGenerator, prompts: Prompts, batch: _Batch) -> Tensor:
        """Logits ``[U, n, L, K]`` of the distribution that was sampled from, at temperature 1."""
        logits = policy.logits(prompts, batch.codes_UnL).float()
        if self.config.guidance == 1:
            return logits
        free = policy.logits(prompts.unconditional(policy.prompts.pad_id), batch.codes_UnL).float()
        return free + self.config.guidance * (logits - free)

    def look(self) -> dict[str, float]:
        """What an encoder outside the reward sees."""
        return self.watch.look(self.scene.janus.eval())

    def state(self) -> dict[str, Tensor]:
        """Where GRPO began, and the samples that further updates will learn from."""
        kept: dict[str, Tensor] = {}
        if self.reference is not None:
            kept |= {f"reference.{name}": value for name, value in learned_state(self.reference).items()}
        if self.batch is not None and self.config.updates > 1:
            tensors = {name: value for name, value in vars(self.batch).items() if isinstance(value, Tensor)}
            tensors["rows"] = torch.from_numpy(self.batch.rows)
            kept |= {f"batch.{name}": everyones(value) for name, value in tensors.items()}
            values = means(self.batch.values)
            kept |= {f"value.{name}": torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
        return kept

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        self.begin()
        assert self.reference is not None
        parts: dict[str, dict[str, Tensor]] = {"reference": {}, "batch": {}, "value": {}}
        for name, value in state.items():
            group, _, key = name.partition(".")
            parts[group][key] = value
        load_whole(self.reference, parts["reference"])
        if parts["batch"]:
            own = share(len(parts["batch"]["rows"]))
            mine = {name: value[own] for name, value in parts["batch"].items()}
            rows = mine.pop("rows").numpy()
            values = {name: float(value) for name, value in sorted(parts["value"].items())}
            self.batch = _Batch(rows=rows, values=values, **mine)


def _log_prob(logits_UnLK: Tensor, codes_UnL: Tensor) -> Tensor:
    """Log-probability of each code ``[U, n, L]``."""
    codes = codes_UnL.flatten().to(logits_UnLK.device)
    flat = F.cross_entropy(logits_UnLK.flatten(0, -2), codes, reduction="none")
    return -flat.view(codes_UnL.shape).to(codes_UnL.device)


def _entropy(logits_UnLK: Tensor) -> Tensor:
    """Nats of each code's distribution ``[U, n, L]``."""
    lp = logits_UnLK.log_softmax(-1)
    return -(lp.exp() * lp).sum(-1)
