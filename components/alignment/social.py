"""Social Reward: which of two pictures of the same kind people come back to, learned from what they did.

    people who tried / kept an item ─▶ triplets (prompt, kept more, kept less) ─▶ two towers ─▶ score of any picture
                                              └─ held-out prompts and creators ─▶ pairwise accuracy

After arXiv 2402.09872 (Picsart): a scorer fitted on implicit feedback of a community with
``relu(|t - p|^2 - |t - n|^2 + 0.3)`` over unit vectors of prompt, re-used and not re-used picture, as the released code
has it. Theirs fine-tunes CLIP on pictures that users remixed, and counts ``score(p) >= score(n)`` as right. Ours: small
towers over the judge's frozen eyes and the prompt's words; re-use is coming back to an item
(:mod:`couturier.components.data.reuse`), pairs are those whose shares differ beyond chance; and a tie is wrong, because
a scorer that says the same of everything would otherwise be always right.

The fit takes seconds and is seeded, so a resumed run fits again, to the same bits, and keeps nothing in checkpoints.

Legend: Q prompts, T triplets, I items, N any rows, D judge features, E shared space, X any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, DataError
from couturier.components.evaluation.statistics import bootstrap, user_means
from couturier.components.interest.encoder import vocabulary_of, word_bags
from couturier.components.interest.layers import mlp
from couturier.components.runtime import global_seed, seeded, seeded_numpy

CREATORS = ("creator", "artist", "author", "maker", "designer", "brand", "manufacturer")
"""Item attributes that say who made it, the surest first."""
SPLITS = ("prompts", "creators", "both")
"""Held-out triplets: a new prompt of known creators; a known prompt with a new creator; both new."""


@dataclass(frozen=True, kw_only=True)
class SocialConfig:
    """What is compared, how it is fitted, what is held out."""

    prompt: str = ""
    """The item attribute that says what is asked for; empty for the first one."""
    creator: str = ""
    """The attribute that says who made it; empty for the first of ``CREATORS`` that items have, if any."""
    min_tried: int = 20
    """People who must have tried an item before its share counts."""
    z: float = 1.96
    """How many standard errors two shares must lie apart (two proportions, pooled)."""
    pairs_a_prompt: int = 200
    """At most so many pairs of one prompt, drawn by seed."""
    width: int = 32
    """E."""
    margin: float = 0.3
    """Of the loss (the released code's)."""
    steps: int = 300
    batch: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.1
    wordless: float = 0.3
    """Share of triplets whose prompt is hidden in training, so that a prompt of unknown words has something to fall
    back on (ours)."""
    held_out: float = 0.25
    """Share of the prompts, and of the creators, that the accuracy is measured on."""

    def __post_init__(self) -> None:
        for name in ("pairs_a_prompt", "width", "steps", "batch", "min_tried"):
            if vars(self)[name] < 1:
                raise ConfigError(f"rl.social.{name} is {vars(self)[name]}; it must be at least 1.")
        if not 0 < self.held_out < 1 or not 0 <= self.wordless < 1:
            raise ConfigError(
                f"rl.social.held_out is {self.held_out} and rl.social.wordless {self.wordless}; shares between 0 and 1 "
                "are wanted, and held_out not 0."
            )


@dataclass(frozen=True, kw_only=True)
class Triplets:
    """Pairs of items of one prompt: ``prompt_T`` rows of ``prompts``; ``kept_T`` and ``left_T`` catalogue rows, the
    first of which more of its people came back to; ``prompt_I`` and ``creator_I`` of every item (creator -1: none)."""

    prompts: tuple[str, ...]
    prompt_T: Tensor
    kept_T: Tensor
    left_T: Tensor
    prompt_I: Tensor
    creator_I: Tensor

    def __len__(self) -> int:
        return len(self.prompt_T)

    def where(self, real_T: Tensor) -> Triplets:
        """Those triplets alone."""
        return replace(self, prompt_T=self.prompt_T[real_T], kept_T=self.kept_T[real_T], left_T=self.left_T[real_T])

    def swapped(self) -> Triplets:
        """Every pair the wrong way round."""
        return replace(self, kept_T=self.left_T, left_T=self.kept_T)


def mine(catalogue: Catalogue, reuse: pl.DataFrame, config: SocialConfig, *, seed: int) -> Triplets:
    """Triplets of a catalogue: the pictures compared are of one prompt, and their shares differ beyond chance.

    Args:
        reuse: of :func:`~couturier.components.data.reuse.reuse_of`.

    Raises:
        ConfigError: an attribute that items do not have.
        DataError: no two items of one prompt differ.
    """
    prompt = _attribute(catalogue, config.prompt, "prompt", catalogue.attributes[:1])
    creator = _attribute(catalogue, config.creator, "creator", [c for c in CREATORS if c in catalogue.attributes])
    names, prompt_I = _levels(catalogue, prompt)
    creator_I = _levels(catalogue, creator)[1] if creator else torch.full((len(catalogue),), -1)
    tried_I, kept_I = _counts(catalogue, reuse)
    random = seeded_numpy(seed, "social", "pairs")
    rows: list[np.ndarray] = []
    for place in range(len(names)):
        members = np.flatnonzero((prompt_I.numpy() == place) & (tried_I >= config.min_tried))
        one, other = (side.ravel() for side in np.meshgrid(members, members, indexing="ij"))
        beyond = _z(kept_I[one], tried_I[one], kept_I[other], tried_I[other]) >= config.z
        pairs = np.stack([np.full(beyond.sum(), place), one[beyond], other[beyond]], 1)
        if len(pairs) > config.pairs_a_prompt:
            pairs = pairs[np.sort(random.choice(len(pairs), config.pairs_a_prompt, replace=False))]
        rows.append(pairs)
    found = torch.from_numpy(np.concatenate(rows)).long() if rows else torch.zeros(0, 3, dtype=torch.long)
    if not len(found):
        raise DataError(
            f"no two items of one {prompt} differ in how many people came back to them ({int(kept_I.sum())} returns of "
            f"{int(tried_I.sum())} tries). Leave rl.weights.social at 0, name another rl.social.prompt, or lower "
            "rl.social.min_tried or rl.social.z."
        )
    return Triplets(
        prompts=names,
        prompt_T=found[:, 0],
        kept_T=found[:, 1],
        left_T=found[:, 2],
        prompt_I=prompt_I,
        creator_I=creator_I,
    )


def hold_out(triplets: Triplets, share: float, *, seed: int) -> dict[str, Triplets]:
    """``train`` and the ``SPLITS``, by seed. A pair has a new creator where either picture is of a held-out one. The
    creator with most items is never held out, and without two creators nothing is held out by creator."""
    random = seeded(seed, "social", "split")
    new_Q = torch.zeros(len(triplets.prompts), dtype=torch.bool)
    used = triplets.prompt_T.unique()
    new_Q[used[torch.randperm(len(used), generator=random)[: max(1, round(share * len(used)))]]] = True
    counts = torch.bincount(triplets.creator_I.clamp_min(0)) if bool((triplets.creator_I >= 0).any()) else torch.ones(1)
    smaller = counts.argsort(descending=True, stable=True)[1:]
    order = torch.randperm(len(smaller), generator=random)[: max(1, round(share * len(counts)))]
    new_C = torch.zeros(len(counts), dtype=torch.bool)
    new_C[smaller[order]] = True
    prompt_T = new_Q[triplets.prompt_T]
    creator_T = new_C[triplets.creator_I[triplets.kept_T]] | new_C[triplets.creator_I[triplets.left_T]]
    return {
        "train": triplets.where(~prompt_T & ~creator_T),
        "prompts": triplets.where(prompt_T & ~creator_T),
        "creators": triplets.where(~prompt_T & creator_T),
        "both": triplets.where(prompt_T & creator_T),
    }


class SocialTowers(nn.Module):
    """Prompt's words and picture's features, each as a unit vector ``[.., E]`` of one space.

    Args:
        vocabulary: the words that prompts are read by.
        features: D.
    """

    def __init__(self, vocabulary: list[str], features: int, config: SocialConfig) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.bag = nn.EmbeddingBag(max(1, len(vocabulary)), config.width, mode="mean")
        self.prompt = mlp([config.width, config.width, config.width], lambda _: nn.GELU())
        self.picture = mlp([features, 2 * config.width, config.width], lambda _: nn.GELU())

    def ask(self, prompts: tuple[str, ...], *, hidden_N: Tensor | None = None) -> Tensor:
        """Prompts ``[N, E]``; of a hidden one, or one of unknown words, the same vector for all."""
        ids, offsets = word_bags(prompts, self.vocabulary)
        words_NE = self.bag(ids, offsets[:-1])
        return self.ask_of(words_NE if hidden_N is None else words_NE.masked_fill(hidden_N[:, None], 0.0))

    def ask_of(self, words_XE: Tensor) -> Tensor:
        """The same from the prompts' mean words."""
        return F.normalize(self.prompt(words_XE), dim=-1)

    def show(self, features_XD: Tensor) -> Tensor:
        """Pictures ``[.., E]``."""
        return F.normalize(self.picture(features_XD), dim=-1)


def loss(prompt_NE: Tensor, kept_NE: Tensor, left_NE: Tensor, margin: float) -> Tensor:
    """``mean relu(|t - p|^2 - |t - n|^2 + margin)`` over unit vectors.

    Example:
        >>> t = torch.tensor([[1.0, 0.0]])
        >>> loss(t, t, -t, 0.3).item(), round(loss(t, -t, t, 0.3).item(), 1)
        (0.0, 4.3)
    """
    near, far = ((prompt_NE - side).square().sum(-1) for side in (kept_NE, left_NE))
    return F.relu(near - far + margin).mean()


def fit(triplets: Triplets, features_ID: Tensor, config: SocialConfig, *, seed: int) -> SocialTowers:
    """Towers fitted on triplets, frozen.

    Raises:
        DataError: no triplets.
    """
    if not len(triplets):
        raise DataError("the social reward has no pair to learn from; hold out less (rl.social.held_out).")
    towers = untrained(triplets, features_ID, config, seed=seed).train()
    random = seeded(seed, "social", "fit")
    ids, offsets = word_bags(triplets.prompts, towers.vocabulary)
    optimiser = torch.optim.AdamW(towers.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * (1 - step / config.steps)
        at_N = torch.randint(len(triplets), (min(config.batch, len(triplets)),), generator=random)
        hidden_N1 = torch.rand(len(at_N), 1, generator=random) < config.wordless
        words_QE = towers.bag(ids, offsets[:-1])
        prompt_NE = towers.ask_of(words_QE[triplets.prompt_T[at_N]].masked_fill(hidden_N1, 0.0))
        kept_NE, left_NE = (towers.show(features_ID[side[at_N]]) for side in (triplets.kept_T, triplets.left_T))
        optimiser.zero_grad(set_to_none=True)
        loss(prompt_NE, kept_NE, left_NE, config.margin).backward()
        optimiser.step()
    return towers.eval().requires_grad_(False)


def untrained(triplets: Triplets, features_ID: Tensor, config: SocialConfig, *, seed: int) -> SocialTowers:
    """Towers as they begin; they know the words of the triplets' prompts."""
    seen = [triplets.prompts[place] for place in triplets.prompt_T.unique().tolist()]
    with global_seed(seed, "social", "towers"):
        return SocialTowers(vocabulary_of(seen, limit=4096), features_ID.shape[1], config).eval()


Scorer = Callable[[Tensor, Tensor], Tensor]
"""``(prompts [N], items [N]) -> scores [N]``."""


def scorer(towers: SocialTowers, triplets: Triplets, features_ID: Tensor) -> Scorer:
    """Minus the squared distance of an item's picture to a prompt."""
    with torch.no_grad():
        prompt_QE, picture_IE = towers.ask(triplets.prompts), towers.show(features_ID)
    return lambda prompt_N, item_N: -(prompt_QE[prompt_N] - picture_IE[item_N]).square().sum(-1)


def right(score: Scorer, triplets: Triplets) -> Tensor:
    """Bool ``[T]``: the picture that people came back to scores strictly more. A tie is wrong."""
    return score(triplets.prompt_T, triplets.kept_T) > score(triplets.prompt_T, triplets.left_T)


def accuracy(score: Scorer, triplets: Triplets, *, seed: int = 0) -> list[float]:
    """Pairwise accuracy ``[mean, low, high]``: the mean over prompts of a prompt's share of right pairs, with its 95 %
    bootstrap interval over prompts (the pairs of one prompt share pictures, so they are not independent)."""
    share_Q = user_means(right(score, triplets).double().numpy(), triplets.prompt_T.numpy(), len(triplets.prompts))
    return [round(value, 4) for value in bootstrap(share_Q, seed=seed).as_list()]


def table(catalogue: Catalogue, values_I: np.ndarray, seen: Triplets) -> Scorer:
    """The control that looks at no picture: how far each attribute's value lies above its prompt's mean, added up.

    Args:
        values_I: what is known of items, such as log purchases; only the items of ``seen`` are looked at.
    """
    known = torch.cat([seen.kept_T, seen.left_T]).unique().numpy()
    prompt_I = seen.prompt_I.numpy()
    above = values_I[known] - user_means(values_I[known], prompt_I[known], len(seen.prompts))[prompt_I[known]]
    score_I = np.zeros(len(catalogue))
    for name in catalogue.attributes:
        level_I = _levels(catalogue, name)[1].numpy()
        means = user_means(above, level_I[known], int(level_I.max()) + 1)
        score_I += np.nan_to_num(means)[level_I]
    found = torch.from_numpy(score_I)
    return lambda _, item_N: found[item_N]


class SocialReward:
    """The scorer as a reward: fitted on every triplet, in SDs above the pictures of the same prompt.

    Attributes:
        facts: pairwise accuracies of the same fit with prompts and creators held out, beside its controls.
    """

    def __init__(
        self, catalogue: Catalogue, reuse: pl.DataFrame, features_ID: Tensor, config: SocialConfig, *, seed: int
    ) -> None:
        triplets = mine(catalogue, reuse, config, seed=seed)
        self.facts = prove(catalogue, reuse, triplets, features_ID, config, seed=seed)
        self.towers = fit(triplets, features_ID, config, seed=seed)
        self._prompt_I = triplets.prompt_I
        score = scorer(self.towers, triplets, features_ID)
        score_I = score(self._prompt_I, torch.arange(len(catalogue))).double()
        self._mean_Q = torch.from_numpy(user_means(score_I.numpy(), self._prompt_I.numpy(), len(triplets.prompts)))
        self._sd = (score_I - self._mean_Q[self._prompt_I]).std().clamp_min(1e-6)
        with torch.no_grad():
            self._prompt_QE = self.towers.ask(triplets.prompts)

    @torch.no_grad()
    def score(self, features_UnD: Tensor, nearest_Un: Tensor) -> Tensor:
        """Of pictures ``[U, n]``, each asked for what its nearest item is asked for."""
        prompt_Un = self._prompt_I[nearest_Un]
        score_Un = -(self._prompt_QE[prompt_Un] - self.towers.show(features_UnD)).square().sum(-1)
        return ((score_Un - self._mean_Q[prompt_Un]) / self._sd).float()


def prove(
    catalogue: Catalogue,
    reuse: pl.DataFrame,
    triplets: Triplets,
    features_ID: Tensor,
    config: SocialConfig,
    *,
    seed: int,
) -> dict[str, float | list[float]]:
    """Pairwise accuracies ``[mean, low, high]`` by split: ``NAME`` of the towers, ``NAME_untrained``,
    ``NAME_popularity`` (how many tried the very item: it needs no picture, and has nothing to say of a new one),
    ``NAME_attributes`` and ``NAME_popular_attributes`` (tables of what the attributes' values say of re-use, and of
    popularity). A split without pairs has none."""
    parts = hold_out(triplets, config.held_out, seed=seed)
    facts: dict[str, float | list[float]] = {f"{name}_pairs": len(part) for name, part in parts.items()}
    if not len(parts["train"]):
        return facts
    tried_I, kept_I = _counts(catalogue, reuse)
    known_I, share_I = np.log1p(tried_I), (kept_I + 1) / (tried_I + 2)
    popularity_I = torch.from_numpy(known_I)
    scorers: dict[str, Scorer] = {
        "": scorer(fit(parts["train"], features_ID, config, seed=seed), triplets, features_ID),
        "_untrained": scorer(untrained(parts["train"], features_ID, config, seed=seed), triplets, features_ID),
        "_popularity": lambda _, item_N: popularity_I[item_N],
        "_attributes": table(catalogue, share_I, parts["train"]),
        "_popular_attributes": table(catalogue, known_I, parts["train"]),
    }
    for name in SPLITS:
        if len(parts[name]):
            facts |= {f"{name}{of}": accuracy(score, parts[name], seed=seed) for of, score in scorers.items()}
    return facts


def _attribute(catalogue: Catalogue, wanted: str, setting: str, default: list[str] | tuple[str, ...]) -> str:
    """The attribute of a setting, or the default's first; empty where there is none and none is needed."""
    if wanted and wanted not in catalogue.attributes or setting == "prompt" and not (wanted or default):
        raise ConfigError(
            f"rl.social.{setting} is {wanted!r}; items have the attributes "
            f"{', '.join(catalogue.attributes) or 'none'}. Name one of them, or leave rl.weights.social at 0."
        )
    return wanted or next(iter(default), "")


def _counts(catalogue: Catalogue, reuse: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """People who tried each item, and who kept it, float64 ``[I]`` each."""
    found = catalogue.items.select("item_id").join(reuse, on="item_id", how="left", maintain_order="left").fill_null(0)
    return found["tried"].to_numpy().astype(float), found["kept"].to_numpy().astype(float)


def _levels(catalogue: Catalogue, name: str) -> tuple[tuple[str, ...], Tensor]:
    """``(values, index of each item's value [I])`` of an attribute."""
    values = catalogue.items[name].cast(pl.String).fill_null("")
    levels = sorted(values.unique().to_list())
    place = {level: i for i, level in enumerate(levels)}
    return tuple(levels), torch.tensor([place[value] for value in values.to_list()], dtype=torch.long)


def _z(kept_a: np.ndarray, tried_a: np.ndarray, kept_b: np.ndarray, tried_b: np.ndarray) -> np.ndarray:
    """Standard errors between two shares, pooled; 0 where both are all or nothing."""
    pooled = (kept_a + kept_b) / (tried_a + tried_b)
    error = np.sqrt(pooled * (1 - pooled) * (1 / tried_a + 1 / tried_b))
    return np.divide(kept_a / tried_a - kept_b / tried_b, error, out=np.zeros_like(error), where=error > 0)
