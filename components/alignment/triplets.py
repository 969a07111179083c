"""Pairs of items to learn Social Reward from: of one prompt, one of them kept by more of its people, beyond chance.

Pairs, held-out prompts and held-out creators after arXiv 2402.09872; how re-use is counted, and that shares must differ
by a z-test, is ours (:mod:`couturier.components.alignment.social` has the whole).

Legend: Q prompts, T triplets, I items, C creators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.runtime import seeded, seeded_numpy

CREATORS = ("creator", "artist", "author", "maker", "designer", "brand", "manufacturer")
"""Item attributes that say who made it, the surest first."""
_MOST_MEMBERS = 1000
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
        reuse: of :func:`~couturier.components.data.reuse.reuse_of`; of all people, or of some.

    Returns:
        Triplets, none where no two items of one prompt differ.

    Raises:
        ConfigError: an attribute that items do not have.
    """
    prompt = _attribute(catalogue, config.prompt, "prompt", catalogue.attributes[:1])
    creator = _attribute(catalogue, config.creator, "creator", [c for c in CREATORS if c in catalogue.attributes])
    names, prompt_I = levels(catalogue, prompt)
    creator_I = levels(catalogue, creator)[1] if creator else torch.full((len(catalogue),), -1)
    tried_I, kept_I = counts_of(catalogue, reuse)
    random = seeded_numpy(seed, "social", "pairs")
    rows = [np.zeros((0, 3), np.int64)]
    for place in range(len(names)):
        members = np.flatnonzero((prompt_I.numpy() == place) & (tried_I >= config.min_tried))
        if len(members) > _MOST_MEMBERS:  # all pairs of so many would not fit
            members = np.sort(random.choice(members, _MOST_MEMBERS, replace=False))
        one, other = (side.ravel() for side in np.meshgrid(members, members, indexing="ij"))
        beyond = _z(kept_I[one], tried_I[one], kept_I[other], tried_I[other]) >= config.z
        pairs = np.stack([np.full(beyond.sum(), place), one[beyond], other[beyond]], 1)
        if len(pairs) > config.pairs_a_prompt:
            pairs = pairs[np.sort(random.choice(len(pairs), config.pairs_a_prompt, replace=False))]
        rows.append(pairs)
    found = torch.from_numpy(np.concatenate(rows))
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


def _attribute(catalogue: Catalogue, wanted: str, setting: str, default: list[str] | tuple[str, ...]) -> str:
    """The attribute of a setting, or the default's first; empty where there is none and none is needed."""
    if wanted and wanted not in catalogue.attributes or setting == "prompt" and not (wanted or default):
        raise ConfigError(
            f"rl.social.{setting} is {wanted!r}; items have the attributes "
            f"{', '.join(catalogue.attributes) or 'none'}. Name one of them, or leave rl.weights.social at 0."
        )
    return wanted or next(iter(default), "")


def counts_of(catalogue: Catalogue, reuse: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """People who tried each item, and who kept it, float64 ``[I]`` each."""
    counts = reuse.group_by("item_id").agg(pl.col("tried", "kept").sum())
    found = catalogue.items.select("item_id").join(counts, on="item_id", how="left", maintain_order="left").fill_null(0)
    return found["tried"].to_numpy().astype(float), found["kept"].to_numpy().astype(float)


def levels(catalogue: Catalogue, name: str) -> tuple[tuple[str, ...], Tensor]:
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
