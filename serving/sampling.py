"""How pictures are asked for, and within which bounds. Light to import: no model code."""

from __future__ import annotations

import math
from dataclasses import dataclass

from couturier.components.errors import ConfigError

MAX_PICTURES = 64
MAX_HISTORY = 200
MAX_SEED = 2**53 - 1  # the largest whole number that JSON readers in browsers keep exact
GUIDANCE = (0.0, 10.0)
TEMPERATURE = (0.0, 5.0)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn. The same sampling for the same history and bundle gives the same bytes.

    Raises:
        ConfigError: a value outside its range.
    """

    n: int = 4
    """Pictures, 1 to 64."""
    guidance: float = 1.0
    """0 ignores the history, 1 follows it as learned, above 1 more strongly."""
    temperature: float = 1.0
    """0: the likeliest codes each time; below 1: safer and more alike; above 1: more varied."""
    seed: int = 0
    likeliest: bool = False
    """The likeliest pictures, all different, the surest first, instead of random draws: ``temperature`` and ``seed``
    change nothing then."""
    new: bool = False
    """With ``likeliest``: pictures of the history's own items are passed over."""

    def __post_init__(self) -> None:
        _within("n", self.n, 1, MAX_PICTURES)
        _within("guidance", self.guidance, *GUIDANCE)
        _within("temperature", self.temperature, *TEMPERATURE)
        _within("seed", self.seed, 0, MAX_SEED)
        if self.new and not self.likeliest:
            raise ConfigError(
                "new is True without likeliest; only the likeliest pictures can be told from what was had."
            )


def _within(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} is {value}; wanted {low} to {high}.")
