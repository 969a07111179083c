"""Stage ``rl``: online reinforcement learning of the generator by group-relative policy optimisation.

    windows ─▶ prompts ─▶ sampler: n pictures a user ─▶ picture book ─▶ reward terms ─▶ advantages ─┐
                  ▲                (current policy)      (decode, judge)                             │
                  └────────────── one update: log-probabilities, KL to the SFT model ◀──────────────┘

Everything waits for everything: one update a batch of samples, so the ratio is 1 and nothing is clipped
(generation.md 1.6). Rollouts use no guidance: samples and gradients then belong to the same distribution.
On validation users an encoder that no reward has seen watches, and stops the run when pictures drift away from what
came next.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from couturier.components.alignment.batches import WindowSampler
from couturier.components.alignment.rewards import (
    PictureBook,
    Rollout,
    Weights,
    advantages,
    membership,
    prospects,
    score,
)
from couturier.components.alignment.watch import Watch
from couturier.components.data.formats import Catalogue, Windows
from couturier.components.errors import TrainingError
from couturier.components.files import write_json
from couturier.components.generator.codec import load_codec
from couturier.components.generator.janus import JanusGenerator
from couturier.components.interest.judge import history_batch, load_judge
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
    """How the policy is improved."""

    seed: int = 0
    threads: int = 2
    steps: int = 150
    prompts: int = 32
    """Windows a step."""
    group: int = 8
    """Pictures a window."""
    temperature: float = 1.0
    lr: float = 1.5e-4
    warm_up_steps: int = 10
    kl: float = 0.04
    """Weight of the per-code KL estimate to the SFT model (k3 of Schulman)."""
    clip: float = 1.0
    advantage_by_std: bool = True
    weights: Weights = field(default_factory=Weights)
    checkpoint_every: int = 25
    watch_every: int = 50
    watch_windows: int = 128
    watch_pictures: int = 8
    watch_tolerance: float = 0.15
    """Stop when the watched next-basket precision falls below (1 - this) of its best. 0 never stops."""


def run(ctx: StageContext) -> None:
    """``sequences``, ``tokenise``, ``judge``, ``sft`` → ``model/``, ``curves.parquet``; facts: the last rewards."""
    config: Config = ctx.config
    with threads(config.threads):
        trainer = _Trainer(ctx, config)
        trainer.fit()
        trainer.policy.eval().save(ctx.out / "model")
    frame = pl.DataFrame(
        trainer.curves, schema={"step": pl.Int64, "name": pl.String, "value": pl.Float64}, orient="row"
    )
    frame.write_parquet(ctx.out / "curves.parquet")
    ctx.facts.update(trainer.facts())


def policy_loss(lp_UnL: Tensor, reference_UnL: Tensor, advantage_Un: Tensor, *, kl: float) -> tuple[Tensor, Tensor]:
    """``-mean_t[ratio * A - kl * k3]``, with ratio = exp(lp - stopgrad(lp)), which is 1 in value (generation.md 1.6.6).

    Args:
        lp_UnL: log-probability of each code under the policy;  reference_UnL: under the model it must stay close to.
        advantage_Un: one a picture.

    Returns:
        The loss, and the KL estimate of each code ``k3 = exp(ref - lp) - (ref - lp) - 1`` ``[U, n, L]``.
    """
    gap = reference_UnL - lp_UnL
    k3 = gap.exp() - gap - 1
    ratio = (lp_UnL - lp_UnL.detach()).exp()
    return -(ratio * advantage_Un[..., None] - kl * k3).mean(), k3


class _Trainer:
    """The loop and its whole state."""

    def __init__(self, ctx: StageContext, config: Config) -> None:
        self.ctx, self.config = ctx, config
        self.catalogue = Catalogue.load(ctx.inputs["sequences"])
        self.train = Windows.load(ctx.inputs["sequences"], "train")
        self.policy = JanusGenerator.load(ctx.inputs["sft"] / "model").train()
        self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()
        self.judge = load_judge(ctx.inputs["judge"] / "judge")
        self.item_features_ID = self.judge.embed_items()
        # A basket rate of one half an item is kept for items no training basket held.
        held_I = np.bincount(self.train.basket, minlength=len(self.catalogue)) + 0.5
        self.base_I = torch.from_numpy(held_I / len(self.train)).float()
        codec = load_codec(ctx.inputs["tokenise"] / "codec")
        self.book = PictureBook(codec, self.judge, self.catalogue)
        self.book.look(load_file(ctx.inputs["tokenise"] / "codes.safetensors")["codes_IL"])
        self.parameters = self.policy.parameters_to_train()
        self.optimiser = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.random = seeded(config.seed, "rl", "rollouts")
        self.sampler = WindowSampler(self.train, self.random, targets=1)
        self.watch = Watch(ctx, self.catalogue, codec, pictures=config.watch_pictures, windows=config.watch_windows)
        self.checkpoints = Checkpoints(ctx.scratch / "checkpoints")
        self.curves: list[tuple[int, str, float]] = []
        self.step, self.best_watch, self.stopped = 0, 0.0, ""
        if (saved := self.checkpoints.newest()) is not None:
            load_module("policy", self.policy, saved.tensors)
            load_optimiser("optimiser", self.optimiser, saved.tensors, saved.facts["optimiser"])
            self.random.set_state(saved.tensors["random"])
            self.step, self.best_watch = saved.step, saved.facts["best_watch"]
            self.curves = [tuple(row) for row in saved.facts["curves"]]
        else:
            ctx.tracker.params(asdict(config) | {"parameters": sum(p.numel() for p in self.parameters)})

    def fit(self) -> None:
        config = self.config
        self.ctx.progress.start("rl", config.steps, done=self.step, unit="steps")
        if self.step == 0:
            self._look_back()
        while self.step < config.steps and not self.stopped:
            rows, seeds = self._choose()
            codes_UnL = self.policy.eval().sample(
                self.train.favourites_WK[rows], config.group, seeds=seeds, temperature=config.temperature
            )
            rollout = self.rollout(rows, codes_UnL)
            reward_Un, terms = score(rollout, config.weights)
            values = self._update(rows, codes_UnL, advantages(reward_Un, by_std=config.advantage_by_std))
            values |= self._describe(rollout, reward_Un, terms)
            self.curves += [(self.step, name, value) for name, value in values.items()]
            self.ctx.tracker.metrics(values, step=self.step)
            self.step += 1
            self.ctx.progress.advance(note=f"reward {values['reward']:.2f}")
            if self.step % config.watch_every == 0 or self.step == config.steps:
                self._look_back()
            if self.step % config.checkpoint_every == 0 and self.step < config.steps:
                self._save()
        self.ctx.progress.stop()

    def _choose(self) -> tuple[np.ndarray, list[int]]:
        """Windows of this step and a sampling seed for each."""
        rows, _ = self.sampler.draw(self.config.prompts)
        seeds = torch.randint(2**62, (len(rows),), generator=self.random)
        return rows, seeds.tolist()

    @torch.no_grad()
    def rollout(self, rows: np.ndarray, codes_UnL: Tensor) -> Rollout:
        """Look at the pictures of each group and at what its person had and took."""
        u, n, _ = codes_UnL.shape
        seen = self.book.look(codes_UnL.flatten(0, 1))
        features = self.book.features[seen].view(u, n, -1)
        state = self.judge.encode(history_batch(self.train, rows, self.item_features_ID))
        items = len(self.catalogue)
        shelf_UID = self.item_features_ID.expand(u, -1, -1)
        return Rollout(
            prospect_UI=prospects(self.judge.score(state, shelf_UID), self.base_I),
            base_I=1 - (-self.base_I).exp(),
            nearest_Un=self.book.nearest[seen].view(u, n),
            psnr_Un=self.book.psnr[seen].view(u, n),
            features_UnD=features,
            liking_Un=self.judge.standardise(self.judge.score(state, features)),
            basket_UI=membership([self.train.basket_of(w) for w in rows], items),
            future_UI=membership([self.train.future_of(w) for w in rows], items),
            history_UI=membership(list(self.train.favourites_WK[rows]), items),
        )

    def _update(self, rows: np.ndarray, codes_UnL: Tensor, advantage_Un: Tensor) -> dict[str, float]:
        """One optimiser step on :func:`policy_loss`."""
        config = self.config
        prompts = self.policy.prompts.build(self.train.favourites_WK[rows])
        with torch.no_grad():
            reference = self.reference.log_prob(prompts, codes_UnL)
        lp = self.policy.log_prob(prompts, codes_UnL)
        loss, k3 = policy_loss(lp, reference, advantage_Un, kl=config.kl)
        if not bool(torch.isfinite(loss)):
            write_json(self.ctx.scratch / "replay.json", {"step": self.step, "windows": rows.tolist()})
            raise TrainingError(
                f"rl: the loss is {float(loss.detach())} at step {self.step}; its windows are kept in replay.json. "
                f"Lower rl.lr (now {config.lr}) and run again: the last checkpoint is kept."
            )
        for group in self.optimiser.param_groups:
            group["lr"] = config.lr * min(1.0, (self.step + 1) / max(1, config.warm_up_steps))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip)
        self.optimiser.step()
        return {
            "loss": float(loss.detach()),
            "kl_nats": float(k3.detach().sum(-1).mean()),
            "nats": float(-lp.detach().sum(-1).mean()),
            "grad_norm": float(norm),
            "zero_variance_groups": float((advantage_Un.abs().amax(1) == 0).float().mean()),
        }

    def _describe(self, rollout: Rollout, reward_Un: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
        n = rollout.nearest_Un.shape[1]
        distinct = [len(set(row)) / n for row in rollout.nearest_Un.tolist()]
        return {
            "reward": float(reward_Un.mean()),
            **{f"reward_{name}": float(value.mean()) for name, value in terms.items()},
            "basket_precision": float(rollout.basket_UI.gather(1, rollout.nearest_Un).float().mean()),
            "copied": float(rollout.history_UI.gather(1, rollout.nearest_Un).float().mean()),
            "distinct": float(np.mean(distinct)),
            "valid": float((rollout.psnr_Un >= self.config.weights.valid_db - 3).float().mean()),
        }

    def _look_back(self) -> None:
        """Ask the independent encoder about validation users; stop when it sees pictures drift away."""
        found = self.watch.look(self.policy.eval())
        self.curves += [(self.step, name, value) for name, value in found.items()]
        self.ctx.tracker.metrics(found, step=self.step)
        now = found["watch_basket_precision"]
        if self.config.watch_tolerance and now < (1 - self.config.watch_tolerance) * self.best_watch:
            self.stopped = (
                f"stopped at step {self.step}: under the independent encoder next-basket precision fell to {now:.4f} "
                f"from {self.best_watch:.4f} while the reward rose"
            )
        self.best_watch = max(self.best_watch, now)

    def _save(self) -> None:
        tensors, facts = optimiser_tensors("optimiser", self.optimiser)
        tensors |= module_tensors("policy", self.policy) | {"random": generator_tensor(self.random)}
        self.checkpoints.save(
            self.step, tensors, {"optimiser": facts, "curves": self.curves, "best_watch": self.best_watch}
        )

    def facts(self) -> dict[str, float | str | int]:
        """The figures of the last steps, averaged over twenty, and why the run ended."""
        last: dict[str, list[float]] = {}
        for step, name, value in self.curves:
            if step >= self.step - 20:
                last.setdefault(name, []).append(value)
        means: dict[str, float | str | int] = {name: round(float(np.mean(values)), 5) for name, values in last.items()}
        return means | {"steps": self.step, "stopped": self.stopped or "all steps done"}
