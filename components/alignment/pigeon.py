"""Pigeon: the model learns to rebuild a half-hidden picture from a person's history, then to prefer the person's taste.

    1  masked reconstruction   history (a fifth left out) + next item (a random share hidden) ─▶ the next item's codes
    2  preference              one picture a mask ratio ─▶ most and least like the history ─▶ DPO, two adapters

Xu et al., arXiv 2410.14170, after its released code (generation.md 2; the paper's body was not available). The target
that is hidden in training loses the codes most related to the person, so that they must come from the history; a
reference in drawing keeps them. What is ours is said in :mod:`~couturier.components.generator.pigeon`,
:mod:`~couturier.components.generator.masking` and :mod:`~couturier.components.alignment.pigeon_pairs`; also, that each
preference step reads its pairs at a ratio of its own, since any may be asked for in drawing.

Legend: U windows, n pictures a window (one a ratio), L codes a picture, I items, N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from couturier.components.alignment.dpo import dpo_loss
from couturier.components.alignment.loop import Phase, Step
from couturier.components.alignment.pigeon_adapters import POLICY, REFERENCE, AdaptedGenerator, LoraSettings
from couturier.components.alignment.pigeon_pairs import RATIOS, Candidates, candidates, choose, figures
from couturier.components.alignment.rewards import membership
from couturier.components.alignment.scene import Scene
from couturier.components.alignment.watch import Watch
from couturier.components.data.formats import Windows
from couturier.components.errors import ConfigError
from couturier.components.generator.janus import JanusGenerator
from couturier.components.generator.pigeon import ReferenceConfig
from couturier.components.generator.shelf import Shelf
from couturier.components.generator.tokenise import one_cycle
from couturier.components.runtime import derived_seed, seeded
from couturier.components.together import share


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """The second stage."""

    steps: int = 60
    """0 leaves it out."""
    windows: int = 256
    """Training windows that candidates are drawn for, eleven each; published: 1,000."""
    valid_windows: int = 96
    """Validation windows that pairs are held out of, and that every ratio is measured on; published: 200."""
    batch: int = 16
    """Pairs a step; published: 8."""
    lr: float = 2e-4
    """Published: 5e-6 for seven billion parameters. Much more, or many more steps over the same pairs, made a tiny
    model's pictures less whole and less like the history on people held out, however far the margin rose."""
    warm_up_steps: int = 5
    beta: float = 0.1
    """How strongly the policy is held to the first stage's (the published number)."""
    anchor: float = 1.0
    """Weight of the preferred picture's nats a code beside the DPO loss (ours; Liu et al., arXiv 2405.16436): DPO alone
    is content when both pictures grow unlikely, the rejected one faster."""
    floor: float = 0.0
    """Least similarity of the preferred picture to the reference: a cosine less the catalogue's mean, so that 0 is as
    like as any two items are."""
    margin: float = 0.05
    """Least difference in similarity to the history between the two of a pair."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.windows < 1 or self.beta <= 0:
            raise ConfigError(
                f"rl.pigeon.pairs: batch is {self.batch}, windows {self.windows} and beta {self.beta}; the first two "
                "must be at least 1 and beta above 0."
            )


@dataclass(frozen=True, kw_only=True)
class PigeonConfig:
    """Both stages."""

    steps: int = 600
    """Of masked reconstruction; published: 2,975 of the batch below."""
    batch: int = 32
    """Windows a step, one target each; published: 16."""
    lr: float = 1e-2
    """Adapters that start at nothing take more than a model does. Published: 1e-5 for seven billion parameters."""
    weight_decay: float = 0.01
    condition_dropout: float = 0.1
    """Share of prompts without history and reference, so that guidance stays possible (ours)."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    shelf_windows: int = 1000
    """Training windows whose wanted distribution the shelf of references is made like."""
    shelf_steps: int = 300
    shelf_batch: int = 64
    shelf_lr: float = 0.03


def phases(scene: Scene, config: PigeonConfig, watch: Watch, *, look_every: int) -> list[Phase]:
    """Both stages; the scene's policy becomes one with a mask generator and adapters.

    Raises:
        MissingExtraError: peft is not installed.
        ConfigError: the policy is no Janus.
    """
    shelf = Shelf(
        scene.prospect.item_features_ID,
        scene.base_I.logit(),
        places=scene.train.favourites_WK.shape[1],
        copies=scene.distil_config.copies,
    )
    policy = AdaptedGenerator(_janus(scene), scene.codes_IL, shelf, config.reference, config.lora, seed=scene.seed)
    scene.policy = policy
    return [
        Reconstruction(scene, policy, config, watch, look_every=look_every),
        Preference(scene, policy, config.pairs, watch, look_every=look_every),
    ]


def _janus(scene: Scene) -> JanusGenerator:
    if not isinstance(scene.policy, JanusGenerator):
        raise ConfigError(
            f"rl.method=pigeon needs a Janus, and sft trained a {type(scene.policy).__name__}. Set "
            "sft.generator.family=janus."
        )
    return scene.policy


class Reconstruction:
    """The first phase: the codes of what was taken, from the history and what is left of those codes."""

    name = "masked reconstruction"
    fresh = True
    log_every = 1
    advice = "lower rl.pigeon.lr"

    def __init__(
        self, scene: Scene, policy: AdaptedGenerator, config: PigeonConfig, watch: Watch, *, look_every: int
    ) -> None:
        self.scene, self.policy, self.config, self.watch = scene, policy, config, watch
        self.steps, self.weight_decay, self.look_every = config.steps, config.weight_decay, look_every

    def begin(self) -> None:
        """Fill the shelf of references."""
        scene, config = self.scene, self.config
        random = seeded(scene.seed, "rl", "shelf")
        rows = torch.randperm(len(scene.train), generator=random)[: config.shelf_windows].numpy()
        wanted_WI = torch.cat([scene.wanted(some) for some in np.array_split(rows, -(-len(rows) // 64))])
        self.policy.shelf.fit(
            torch.from_numpy(scene.history(rows).astype(np.int64)),
            wanted_WI.float(),
            steps=config.shelf_steps,
            batch=config.shelf_batch,
            lr=config.shelf_lr,
            random=random,
        )

    def take(self, at: int) -> Step:
        """One step on next items, all at one random mask ratio."""
        scene, config, policy = self.scene, self.config, self.policy
        policy.learn(masks=True)
        rows, items_U1 = scene.sampler.draw(config.batch)
        ratio = float(torch.rand((), generator=scene.random))
        keep_U = torch.rand(len(rows), generator=scene.random) >= config.condition_dropout
        own = share(len(rows))
        items_U = torch.from_numpy(items_U1[own, 0])
        prompts = policy.prompts.build(scene.history(rows[own]), references_U=items_U, hidden=ratio)
        prompts = prompts.where(keep_U[own], prompts.unconditional(policy.prompts.pad_id))
        prefix_UPD = policy.train().embed_masked(prompts, hide_related=True, random=scene.random)
        codes_U1L = scene.codes_IL[items_U][:, None]
        loss = -policy.log_prob(prompts, codes_U1L, prefix_UPD).mean()
        nats = float(loss.detach()) * codes_U1L.shape[-1]
        return Step(
            loss=loss,
            rate=config.lr * one_cycle(at, config.steps),
            windows=rows[own],
            values={"pigeon_nats": nats, "pigeon_ratio": ratio},
            note=f"{nats:.2f} nats",
            tokens=prompts.ids_UP.numel() + codes_U1L.numel() - len(codes_U1L),
        )

    def look(self) -> dict[str, float]:
        """What an encoder outside the judge sees."""
        return self.watch.look(self.policy.eval())

    def state(self) -> dict[str, Tensor]:
        """Nothing beyond the model, which holds the shelf."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""


class Preference:
    """The second phase: DPO between the first one's own pictures; the masks and the reference adapter stay."""

    name = "preference"
    fresh = True
    log_every = 1
    weight_decay = 0.0
    advice = "lower rl.pigeon.pairs.lr"

    def __init__(
        self, scene: Scene, policy: AdaptedGenerator, config: PairsConfig, watch: Watch, *, look_every: int
    ) -> None:
        self.scene, self.policy, self.config, self.watch = scene, policy, config, watch
        self.steps, self.look_every = config.steps, look_every
        valid = Windows.load(scene.ctx.inputs["sequences"], "valid")
        self.valid, self.valid_rows = valid, np.arange(min(config.valid_windows, len(valid)))
        self.pairs: dict[str, Tensor] = {}
        self.done = 0

    def begin(self) -> None:
        """The policy becomes the reference too; candidates, pairs to learn from and pairs that are held out.

        Raises:
            ConfigError: no window gave a pair.
        """
        scene, config = self.scene, self.config
        self.policy.eval().copy_policy()
        rows, _ = scene.sampler.draw(config.windows)
        self.pairs = {}
        for part, windows, some in (("train", scene.train, rows), ("valid", self.valid, self.valid_rows)):
            found, references_U = self._candidates(windows, some, part)
            places_U2, fits_U = choose(
                found, floor=config.floor, margin=config.margin, valid_db=scene.weights.valid_db - 3
            )
            codes_U2L = found.codes_UnL.gather(1, places_U2[..., None].expand(-1, -1, found.codes_UnL.shape[-1]))
            self.pairs |= {
                f"{part}_rows": torch.from_numpy(some)[fits_U],
                f"{part}_references": references_U[fits_U],
                f"{part}_codes": codes_U2L[fits_U],
            }
        if not len(self.pairs["train_rows"]):
            raise ConfigError(
                f"of {config.windows} windows none gave a pair: rl.pigeon.pairs.margin is {config.margin}, floor "
                f"{config.floor} and rl.weights.valid_db {scene.weights.valid_db}. Lower them, draw for more windows "
                "(rl.pigeon.pairs.windows), or leave this stage out with rl.pigeon.pairs.steps=0."
            )

    def _candidates(self, windows: Windows, rows: np.ndarray, name: str) -> tuple[Candidates, Tensor]:
        """Pictures of every ratio after one reference a window, as in drawing, and those references."""
        favourites_UK = windows.favourites_WK[rows]
        seeds = [derived_seed(self.scene.seed, "pigeon", name, str(nth)) for nth in range(len(rows))]
        references_U = self.policy.shelf.offer(favourites_UK, 1, seeds)[:, 0]
        return candidates(self.policy, self.scene.book, favourites_UK, references_U, seeds), references_U

    def take(self, at: int) -> Step:
        """One update on some pairs, read at one of the ratios."""
        scene, config, policy = self.scene, self.config, self.policy
        policy.train().learn(masks=False)
        places = torch.randint(len(self.pairs["train_rows"]), (config.batch,), generator=scene.random)
        ratio = RATIOS[int(torch.randint(len(RATIOS), (), generator=scene.random))]
        places = places[share(config.batch)]
        lp_N2, ref_N2 = self._log_prob("train", places, ratio)
        dpo = dpo_loss(lp_N2[:, 0], lp_N2[:, 1], ref_N2[:, 0], ref_N2[:, 1], config.beta).mean()
        loss = dpo - config.anchor * lp_N2[:, 0].mean() / scene.codes_IL.shape[1]
        gain_N = ((lp_N2 - ref_N2)[:, 0] - (lp_N2 - ref_N2)[:, 1]).detach()
        self.done = at + 1
        return Step(
            loss=loss,
            rate=config.lr * min(1.0, (at + 1) / max(1, config.warm_up_steps)),
            windows=self.pairs["train_rows"][places].numpy(),
            values={
                "pigeon_dpo": float(dpo.detach()),
                "pigeon_gain_nats": float(gain_N.mean()),
                "pigeon_won": float((gain_N > 0).float().mean()),
                "pigeon_pairs": float(len(self.pairs["train_rows"])),
            },
            note=f"gain {float(gain_N.mean()):.2f} nats",
            tokens=2 * self.pairs["train_codes"][places].numel(),
        )

    def _log_prob(self, part: str, places: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """Log-probability of preferred and rejected pictures ``[N, 2]`` under the policy and under the reference."""
        policy, windows = self.policy, self.scene.train if part == "train" else self.valid
        rows = self.pairs[f"{part}_rows"][places].numpy()
        codes_N2L = self.pairs[f"{part}_codes"][places]
        prompts = policy.prompts.build(
            windows.favourites_WK[rows], references_U=self.pairs[f"{part}_references"][places], hidden=ratio
        )
        policy.use(REFERENCE)
        with torch.no_grad():
            ref_N2 = policy.log_prob(prompts, codes_N2L).sum(-1)
        policy.use(POLICY)
        return policy.log_prob(prompts, codes_N2L).sum(-1), ref_N2

    @torch.no_grad()
    def margin(self) -> dict[str, float]:
        """Of pairs held out: by how many nats the preferred picture is likelier than the rejected one, under the policy
        and under the reference, at the configured ratio."""
        every = torch.arange(len(self.pairs["valid_rows"]))
        if not len(every):
            return {}
        lp_N2, ref_N2 = self._log_prob("valid", every, self.policy.reference.ratio)
        return {
            "pigeon_margin_nats": float((lp_N2[:, 0] - lp_N2[:, 1]).mean()),
            "pigeon_margin_before_nats": float((ref_N2[:, 0] - ref_N2[:, 1]).mean()),
        }

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """What an encoder outside the judge sees, and the held-out margin; at the end also every ratio, with the best
        of eleven beside, and the configured ratio without any history."""
        self.policy.eval()
        found = {**self.watch.look(self.policy), **self.margin()}
        if self.done < self.steps or not len(self.valid_rows):
            return found
        sweep, references_U = self._candidates(self.valid, self.valid_rows, "valid")
        baskets = [self.valid.basket_of(row) for row in self.valid_rows.tolist()]
        basket_UI = membership(baskets, len(self.scene.catalogue))
        ratio = self.policy.reference.ratio
        seeds = [derived_seed(self.scene.seed, "pigeon", "valid", str(nth)) for nth in range(len(self.valid_rows))]
        alone = candidates(
            self.policy,
            self.scene.book,
            self.valid.favourites_WK[self.valid_rows],
            references_U,
            seeds,
            unknown=True,
            ratios=(ratio,),
        )
        return {
            **found,
            **figures(sweep, basket_UI, ratio),
            "pigeon_history_unknown": float(alone.history_Un.mean()),
            "pigeon_reference_unknown": float(alone.reference_Un.mean()),
        }

    def state(self) -> dict[str, Tensor]:
        """The pairs."""
        return self.pairs

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        self.pairs = dict(state)
