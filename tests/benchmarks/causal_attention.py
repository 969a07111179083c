"""causal_attention compiled beside PyTorch's over padded lists, which is what a sequence judge did before.

    OMP_NUM_THREADS=1 python tests/benchmarks/causal_attention.py --json

Forward and backward, float32, one thread: the least CPU time of the process over rounds that take turns, since so
short a time is only ever disturbed upwards. Memory that is freed stays with the process, as in a fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from couturier.components.runtime import keep_freed_memory  # noqa: E402
from couturier.kernels import dispatch  # noqa: E402
from couturier.kernels.causal_attention import causal_attention, native  # noqa: E402
from couturier.kernels.timing import forward_backward, provenance  # noqa: E402

# Users, shortest and longest list, heads, width of a head.
SHAPES = (
    (128, 1, 50, 1, 64),
    (128, 1, 50, 2, 32),
    (128, 1, 50, 4, 16),
    (128, 33, 50, 1, 64),
    (128, 50, 50, 1, 64),
    (64, 1, 200, 1, 64),
    (64, 1, 200, 4, 16),
)


def inputs(users: int, low: int, high: int, heads: int, width: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values ``[N, A, E]``, the last two halves of one product as in a block, and the offsets."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(low, high + 1, (users,), generator=g)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    q, kv = (torch.randn(int(offsets[-1]), part * heads * width, generator=g) for part in (1, 2))
    leaves = [one.unflatten(-1, (heads, width)).requires_grad_() for one in (q, *kv.chunk(2, -1))]
    return leaves, offsets


def calls(leaves: list[Tensor], offsets: Tensor) -> dict[str, Callable[[], object]]:
    """Compiled and with PyTorch's calls: forward, and forward and backward."""

    q, k, v = leaves

    def attend(backend: dispatch.Wish) -> Tensor:
        with dispatch.use(backend):
            return causal_attention(q, k, v, offsets)

    both: dict[str, dispatch.Wish] = {"ours": "auto", "torch": "torch"}
    made: dict[str, Callable[[], object]] = {f"{name} forward": partial(attend, wish) for name, wish in both.items()}
    return made | {name: forward_backward(partial(attend, wish), leaves) for name, wish in both.items()}


def least_ms(named: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least CPU milliseconds of each call; rounds take turns."""
    least = dict.fromkeys(named, float("inf"))
    for _ in range(rounds):
        for name, call in named.items():
            began = time.process_time()
            call()
            least[name] = min(least[name], 1e3 * (time.process_time() - began))
    return least


def ratio(rounds: int = 60) -> dict[str, Any]:
    """PyTorch over compiled for the first shape: ``{ratio, ours, other, unit, …}``.

    Raises:
        RuntimeError: nothing can be compiled here.
    """
    if native.library(SHAPES[0][-1]) is None:
        raise RuntimeError("no C compiler here (cc or gcc): there is nothing to compare.")
    keep_freed_memory()
    threads, shapes = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for users, low, high, heads, width in SHAPES:
            leaves, offsets = inputs(users, low, high, heads, width)
            name = f"{users} x {low} to {high}, A {heads}, E {width}"
            shapes[name] = {"rows": len(leaves[0])} | least_ms(calls(leaves, offsets), rounds)
    finally:
        torch.set_num_threads(threads)
    first = next(iter(shapes.values()))
    return {
        "ratio": first["torch"] / first["ours"],
        "ours": first["ours"],
        "other": first["torch"],
        "unit": "CPU ms",
        "shapes": shapes,
    }


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    found = ratio(given.rounds) | provenance()
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for shape, ms in found["shapes"].items():
        sys.stdout.write(
            f"{shape} ({ms['rows']} rows): {ms['ours']:.2f} ms ({ms['ours forward']:.2f} forward), "
            f"torch {ms['torch']:.2f} ({ms['torch forward']:.2f}): {ms['torch'] / ms['ours']:.1f} times\n"
        )


if __name__ == "__main__":
    main()
