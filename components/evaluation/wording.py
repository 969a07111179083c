"""What the rows and figures of an evaluation are called and mean, and how a figure is written, for people who did not
make them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Triple = tuple[float, float, float]  # mean, lower end, upper end

METRICS: dict[str, tuple[str, str, int]] = {
    # name: (words, what it means, +1 higher is better | -1 lower | 0 neither)
    "basket_precision": ("In next basket", "Share of pictures whose nearest real item is in the next real basket.", 1),
    "distinct_hits": (
        "Found of basket",
        "Different items of the next basket that are drawn, over the pictures: drawing one twice counts once.",
        1,
    ),
    "basket_precision_new": (
        "In next, new only",
        "The same share, among the pictures that are not of the history: what copying cannot earn.",
        1,
    ),
    "hit@10": ("Hit@10", "The whole catalogue ranked by likeness to the pictures: is a next item in the first 10?", 1),
    "ndcg@10": ("NDCG@10", "The same ranking, where a higher place counts more, against the ideal order.", 1),
    "hr_target": ("Target drawn", "Share of moments where some picture is one given item of the next basket.", 1),
    "sim_next": ("Like next", "Cosine from a picture to the nearest item of the next basket.", 1),
    "sim_history": (
        "Like history",
        "Cosine from a picture to the nearest item of the history: personal, or copied.",
        0,
    ),
    "diversity": ("Diversity", "Mean distance between two pictures of one person: 0 means all alike.", 1),
    "distinct": ("Distinct", "Different items among the pictures of one person, as a share of them.", 1),
    "between_user": ("Between people", "Mean distance to the pictures of other people: 0 means all get the same.", 1),
    "novelty": ("Novelty", "Share of pictures whose nearest real item is not in the history.", 1),
    "copied": ("Copied", "Share of pictures whose nearest real item is in the history.", -1),
    "validity": ("Valid", "Share of pictures that are sharp: close, pixel by pixel, to some real tile.", 1),
    "mush": ("Mush", "Share of pictures that are far, pixel by pixel, from every real tile.", -1),
    "frechet": (
        "Fréchet",
        "Distance of all pictures from the real next items, on this encoder only: compare within this table.",
        -1,
    ),
    "judge": ("Judge", "Score of the user-interest judge, in standard deviations. RL was trained on it.", 1),
    "category": ("Category", "Share of pictures whose category, as read off them, occurs in the next basket.", 1),
    "department": ("Department", "Share of pictures whose department, as read off them, occurs in the next basket.", 1),
    "brand": ("Brand", "Share of pictures whose brand, as read off them, occurs in the next basket.", 1),
    "tier": ("Price tier", "Share of pictures whose price tier, as read off them, occurs in the next basket.", 1),
    "coverage": ("Coverage", "Share of the catalogue that is drawn for somebody.", 1),
    "hit@20": ("Hit@20", "As Hit@10, for the first 20.", 1),
    "ndcg@20": ("NDCG@20", "As NDCG@10, for the first 20.", 1),
    "hit@50": ("Hit@50", "As Hit@10, for the first 50.", 1),
    "ndcg@50": ("NDCG@50", "As NDCG@10, for the first 50.", 1),
}
ROWS: dict[str, tuple[str, str, str]] = {
    # name: (words, what it is, group)
    "grpo": (
        "GRPO",
        "The generator after imitation and reinforcement learning, with the person's own history.",
        "ours",
    ),
    "grpo_guided": (
        "GRPO, guided",
        "The generator after RL, pushed further towards the history while sampling.",
        "ours",
    ),
    "sft": ("SFT", "The generator after supervised fine-tuning only, with the person's own history.", "ours"),
    "sft_guided": ("SFT, guided", "SFT pushed further towards the history while sampling; no RL.", "ours"),
    "best_of_n": ("SFT, best of n", "SFT draws many, the judge keeps the best: the same compute without RL.", "ours"),
    "unconditional": ("No history", "The generator told nothing about the person.", "controls"),
    "wrong_user": ("Wrong person", "The generator after RL given somebody else's history.", "controls"),
    "sft_wrong_user": ("Wrong person, SFT", "The SFT generator given somebody else's history.", "controls"),
    "random_item": ("Random item", "Real items drawn at random from the catalogue.", "controls"),
    "copy_last": ("Copy last", "The items the person took last.", "controls"),
    "copy_favourites": (
        "Copy favourites",
        "The items the person took most: hard to beat where people buy again.",
        "controls",
    ),
    "nearest_item": ("Nearest item", "The real items nearest to the mean of the history.", "controls"),
    "popularity": ("Popularity", "The items most taken by everybody.", "controls"),
    "popularity_eq": (
        "Popularity, as new",
        "Popular items, as many of the history and as many repeats as GRPO drew for the same person: equal novelty.",
        "controls",
    ),
    "copy_favourites_eq": (
        "Favourites, as new",
        "Favourites and popular new items, as many of each and as many repeats as GRPO drew: equal novelty.",
        "controls",
    ),
    "nearest_item_eq": (
        "Nearest, as new",
        "Real items nearest to the history, as many of it and as many repeats as GRPO drew: equal novelty.",
        "controls",
    ),
    "oracle": ("Oracle", "The true next items, put through the codec: the best any drawing could do.", "oracle"),
}
GROUPS = {"ours": "Our generators", "controls": "Controls", "oracle": "Upper bound"}
# How a row is named inside a sentence.
SPOKEN: dict[str, str] = {
    "grpo_guided": "guided GRPO",
    "sft_guided": "guided SFT",
    "best_of_n": "best-of-n SFT",
    "unconditional": "no history",
    "wrong_user": "a wrong person's history",
    "sft_wrong_user": "SFT with a wrong person's history",
    "random_item": "random items",
    "copy_last": "copying the last items",
    "copy_favourites": "copying the favourites",
    "nearest_item": "the nearest real items",
    "popularity": "popularity",
    "popularity_eq": "popularity at equal novelty",
    "copy_favourites_eq": "copying the favourites at equal novelty",
    "nearest_item_eq": "the nearest real items at equal novelty",
    "oracle": "the oracle",
}
NAMES: dict[str, str] = {
    "codec_psnr_db": "Codec likeness, dB",
    "codec_codes_used_share": "Codes in use, share",
    "codec_retrieval_top1": "Codec, own tile found",
    "nll_wrong_minus_true": "Wrong − true person, nats",
    "nll_unconditional_minus_true": "Nobody − true person, nats",
    "judge_gauc": "Judge, GAUC",
    "judge_gauc_wrong_user": "Judge, GAUC of a wrong person",
    "judge_gauc_difference": "Judge, GAUC true − wrong person",
    "diversity_ratio": "GRPO ÷ SFT, diversity",
    "grpo_validity": "GRPO, valid",
    "grpo_mush": "GRPO, mush",
    "grpo_copied": "GRPO, copied",
    "between_user": "Between people",
    "within_user": "within one person",
    "psnr_db": "PSNR, dB",
    "psnr_db_lowest": "PSNR of the worst tile, dB",
    "codes_used_share": "Codes in use, share",
    "retrieval_top1": "Own tile found, by the encoder",
    "retrieval_top1_pixels": "Own tile found, by pixels",
    "true": "True person",
    "wrong": "Wrong person",
    "unconditional": "Nobody",
    "wrong_minus_true": "Wrong − true person",
    "unconditional_minus_true": "Nobody − true person",
    "popularity_minus_true": "Popularity − true person",
}


def words(name: str) -> str:
    """A name of code as words: ``valid_nats`` → ``valid nats``."""
    return name.replace("_", " ").strip()


def row(name: str) -> tuple[str, str, str]:
    """(words, meaning, group) of a row; a row nobody described is a control."""
    return ROWS.get(name, (NAMES.get(name, words(name)), "A further row of this run.", "controls"))


def metric(name: str) -> tuple[str, str, int]:
    """(words, meaning, direction) of a metric; one nobody described has no direction."""
    return METRICS.get(name, (words(name), "A further figure of this run.", 0))


def pair(name: str) -> tuple[str, str, str] | None:
    """``grpo-sft:basket_precision`` → (left row, right row, metric); None for any other name."""
    match = re.fullmatch(r"(\w+)-(\w+):(.+)", name)
    return None if match is None else (match[1], match[2], match[3])


def title(name: str) -> str:
    """Words for a name of ``acceptance``, ``judge``, ``nll`` or ``codec``: a difference, or the name itself."""
    if (parts := pair(name)) is not None:
        return f"{row(parts[0])[0]} − {row(parts[1])[0]}, {metric(parts[2])[0].lower()}"
    if name in NAMES:
        return NAMES[name]
    text = re.sub(r"\b(nll|rl|sft|grpo|psnr|gauc|auc)\b", lambda match: match[0].upper(), words(name))
    return text[:1].upper() + text[1:]


def triple(value: Any) -> Triple | None:
    """A list of three, or a lone number thrice; None for anything else or a figure that is not finite."""
    parts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value, value]
    numbers = [float(p) for p in parts if isinstance(p, int | float) and not isinstance(p, bool) and math.isfinite(p)]
    return (numbers[0], numbers[1], numbers[2]) if len(parts) == len(numbers) == 3 else None


def figures(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by a colon; ``x``, ``x_low``, ``x_high`` become ``[x, low, high]``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= figures(value, f"{before}{name}:")
        elif not (name.endswith(("_low", "_high")) and name.rpartition("_")[0] in values):
            ends = [values.get(f"{name}_low"), values.get(f"{name}_high")]
            flat[before + name] = value if None in ends else [value, *ends]
    return flat


def verdict(value: Triple) -> str:
    """``yes`` above zero, ``no`` below, ``open`` where the interval holds zero."""
    return "yes" if value[1] > 0 else "no" if value[2] < 0 else "open"


def number(value: float | int | None, digits: int | None = None, *, signed: bool = False) -> str:
    """A figure as people write it: ``.107``, ``12.4``, ``−.02``; an en dash for what is missing or not finite.

    Args:
        digits: after the point; three significant ones when None.
    """
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if digits is None:
        whole = float(value).is_integer() and size >= 1
        digits = 0 if whole or size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    text = f"{size:,.{digits}f}"
    empty = not text.strip("0.,")
    if empty:
        text = "0"
    elif text.startswith("0."):
        text = text[1:]
    sign = "" if empty else "−" if value < 0 else "+" if signed else ""
    return sign + text


def interval(value: Triple | None, digits: int | None = None) -> str:
    """``[low, high]``, or nothing where there is no interval to show."""
    if value is None:
        return ""
    low, high = (number(end, digits) for end in value[1:])
    return "" if low == high else f"[{low}, {high}]"


def span(value: Triple, *, signed: bool = True) -> str:
    """A mean and its interval."""
    return f"{number(value[0], signed=signed)} {interval(value)}".strip()


def plain(value: Any) -> str:
    """Any small value of a record, for reading."""
    if isinstance(value, Mapping):
        return ", ".join(f"{words(str(name))} {plain(part)}" for name, part in value.items() if part is not None)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, int | float) else "–" if value is None else str(value)
