"""Social Reward: which of two pictures of the same kind people come back to, learned from what they did.

    people who tried / kept an item ─▶ triplets (prompt, kept more, kept less) ─▶ two towers ─▶ score of any picture
                                    └─ held-out prompts, creators and people ─▶ pairwise accuracy

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

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from couturier.components.alignment.triplets import SocialConfig, Triplets, counts_of, hold_out, levels, mine
from couturier.components.data.formats import Catalogue
from couturier.components.data.reuse import FOLDS
from couturier.components.errors import DataError
from couturier.components.evaluation.statistics import bootstrap, user_means
from couturier.components.interest.encoder import vocabulary_of, word_bags
from couturier.components.interest.layers import mlp
from couturier.components.runtime import global_seed, seeded

PEOPLE = "people"
"""A further split: known pictures, and the other half of the people says which of two is kept. It is what the reward
must know to be of use, since it scores pictures of known kinds; the ``SPLITS`` say whether it knows more than that."""


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

    def ask(self, prompts: tuple[str, ...]) -> Tensor:
        """Prompts ``[Q, E]``; those of unknown words alone are all the same."""
        ids, offsets = word_bags(prompts, self.vocabulary)
        return self.ask_of(self.bag(ids, offsets[:-1]))

    def ask_of(self, words_XE: Tensor) -> Tensor:
        """The same from the prompts' mean words; zeros hide a prompt."""
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
        level_I = levels(catalogue, name)[1].numpy()
        means = user_means(above, level_I[known], int(level_I.max()) + 1)
        score_I += np.nan_to_num(means)[level_I]
    found = torch.from_numpy(score_I)
    return lambda _, item_N: found[item_N]


class SocialReward:
    """The scorer as a reward: fitted on every triplet, in SDs above the pictures of the same prompt.

    Attributes:
        facts: pairwise accuracies of the same fit with prompts, creators and people held out, beside its controls.

    Raises:
        DataError: no two items of one prompt differ.
    """

    def __init__(
        self, catalogue: Catalogue, reuse: pl.DataFrame, features_ID: Tensor, config: SocialConfig, *, seed: int
    ) -> None:
        triplets = mine(catalogue, reuse, config, seed=seed)
        if not len(triplets):
            tried_I, kept_I = counts_of(catalogue, reuse)
            raise DataError(
                f"no two items of one prompt differ in how many people came back to them ({int(kept_I.sum())} returns "
                f"of {int(tried_I.sum())} tries). Leave rl.weights.social at 0, name another rl.social.prompt, or "
                "lower rl.social.min_tried or rl.social.z."
            )
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
    facts = _compare(catalogue, reuse, parts, features_ID, config, seed=seed)
    asked, others = (reuse.filter(pl.col("fold") == fold) for fold in range(FOLDS))
    halves = {"train": mine(catalogue, asked, config, seed=seed), PEOPLE: mine(catalogue, others, config, seed=seed)}
    by_people = _compare(catalogue, asked, halves, features_ID, config, seed=seed)
    return facts | {name: value for name, value in by_people.items() if name.startswith(PEOPLE)}


def _compare(
    catalogue: Catalogue,
    reuse: pl.DataFrame,
    parts: dict[str, Triplets],
    features_ID: Tensor,
    config: SocialConfig,
    *,
    seed: int,
) -> dict[str, float | list[float]]:
    """Fit on ``train``, measure on the other parts, beside the controls, which know the same people."""
    facts: dict[str, float | list[float]] = {f"{name}_pairs": len(part) for name, part in parts.items()}
    train = parts["train"]
    if not len(train):
        return facts
    tried_I, kept_I = counts_of(catalogue, reuse)
    known_I, share_I = np.log1p(tried_I), (kept_I + 1) / (tried_I + 2)
    popularity_I = torch.from_numpy(known_I)
    scorers: dict[str, Scorer] = {
        "": scorer(fit(train, features_ID, config, seed=seed), train, features_ID),
        "_untrained": scorer(untrained(train, features_ID, config, seed=seed), train, features_ID),
        "_popularity": lambda _, item_N: popularity_I[item_N],
        "_attributes": table(catalogue, share_I, train),
        "_popular_attributes": table(catalogue, known_I, train),
    }
    for name, part in parts.items():
        if name != "train" and len(part):
            facts |= {f"{name}{of}": accuracy(score, part, seed=seed) for of, score in scorers.items()}
    return facts
