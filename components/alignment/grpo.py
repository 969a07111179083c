"""Stage ``rl``: reinforcement learning of the generator, by imitation of a known optimum and then by group-relative
policy optimisation.

    windows ─▶ prospects of all items ─▶ what should be drawn ─▶ items ─▶ fine-tuning on their codes     (imitation)

    windows ─▶ prompts ─▶ sampler: n pictures a user ─▶ picture book ─▶ reward terms ─▶ advantages ─┐    (GRPO)
                  ▲                (current policy)      (decode, judge)                             │
                  └────────────── one update: log-probabilities, KL to where GRPO began ◀───────────┘

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
from couturier.components.alignment.distil import DistilConfig, draw_evenly, imitation_loss, prefixes, wanted
from couturier.components.alignment.prospect import Prospect, ProspectConfig
from couturier.components.alignment.rewards import PictureBook, Rollout, Weights, advantages, membership, score
from couturier.components.alignment.watch import Watch
from couturier.components.data.formats import Catalogue, Windows
from couturier.components.errors import TrainingError
from couturier.components.files import write_json
from couturier.components.generator.codec import load_codec
from couturier.components.generator.janus import JanusGenerator
from couturier.components.generator.tokenise import one_cycle
from couturier.components.interest.judge import history_batch, load_judge
from couturier.components.lineage.checkpoints import (
    Checkpoint,
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
    prospect: ProspectConfig = field(default_factory=ProspectConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    """The imitation before GRPO."""
    steps: int = 20
    """Of GRPO."""
    prompts: int = 32
    """Windows a step."""
    group: int = 8
    """Pictures a window."""
    temperature: float = 1.0
    lr: float = 1.5e-4
    warm_up_steps: int = 5
    kl: float = 0.02
    """Weight of the per-code KL estimate to the policy that GRPO began with (k3 of Schulman)."""
    clip: float = 1.0
    advantage_by_std: bool = True
    weights: Weights = field(default_factory=Weights)
    checkpoint_every: int = 25
    watch_every: int = 20
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
        trainer.curves,
        schema={"step": pl.Int64, "name": pl.String, "value": pl.Float64},
        orient="row",
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
    """The loop over both phases and its whole state."""

    def __init__(self, ctx: StageContext, config: Config) -> None:
        self.ctx, self.config = ctx, config
        self.catalogue = Catalogue.load(ctx.inputs["sequences"])
        self.train = Windows.load(ctx.inputs["sequences"], "train")
        self.policy = JanusGenerator.load(ctx.inputs["sft"] / "model").train()
        self.judge = load_judge(ctx.inputs["judge"] / "judge")
        # A basket rate of one half an item is kept for items no training basket held.
        held_I = np.bincount(self.train.basket, minlength=len(self.catalogue)) + 0.5
        rate_I = torch.from_numpy(held_I / len(self.train)).float()
        self.base_I = 1 - (-rate_I).exp()
        self.prospect = Prospect(self.judge, rate_I)
        codec = load_codec(ctx.inputs["tokenise"] / "codec")
        self.codes_IL = load_file(ctx.inputs["tokenise"] / "codes.safetensors")["codes_IL"]
        self.prefix_LI = prefixes(self.codes_IL)
        self.book = PictureBook(codec, self.judge, self.catalogue)
        self.book.look(self.codes_IL)
        self.parameters = self.policy.parameters_to_train()
        self.random = seeded(config.seed, "rl", "rollouts")
        self.sampler = WindowSampler(self.train, self.random, targets=1)
        self.watch = Watch(ctx, self.catalogue, codec, pictures=config.watch_pictures, windows=config.watch_windows)
        self.checkpoints = Checkpoints(ctx.scratch / "checkpoints")
        self.curves: list[tuple[int, str, float]] = []
        self.step, self.best_watch, self.stopped = 0, 0.0, ""
        self.optimiser = self._optimiser(config.distil.weight_decay)
        self.reference: JanusGenerator | None = None
        if (saved := self.checkpoints.newest()) is not None:
            self._restore(saved)
        else:
            self.prospect.fit(self.train, config.prospect, seed=config.seed)
            ctx.tracker.params(asdict(config) | {"parameters": sum(p.numel() for p in self.parameters)})

    def fit(self) -> None:
        config, total = self.config, self.config.distil.steps + self.config.steps
        self.ctx.progress.start("rl", total, done=self.step, unit="steps")
        if self.step == 0:
            self._look_back()
        while self.step < total and not self.stopped:
            imitating = self.step < config.distil.steps
            if not imitating and self.reference is None:
                self.reference = self._begin_rl()
            values = self._imitate() if self.reference is None else self._improve(self.reference)
            self.curves += [(self.step, name, value) for name, value in values.items()]
            self.ctx.tracker.metrics(values, step=self.step)
            self.step += 1
            note = f"{values['distil_nats']:.2f} nats" if imitating else f"reward {values['reward']:.2f}"
            self.ctx.progress.advance(note=note)
            if self.step in (config.distil.steps, total) or (not imitating and self.step % config.watch_every == 0):
                self._look_back()
            if self.step % config.checkpoint_every == 0 and self.step < total:
                self._save()
        self.ctx.progress.stop()

    def _begin_rl(self) -> JanusGenerator:
        """GRPO starts from what imitation made: that is what it must stay close to. Its moments start from nothing."""
        self.optimiser = self._optimiser(0.0)
        return copy.deepcopy(self.policy).requires_grad_(False).eval()

    def _optimiser(self, weight_decay: float) -> torch.optim.AdamW:
        lr = self.config.lr
        return torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)

    def _imitate(self) -> dict[str, float]:
        """One step of fine-tuning on items that should be drawn."""
        config = self.config.distil
        rows, _ = self.sampler.draw(config.prompts)
        p_UI = self.wanted(rows)
        items_UT = draw_evenly(p_UI, config.targets, self.random)
        prompts = self.policy.prompts.build(self.train.favourites_WK[rows])
        keep_U = torch.rand(len(rows), generator=self.random) >= config.condition_dropout
        prompts = prompts.where(keep_U, prompts.unconditional(self.policy.prompts.pad_id))
        logits_UTLK = self.policy.train().logits(prompts, self.codes_IL[items_UT])
        loss = imitation_loss(logits_UTLK, items_UT, p_UI, self.codes_IL, self.prefix_LI)
        norm = self._step(loss, rows, config.lr * one_cycle(self.step, config.steps))
        return {"distil_nats": float(loss.detach()) * self.codes_IL.shape[1], "grad_norm": norm}

    def wanted(self, rows: np.ndarray) -> Tensor:
        """The distribution over items ``[U, I]`` that pictures for these windows should have."""
        history_UI = membership(list(self.train.favourites_WK[rows]), len(self.catalogue))
        return wanted(self.prospect.logits(self.train, rows), self.base_I.logit(), history_UI, self.config.distil)

    def _improve(self, reference: JanusGenerator) -> dict[str, float]:
        """One step of GRPO."""
        config = self.config
        rows, seeds = self._choose()
        codes_UnL = self.policy.eval().sample(
            self.train.favourites_WK[rows], config.group, seeds=seeds, temperature=config.temperature
        )
        rollout = self.rollout(rows, codes_UnL)
        reward_Un, terms = score(rollout, config.weights)
        prompts = self.policy.prompts.build(self.train.favourites_WK[rows])
        lp_UnL = self.policy.log_prob(prompts, codes_UnL)
        reference_UnL = lp_UnL.detach()
        if config.kl:
            with torch.no_grad():
                reference_UnL = reference.log_prob(prompts, codes_UnL)
        advantage_Un = advantages(reward_Un, by_std=config.advantage_by_std)
        loss, k3 = policy_loss(lp_UnL, reference_UnL, advantage_Un, kl=config.kl)
        done = self.step - config.distil.steps
        norm = self._step(loss, rows, config.lr * min(1.0, (done + 1) / max(1, config.warm_up_steps)))
        return {
            "loss": float(loss.detach()),
            "kl_nats": float(k3.detach().sum(-1).mean()),
            "nats": float(-lp_UnL.detach().sum(-1).mean()),
            "grad_norm": norm,
            "zero_variance_groups": float((advantage_Un.abs().amax(1) == 0).float().mean()),
            **self._describe(rollout, reward_Un, terms),
        }

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
        state = self.judge.encode(history_batch(self.train, rows, self.prospect.item_features_ID))
        items = len(self.catalogue)
        return Rollout(
            wanted_UI=self.wanted(rows).float(),
            nearest_Un=self.book.nearest[seen].view(u, n),
            psnr_Un=self.book.psnr[seen].view(u, n),
            features_UnD=features,
            liking_Un=self.judge.standardise(self.judge.score(state, features)),
            basket_UI=membership([self.train.basket_of(w) for w in rows], items),
            future_UI=membership([self.train.future_of(w) for w in rows], items),
            history_UI=membership(list(self.train.favourites_WK[rows]), items),
        )

    def _step(self, loss: Tensor, rows: np.ndarray, lr: float) -> float:
        """One optimiser step; the norm of the gradient."""
        if not bool(torch.isfinite(loss)):
            write_json(self.ctx.scratch / "replay.json", {"step": self.step, "windows": rows.tolist()})
            raise TrainingError(
                f"rl: the loss is {float(loss.detach())} at step {self.step}; its windows are kept in replay.json. "
                f"Lower rl.lr or rl.distil.lr (the rate was {lr:g}) and run again: the last checkpoint is kept."
            )
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimiser.step()
        return float(norm)

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
        tensors |= {f"prospect.{name}": value for name, value in self.prospect.state().items()}
        if self.reference is not None:
            tensors |= module_tensors("reference", self.reference)
        self.checkpoints.save(
            self.step,
            tensors,
            {"optimiser": facts, "curves": self.curves, "best_watch": self.best_watch},
        )

    def _restore(self, saved: Checkpoint) -> None:
        load_module("policy", self.policy, saved.tensors)
        if any(name.startswith("reference.") for name in saved.tensors):
            self.reference = self._begin_rl()
            load_module("reference", self.reference, saved.tensors)
        load_optimiser("optimiser", self.optimiser, saved.tensors, saved.facts["optimiser"])
        self.prospect.load({name: saved.tensors[f"prospect.{name}"] for name in self.prospect.state()})
        self.random.set_state(saved.tensors["random"])
        self.step, self.best_watch = saved.step, saved.facts["best_watch"]
        self.curves = [tuple(row) for row in saved.facts["curves"]]

    def facts(self) -> dict[str, float | str | int]:
        """The figures of the last steps, averaged over twenty, and why the run ended."""
        last: dict[str, list[float]] = {}
        for step, name, value in self.curves:
            if step >= self.step - 20:
                last.setdefault(name, []).append(value)
        means: dict[str, float | str | int] = {name: round(float(np.mean(values)), 5) for name, values in last.items()}
        return means | {"steps": self.step, "stopped": self.stopped or "all steps done"}
