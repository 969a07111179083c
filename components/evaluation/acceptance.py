"""What the demo promises, and whether this run kept it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Promise:
    """A figure, where it stands in ``table.json``, and what is wanted of one end of its interval.

    ``end`` is 0 for the mean, 1 for the lower end, 2 for the upper end. An open goal is reported, not demanded.
    """

    name: str
    path: tuple[str, ...]
    end: int
    at_least: float | None = None
    at_most: float | None = None
    goal: bool = False

    def wanted(self) -> str:
        """In words, for the report."""
        end = ("", "lower end ", "upper end ")[self.end]
        bounds = []
        if self.at_least is not None:
            bounds.append(f"at least {self.at_least:g}")
        if self.at_most is not None:
            bounds.append(f"at most {self.at_most:g}")
        return end + " and ".join(bounds) + (" (open goal)" if self.goal else "")

    def kept(self, triple: list[float]) -> bool:
        value = triple[self.end]
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


PROMISES = (
    Promise("codec_psnr_db", ("codec", "psnr_db"), 0, at_least=26),
    Promise("codec_codes_used_share", ("codec", "codes_used_share"), 0, at_least=0.9),
    Promise("codec_retrieval_top1", ("codec", "retrieval_top1"), 0, at_least=0.98),
    Promise("nll_wrong_minus_true", ("nll", "wrong_minus_true"), 1, at_least=0.15),
    Promise("nll_unconditional_minus_true", ("nll", "unconditional_minus_true"), 1, at_least=0),
    Promise("judge_gauc", ("judge", "gauc"), 0, at_least=0.6),
    Promise("judge_gauc_wrong_user", ("judge", "gauc_wrong_user"), 0, at_least=0.47, at_most=0.53),
    Promise("judge_gauc_difference", ("judge", "gauc_difference"), 1, at_least=0.08),
    Promise("grpo-sft:judge", ("differences", "grpo-sft:judge"), 1, at_least=0.3),
    Promise("grpo-sft:basket_precision", ("differences", "grpo-sft:basket_precision"), 1, at_least=0.02),
    Promise("grpo-wrong_user:basket_precision", ("differences", "grpo-wrong_user:basket_precision"), 1, at_least=0.04),
    Promise("diversity_ratio", ("ratios", "grpo/sft:diversity"), 0, at_least=0.8),
    Promise("grpo_validity", ("table", "grpo", "validity"), 0, at_least=0.95),
    Promise("grpo_mush", ("table", "grpo", "mush"), 0, at_most=0.02),
    Promise("grpo_copied", ("table", "grpo", "copied"), 0, at_most=0.5),
    Promise(
        "grpo-popularity_eq:basket_precision",
        ("differences", "grpo-popularity_eq:basket_precision"),
        1,
        at_least=0,
        goal=True,
    ),
    Promise(
        "grpo-copy_favourites_eq:basket_precision",
        ("differences", "grpo-copy_favourites_eq:basket_precision"),
        1,
        at_least=0,
        goal=True,
    ),
)


def acceptance(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``{name: {value, low, high, wanted, passed, goal}}`` of every promise whose figure is in ``table``."""
    found = {}
    for promise in PROMISES:
        triple = _find(table, promise.path)
        if triple is not None:
            found[promise.name] = {
                "value": triple[0],
                "low": triple[1],
                "high": triple[2],
                "wanted": promise.wanted(),
                "passed": promise.kept(triple),
                "goal": promise.goal,
            }
    return found


def _find(table: Mapping[str, Any], path: tuple[str, ...]) -> list[float] | None:
    """The figure at a path as ``[mean, low, high]``; a lone number brings the ``_low`` and ``_high`` beside it."""
    place: Any = table
    for key in path[:-1]:
        place = place.get(key, {})
    value = place.get(path[-1])
    if isinstance(value, int | float):
        return [float(value), float(place.get(f"{path[-1]}_low", value)), float(place.get(f"{path[-1]}_high", value))]
    return None if value is None else [float(part) for part in value]
