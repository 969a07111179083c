"""What every way of aligning a generator works with: the policy, the judge, people's windows, the reward's eyes.

    windows ─▶ prompts ─▶ policy.sample ─▶ picture book ─▶ Rollout ─▶ reward terms

Legend: U users (windows), n pictures a user, L codes a picture, I items, D judge features.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file
from torch import Tensor

from couturier.components.alignment.batches import WindowSampler
from couturier.components.alignment.distil import DistilConfig, prefixes, wanted
from couturier.components.alignment.prospect import Prospect, ProspectConfig
from couturier.components.alignment.rewards import PictureBook, Rollout, Weights, membership
from couturier.components.alignment.social import SocialReward
from couturier.components.alignment.triplets import SocialConfig
from couturier.components.data.formats import Catalogue, Windows
from couturier.components.data.reuse import REUSE
from couturier.components.errors import ConfigError
from couturier.components.generator.codec import load_codec
from couturier.components.generator.language import LanguageGenerator
from couturier.components.generator.types import load_generator
from couturier.components.interest.judge import history_batch, load_judge
from couturier.components.lineage.stages import StageContext
from couturier.components.runtime import seeded
from couturier.components.together import share


class Scene:
    """Loaded once a run; a keeper of the loop, because its prospect is fitted.

    Attributes:
        random: the generator every phase draws from.
        base_I: the share of training baskets that hold each item.
        prefix_LI: of :func:`~couturier.components.alignment.distil.prefixes`.
        social: what a community comes back to; None where its weight is 0. Fitted here, in seconds and by seed, so
            that a resumed run has it again to the same bits.
    """

    def __init__(
        self,
        ctx: StageContext,
        *,
        seed: int,
        weights: Weights,
        distil: DistilConfig,
        prospect: ProspectConfig,
        social: SocialConfig,
    ) -> None:
        self.ctx, self.seed, self.weights = ctx, seed, weights
        self.distil_config, self.prospect_config = distil, prospect
        self.catalogue = Catalogue.load(ctx.inputs["sequences"])
        self.train = Windows.load(ctx.inputs["sequences"], "train")
        self.policy = load_generator(ctx.inputs["sft"] / "model").train()
        self.judge = load_judge(ctx.inputs["judge"] / "judge")
        # A basket rate of one half an item is kept for items no training basket held.
        held_I = np.bincount(self.train.basket, minlength=len(self.catalogue)) + 0.5
        rate_I = torch.from_numpy(held_I / len(self.train)).float()
        self.base_I = 1 - (-rate_I).exp()
        self.prospect = Prospect(self.judge, rate_I)
        self.codec = load_codec(ctx.inputs["tokenise"] / "codec")
        self.codes_IL = load_file(ctx.inputs["tokenise"] / "codes.safetensors")["codes_IL"]
        self.prefix_LI = prefixes(self.codes_IL)
        self.book = PictureBook(self.codec, self.judge, self.catalogue)
        drawn_I = self.book.look(self.codes_IL)
        self.social: SocialReward | None = None
        if weights.social:
            reuse = pl.read_parquet(ctx.inputs["sequences"] / REUSE)
            # Items as the codec draws them, which is how the policy's pictures will look.
            self.social = SocialReward(self.catalogue, reuse, self.book.features[drawn_I], social, seed=seed)
        self.random = seeded(seed, "rl", "rollouts")
        self.sampler = WindowSampler(self.train, self.random, targets=1)

    @property
    def janus(self) -> LanguageGenerator:
        """The policy, for methods that need the probability of each code.

        Raises:
            ConfigError: it is of another family.
        """
        if not isinstance(self.policy, LanguageGenerator):
            raise ConfigError(
                "this rl.method needs a generator that writes codes one by one, and sft trained a diffusion model. "
                "Choose rl.method=ppd, or set sft.generator.family=janus."
            )
        return self.policy

    def begin(self) -> None:
        """Fit the prospect."""
        self.prospect.fit(self.train, self.prospect_config, seed=self.seed)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return self.prospect.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        self.prospect.load(dict(state))

    def choose(self, prompts: int) -> tuple[np.ndarray, list[int]]:
        """Windows of a step and a sampling seed for each; this process's share of them."""
        rows, _ = self.sampler.draw(prompts)
        seeds = torch.randint(2**62, (len(rows),), generator=self.random)
        own = share(prompts)
        return rows[own], seeds[own].tolist()

    def history(self, rows: np.ndarray) -> np.ndarray:
        """Favourites of windows, ``[U, K]``."""
        return self.train.favourites_WK[rows]

    def wanted(self, rows: np.ndarray) -> Tensor:
        """The distribution over items ``[U, I]`` that pictures for these windows should have."""
        history_UI = membership(list(self.history(rows)), len(self.catalogue))
        return wanted(self.prospect.logits(self.train, rows), self.base_I.logit(), history_UI, self.distil_config)

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
            history_UI=membership(list(self.history(rows)), items),
            social_Un=None if self.social is None else self.social.score(features, self.book.nearest[seen].view(u, n)),
        )

    def describe(self, rollout: Rollout, reward_Un: Tensor, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures of a rollout for the curves: the reward term by term, repeats, copies, whole pictures."""
        n = rollout.nearest_Un.shape[1]
        distinct = [len(set(row)) / n for row in rollout.nearest_Un.tolist()]
        return {
            "reward": float(reward_Un.mean()),
            **{f"reward_{name}": float(value.mean()) for name, value in terms.items()},
            "basket_precision": float(rollout.basket_UI.gather(1, rollout.nearest_Un).float().mean()),
            "copied": float(rollout.history_UI.gather(1, rollout.nearest_Un).float().mean()),
            "distinct": float(np.mean(distinct)),
            "valid": float((rollout.psnr_Un >= self.weights.valid_db - 3).float().mean()),
        }
