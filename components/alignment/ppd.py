"""Personalised preference fine-tuning of the diffusion generator (PPD, Dang et al., arXiv 2501.06655).

    history ─▶ four pairs: a favourite, something popular that was passed over ─▶ user embedding ─┐
    reward ─▶ what should be drawn, what the base model draws ─▶ one noise, one noise level ──────┴▶ denoiser with it
                                                                              └────────────▶ denoiser without it

One model is aligned with everybody at once, since it is told whose preference counts. The loss is Diffusion-DPO
(Wallace et al., arXiv 2311.12908): the denoiser should gain on the base model more at the preferred picture than at the
other. The reference knows no user: it is the base model, kept as it was. By default all weights learn; a tiny base
has too little to say through what PPD adds alone.

Errors are what the denoiser is trained on, in nats (:meth:`Denoiser.error_of`), so that ``beta`` counts nats, as in DPO
of language models; the paper's are squared errors of the noise, and its beta counts in thousands. Which pairs are mined
from behaviour logs is ours, since people here rate nothing: they take, or they pass over, and a reward says the rest.

Legend: U users, n pictures a user, N = U * n, L codes a picture, K favourites, I items, E user tokens, W width,
P pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from couturier.components.alignment.batches import WindowSampler
from couturier.components.alignment.distil import draw_evenly
from couturier.components.alignment.loop import Step
from couturier.components.alignment.rewards import membership, score
from couturier.components.alignment.scene import Scene
from couturier.components.alignment.watch import Watch
from couturier.components.errors import ConfigError
from couturier.components.generator.tokenise import one_cycle
from couturier.components.generator.types import PreferenceConfig
from couturier.components.together import share

if TYPE_CHECKING:
    from couturier.components.generator.diffusion import DiffusionGenerator

SOURCES = ("wanted", "taken", "judged")


@dataclass(frozen=True, kw_only=True)
class PpdConfig:
    """How preferences are learned."""

    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    source: str = "wanted"
    """Where the pairs that are learned come from. "wanted": an item that the reward's best policy would draw for the
    person (:func:`~couturier.components.alignment.distil.wanted`) against one that the base model would; "taken": an
    item of the next basket against a popular one that was passed over; "judged": of some pictures drawn for the person,
    the best against the worst by the reward."""
    whole: bool = True
    """Whether the base model's own weights learn, too; else only what PPD adds to it (the paper's pictures come from a
    base a thousand times larger, which need not move)."""
    steps: int = 300
    prompts: int = 24
    """Windows a step."""
    pairs: int = 2
    """Pairs learned a window; with "judged" it is one."""
    group: int = 6
    """Pictures drawn a window, of which "judged" takes the best and the worst."""
    beta: float = 0.1
    """How firmly the model is held to the base, per nat."""
    anchor: float = 0.2
    """Weight of the plain denoising error of the preferred picture, in nats, beside the preference loss."""
    lr: float = 3e-3
    """At the top of a cosine."""
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ConfigError(f"rl.ppd.source is {self.source!r}; choose one of {', '.join(SOURCES)}.")
        if self.group < 2 or self.pairs < 1 or self.beta <= 0:
            raise ConfigError(
                f"rl.ppd.group is {self.group}, pairs {self.pairs} and beta {self.beta}; at least 2 pictures, 1 pair "
                "and a beta above 0 are needed."
            )


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Pairs to learn from: histories [U, K], and codes of what is preferred and what is not, [U, n, L] each."""

    favourites_UK: np.ndarray
    better_UnL: Tensor
    worse_UnL: Tensor


def ppd_loss(
    generator: DiffusionGenerator,
    reference: DiffusionGenerator,
    given: Preferences,
    users_UEW: Tensor,
    *,
    beta: float,
    random: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """``-log sigmoid(-beta * [(e_w - e_l) - (ref_w - ref_l)])``, errors e in nats at one shared noise and level.

    Args:
        reference: the base model, which is told of no user.
        users_UEW: embeddings of :meth:`DiffusionGenerator.embed_users`.
        random: noise and levels come from it.

    Returns:
        The loss of each pair ``[U, n]``; by how many nats the model gains on the base more at the preferred picture
        ``[U, n]``; the error of the preferred one ``[U, n]``.
    """
    u, n, _ = given.better_UnL.shape
    codes_NL = torch.cat([given.better_UnL.flatten(0, 1), given.worse_UnL.flatten(0, 1)])
    half, time_N = generator.noise_for(given.better_UnL.flatten(0, 1), random)
    noise, time = torch.cat([half, half]), torch.cat([time_N, time_N])
    own = generator.condition(given.favourites_UK, users_UEW=users_UEW).repeat(n)
    error_N = generator.error_of(codes_NL, noise, time, own.beside(own))
    with torch.no_grad():
        base = reference.condition(given.favourites_UK).repeat(n)
        reference_N = reference.error_of(codes_NL, noise, time, base.beside(base))
    gain_w, gain_l = (reference_N - error_N).view(2, u, n)
    margin_Un = gain_w - gain_l
    return -F.logsigmoid(beta * margin_Un), margin_Un, error_N.view(2, u, n)[0]


def passed_over(weight_I: Tensor, known_UI: Tensor, count: int, random: torch.Generator) -> Tensor:
    """``count`` items a person ``[U, count]``, by popularity among those they are not known to have taken.

    Example:
        >>> known = torch.tensor([[True, False, True]])
        >>> passed_over(torch.tensor([5.0, 1.0, 3.0]), known, 2, torch.Generator().manual_seed(0))
        tensor([[1, 1]])
    """
    weight_UI = weight_I.masked_fill(known_UI, 0.0)
    # Who has taken everything passes over nothing: then anything will do, and the pair says little.
    weight_UI = torch.where(weight_UI.sum(1, keepdim=True) > 0, weight_UI, weight_I)
    return torch.multinomial(weight_UI, count, replacement=True, generator=random)


class Ppd:
    """A phase of the loop. Made before the loop asks which parameters learn: it adds them.

    Raises:
        ConfigError: the generator is of the other family, which has no decoupled cross-attention.
    """

    name = "ppd"
    fresh = True
    log_every = 1
    advice = "lower rl.ppd.lr"

    def __init__(self, scene: Scene, config: PpdConfig, watch: Watch, *, look_every: int) -> None:
        from couturier.components.generator.diffusion import DiffusionGenerator

        if not isinstance(scene.policy, DiffusionGenerator):
            raise ConfigError(
                "rl.method is 'ppd', which aligns a diffusion generator, but sft trained one of the family 'janus'. "
                "Add --set sft.generator.family=diffusion, or choose another rl.method."
            )
        self.scene, self.config, self.watch = scene, config, watch
        # Freshly loaded, also where a killed run goes on: the loop restores the policy's weights afterwards.
        self.reference = copy.deepcopy(scene.policy).requires_grad_(False).eval()
        self.generator = scene.policy.personalise(config.preference, seed=scene.seed, whole=config.whole)
        self.steps, self.weight_decay = config.steps, config.weight_decay
        # A picture that is denoised costs several that are written code by code: looks are few.
        self.look_every = look_every and max(look_every, config.steps // 3)
        self.sampler = WindowSampler(scene.train, scene.random, targets=config.pairs)
        purchases = scene.catalogue.items["purchases"].to_numpy().astype(np.float64)
        self.popularity_I = torch.from_numpy(purchases)

    def begin(self) -> None:
        """The reference is there from the start."""

    def take(self, at: int) -> Step:
        """One step over fresh pairs."""
        config, generator = self.config, self.generator.train()
        makers = {"wanted": self._wanted, "taken": self._taken, "judged": self._judged}
        rows, given, values = makers[config.source]()
        users_UEW = generator.users_of(given.favourites_UK)
        assert users_UEW is not None
        each_Un, margin_Un, error_Un = ppd_loss(
            generator, self.reference, given, users_UEW, beta=config.beta, random=self.scene.random
        )
        loss = each_Un.mean() + config.anchor * error_Un.mean()
        pictures = 2 * each_Un.numel()
        return Step(
            loss=loss,
            rate=config.lr * one_cycle(at, config.steps),
            windows=rows,
            values={
                "ppd_loss": float(each_Un.detach().mean()),
                "margin_nats": float(margin_Un.detach().mean()),
                "preferred_wins": float((margin_Un.detach() > 0).float().mean()),
                **values,
            },
            note=f"margin {float(margin_Un.detach().mean()):.2f} nats",
            tokens=pictures * generator.codes_per_picture,
            drawn=pictures * generator.codes_per_picture,
        )

    def _wanted(self) -> tuple[np.ndarray, Preferences, dict[str, float]]:
        """What should be drawn, against what the base model draws as it is: a reward labels the pairs, as that of the
        paper's synthetic people does."""
        scene, config = self.scene, self.config
        rows, _ = self.sampler.draw(config.prompts)
        better_Un = draw_evenly(scene.wanted(rows), config.pairs, scene.random)
        p_UI = self.reference.expected_items(scene.history(rows))
        worse_Un = torch.multinomial(p_UI, config.pairs, replacement=True, generator=scene.random)
        own = share(len(rows))
        given = Preferences(
            favourites_UK=scene.history(rows)[own],
            better_UnL=scene.codes_IL[better_Un][own],
            worse_UnL=scene.codes_IL[worse_Un][own],
        )
        return rows[own], given, {}

    def _taken(self) -> tuple[np.ndarray, Preferences, dict[str, float]]:
        """What was taken next, against something popular that was neither known before nor taken later."""
        scene, config = self.scene, self.config
        rows, better_Un = self.sampler.draw(config.prompts)
        windows = [(scene.train.basket_of(w), scene.train.future_of(w)) for w in rows]
        items = len(scene.catalogue)
        known_UI = membership([np.concatenate(pair) for pair in windows], items)
        known_UI |= membership(list(scene.history(rows)), items)
        worse_Un = passed_over(self.popularity_I, known_UI, config.pairs, scene.random)
        own = share(len(rows))
        better_UnL = scene.codes_IL[torch.from_numpy(better_Un)]
        worse_UnL = scene.codes_IL[worse_Un]
        given = Preferences(
            favourites_UK=scene.history(rows)[own], better_UnL=better_UnL[own], worse_UnL=worse_UnL[own]
        )
        return rows[own], given, {}

    @torch.no_grad()
    def _judged(self) -> tuple[np.ndarray, Preferences, dict[str, float]]:
        """The best against the worst, by the reward, of pictures that the model as it stands draws for a person."""
        scene, config = self.scene, self.config
        rows, seeds = scene.choose(config.prompts)
        codes_UnL = self.generator.eval().sample(scene.history(rows), config.group, seeds=seeds)
        rollout = scene.rollout(rows, codes_UnL)
        reward_Un, terms = score(rollout, scene.weights)
        best_U, worst_U = reward_Un.argmax(1), reward_Un.argmin(1)
        each = torch.arange(len(rows))
        given = Preferences(
            favourites_UK=scene.history(rows),
            better_UnL=codes_UnL[each, best_U][:, None],
            worse_UnL=codes_UnL[each, worst_U][:, None],
        )
        return rows, given, scene.describe(rollout, reward_Un, terms)

    def look(self) -> dict[str, float]:
        """What an encoder outside the reward sees."""
        return self.watch.look(self.generator.eval())

    def state(self) -> dict[str, Tensor]:
        """Nothing beyond the model."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
