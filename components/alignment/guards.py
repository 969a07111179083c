"""When alignment must stop: rules on what is logged anyway, averaged over some steps, with the reason in words.

A reward can be fooled in known ways (generation.md 1.13): pictures leave the reference far behind, all become one,
all become copies, every group agrees so that nothing can be learned, or the reward rises while an encoder that it
never saw sees people served worse.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from couturier.components.errors import ConfigError

WATCHED = "watch_basket_precision"


@dataclass(frozen=True, kw_only=True)
class Guards:
    """Limits; 0 switches a rule off."""

    window: int = 10
    """Steps that a figure is averaged over."""
    kl_nats: float = 12.0
    """At most so many nats a picture away from where alignment began."""
    entropy_nats: float = 0.02
    """At least so many nats a code left in the policy."""
    distinct: float = 0.25
    """At least this share of a group's pictures must differ."""
    copied: float = 0.85
    """At most this share of pictures out of the history."""
    zero_variance_groups: float = 0.9
    """At most this share of groups whose pictures all earn the same."""
    watch_tolerance: float = 0.15
    """Stop when the watched next-basket precision falls below (1 - this) of its best."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ConfigError(f"rl.guards.{name} is {value}; it cannot be negative (0 switches the rule off).")
        if self.window < 1:
            raise ConfigError(f"rl.guards.window is {self.window}; it must be at least 1 step.")


_CEILINGS = ("kl_nats", "copied", "zero_variance_groups")
_FLOORS = ("entropy_nats", "distinct")


class Watchman:
    """Remembers the figures of the last steps and says when a rule is broken.

    Example:
        >>> man = Watchman(Guards(window=2, distinct=0.5))
        >>> man.reason_to_stop(1, {"distinct": 0.4})
        ''
        >>> man.reason_to_stop(2, {"distinct": 0.4})
        'stopped at step 2: distinct was 0.4 over the last 2 steps, under the limit rl.guards.distinct=0.5'
    """

    def __init__(self, guards: Guards) -> None:
        self.guards, self.best_watch = guards, 0.0
        self.seen = {name: deque[float](maxlen=guards.window) for name in (*_CEILINGS, *_FLOORS)}

    def begin(self) -> None:
        """Nothing is seen yet."""

    def reason_to_stop(self, step: int, values: Mapping[str, float]) -> str:
        """Take in the figures of a step, or of a look; the broken rule in words, or nothing."""
        for name, past in self.seen.items():
            limit = float(vars(self.guards)[name])
            if name not in values:
                continue
            past.append(values[name])
            if not limit or len(past) < self.guards.window:
                continue
            mean = sum(past) / len(past)
            above = name in _CEILINGS
            if mean > limit if above else mean < limit:
                return (
                    f"stopped at step {step}: {name} was {mean:.4g} over the last {len(past)} steps, "
                    f"{'over' if above else 'under'} the limit rl.guards.{name}={limit:g}"
                )
        return self._watched(step, values)

    def _watched(self, step: int, values: Mapping[str, float]) -> str:
        if WATCHED not in values:
            return ""
        now, tolerance = values[WATCHED], self.guards.watch_tolerance
        if tolerance and now < (1 - tolerance) * self.best_watch:
            return (
                f"stopped at step {step}: under the independent encoder next-basket precision fell to {now:.4f} "
                f"from {self.best_watch:.4f} while the reward rose"
            )
        self.best_watch = max(self.best_watch, now)
        return ""

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        past = {name: torch.tensor(list(values), dtype=torch.float64) for name, values in self.seen.items()}
        return {**past, "best_watch": torch.tensor(self.best_watch, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        self.best_watch = float(state["best_watch"])
        for name, past in self.seen.items():
            past.clear()
            past.extend(state[name].tolist())
