"""target_attention and topk_search beside what people write for them: padded histories, and sorting all scores.

    OMP_NUM_THREADS=1 python tests/benchmarks/target_attention.py --json

Forward and backward (search: forward), float32, one thread; medians of the process's CPU time over rounds that take
turns. The ratios are the result, not the milliseconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear, scaled_dot_product_attention

from couturier.kernels.target_attention import dot_attention, mlp_attention
from couturier.kernels.timing import forward_backward, interleaved_ms, provenance
from couturier.kernels.topk_search import topk_search

SEED = 0
HIDDEN = (80, 40)

# Users, candidates a user, longest history, width: the card's own shape first, then what training a judge does.
SHAPES = {
    "one candidate, 79 % padding": (256, 1, 200, 128),
    "5 candidates, short histories": (512, 5, 50, 32),
    "30 candidates, short histories": (128, 30, 50, 64),
}


def lists(users: int, longest: int, g: torch.Generator) -> Tensor:
    """Offsets of histories whose lengths fall off exponentially when they may be long (mean 42 of 200, as the card
    has it, 79 % padding), and evenly when they may not."""
    if longest > 100:
        lengths = torch.empty(users).exponential_(1 / 45, generator=g).long().clamp(1, longest)
    else:
        lengths = torch.randint(1, longest + 1, (users,), generator=g)
    lengths[0] = longest
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def padded_din(
    queries_UCH: Tensor, keys_NH: Tensor, place_UL: Tensor, real_UL: Tensor, layers: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """DIN's attention unit as released: every history as long as the longest, four vectors side by side."""
    k = keys_NH[place_UL][:, None].expand(-1, queries_UCH.shape[1], -1, -1)
    q = queries_UCH[:, :, None].expand_as(k)
    x = torch.cat([q, k, q - k, q * k], -1)
    for weight, bias in layers[:-1]:
        x = torch.sigmoid(linear(x, weight, bias))
    score = linear(x, *layers[-1])[..., 0] / k.shape[-1] ** 0.5
    weights = score.masked_fill(~real_UL[:, None], -1e9).softmax(-1)
    return torch.einsum("ucl,uclh->uch", weights, k)


def attention_calls(shape: tuple[int, int, int, int]) -> tuple[dict[str, Callable[[], None]], dict[str, Any]]:
    """What is timed on one shape, and what the shape is."""
    users, candidates, longest, width = shape
    g = torch.Generator().manual_seed(SEED)
    offsets = lists(users, longest, g)

    def leaf(*size: int) -> Tensor:
        return (0.1 * torch.randn(size, generator=g)).requires_grad_()

    q, k = leaf(users, candidates, width), leaf(int(offsets[-1]), width)
    sizes = (4 * width, *HIDDEN, 1)
    layers = [(leaf(after, before), leaf(after)) for before, after in zip(sizes, sizes[1:], strict=False)]
    place = torch.arange(longest) + offsets[:-1, None]
    real = place < offsets[1:, None]
    place = place.clamp_max(k.shape[0] - 1)
    every = [q, k, *(one for two in layers for one in two)]
    found = {
        "din": forward_backward(lambda: mlp_attention(q, k, offsets, layers), every),
        "din padded": forward_backward(lambda: padded_din(q, k, place, real, layers), every),
        "dot": forward_backward(lambda: dot_attention(q, k, offsets), (q, k)),
        "dot padded": forward_backward(
            lambda: scaled_dot_product_attention(q, k[place], k[place], attn_mask=real[:, None]), (q, k)
        ),
    }
    pairs = int(offsets[-1]) * candidates
    return found, {"pairs": pairs, "padding": round(1 - pairs / (users * candidates * longest), 3)}


def ratio(rounds: int = 7) -> dict[str, Any]:
    """DIN's unit padded over ours on the card's shape, forward and backward: ``{ratio, ours, other, unit}``."""
    calls, facts = attention_calls(next(iter(SHAPES.values())))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ms = interleaved_ms({name: calls[name] for name in ("din", "din padded")}, rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    unit = f"ms forward and backward, {facts['pairs']} behaviours, {facts['padding']:.0%} padding"
    return {"ratio": ms["din padded"] / ms["din"], "ours": ms["din"], "other": ms["din padded"], "unit": unit}


def search_calls(length: int, candidates: int = 100, width: int = 64, k: int = 50) -> dict[str, Callable[[], object]]:
    """100 candidates of one user against a history of ``length``."""
    g = torch.Generator().manual_seed(SEED)
    q, keys = torch.randn(1, candidates, width, generator=g), torch.randn(length, width, generator=g)
    offsets = torch.tensor([0, length])
    return {
        f"search {length}": lambda: topk_search(q, keys, offsets, k),
        f"sort all {length}": lambda: cosine_similarity(q[0, :, None], keys[None], dim=-1).sort(1, descending=True),
    }


def measure(rounds: int) -> dict[str, Any]:
    """All shapes: milliseconds and ratios, with where they come from."""
    torch.set_num_threads(1)
    shapes: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        calls, facts = attention_calls(shape)
        # The scorers apart: after the hundreds of megabytes of padded DIN a small call meets a cold heap.
        ms: dict[str, float] = {}
        for one in ("din", "dot"):
            ms |= interleaved_ms({which: calls[which] for which in (one, f"{one} padded")}, rounds=rounds)
        ratios = {one: ms[f"{one} padded"] / ms[one] for one in ("din", "dot")}
        shapes[name] = {**facts, "ms": ms, "vs_padded": ratios}
    search = {}
    for length in (1_000, 10_000):
        times = interleaved_ms(search_calls(length), rounds=rounds)
        search[length] = {"ms": times, "vs_sorting_all": times[f"sort all {length}"] / times[f"search {length}"]}
    return {
        "target_attention_vs_padded": next(iter(shapes.values()))["vs_padded"]["din"],
        "shapes": shapes,
        "search": search,
        "seed": SEED,
        "rounds": rounds,
        **provenance(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    args = parser.parse_args()
    found = measure(args.rounds)
    for name, one in found["shapes"].items():
        sys.stdout.write(f"{name}: {one['pairs']} pairs, {one['padding']:.0%} padding\n")
        for scorer, times in one["vs_padded"].items():
            sys.stdout.write(f"  {scorer}: ours {one['ms'][scorer]:7.1f} ms, padded takes {times:4.1f} times as long\n")
    for length, one in found["search"].items():
        ours = one["ms"][f"search {length}"]
        sys.stdout.write(
            f"search of 100 candidates in {length}: {ours:6.1f} ms, sorting all takes {one['vs_sorting_all']:4.1f} "
            "times as long\n"
        )
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
