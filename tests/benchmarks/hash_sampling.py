"""hash_sampling beside exact target attention: scoring 100 candidates against ever longer histories.

    OMP_NUM_THREADS=1 python tests/benchmarks/hash_sampling.py --json

float32, one thread; medians of the process's CPU time over rounds that take turns. Exact attention is the dot scorer
(softmax of q . k over the history), the cheapest there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from couturier.kernels.hash_sampling import append, bucket_table, hash_sampling, lookup, random_planes
from couturier.kernels.timing import forward_backward, interleaved_ms, provenance

USERS, CANDIDATES, WIDTH = 4, 100, 64
LENGTHS = (100, 1_000, 10_000)
SEED = 0
# A look-up is short: several a round.
REPEAT = 50


def calls(length: int) -> dict[str, Callable[[], object]]:
    """What is timed for histories of one length."""
    g = torch.Generator().manual_seed(SEED)
    x = torch.randn(USERS * length, WIDTH, generator=g)
    offsets = torch.arange(USERS + 1) * length
    candidates, planes = torch.randn(USERS, CANDIDATES, WIDTH, generator=g), random_planes(WIDTH, seed=SEED)
    table, keys = bucket_table(x, offsets, planes), x.view(USERS, length, WIDTH)
    newest, one_each = torch.randn(USERS, WIDTH, generator=g), torch.arange(USERS + 1)

    def exact() -> object:
        return torch.softmax(candidates @ keys.transpose(1, 2) * WIDTH**-0.5, -1) @ keys

    return {
        f"look-up {length}": lambda: [lookup(table, candidates, planes) for _ in range(REPEAT)],
        f"append {length}": lambda: [append(table, newest, one_each, planes) for _ in range(REPEAT)],
        f"exact {length}": exact,
        f"table {length}": lambda: bucket_table(x, offsets, planes),
    }


def ratio(rounds: int = 9) -> dict[str, Any]:
    """Exact attention over the table look-up at 1,000 behaviours, 100 candidates: ``{ratio, ours, other, unit}``, and
    ``flat``: the slowest look-up over the fastest from 100 to 10,000 behaviours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        every: dict[str, Callable[[], object]] = {}
        for length in LENGTHS:
            every |= calls(length)
        ms: dict[str, float] = {}
        # What is compared takes turns; the big ones apart, since they leave nothing of the others in the cache.
        for word in ("look-up", "append", "exact", "table"):
            some = {name: call for name, call in every.items() if name.startswith(word)}
            ms |= interleaved_ms(some, rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    for name in ms:
        if name.split()[0] in ("look-up", "append"):
            ms[name] /= REPEAT
    look_ups = [ms[f"look-up {length}"] for length in LENGTHS]
    return {
        "ratio": ms["exact 1000"] / ms["look-up 1000"],
        "ours": ms["look-up 1000"],
        "other": ms["exact 1000"],
        "unit": f"ms for {USERS} users x {CANDIDATES} candidates, 1,000 behaviours each",
        "flat": max(look_ups) / min(look_ups),
        "vs_exact": {length: ms[f"exact {length}"] / ms[f"look-up {length}"] for length in LENGTHS},
        "ms": ms,
    }


def training(rounds: int) -> dict[str, float]:
    """Milliseconds forward and backward for one candidate a user: direct, and by the table."""
    g = torch.Generator().manual_seed(SEED)
    lengths = torch.randint(0, 200, (128,), generator=g)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    x = torch.randn(int(lengths.sum()), WIDTH, generator=g).requires_grad_()
    candidates, planes = torch.randn(128, WIDTH, generator=g), random_planes(WIDTH, seed=SEED)
    return interleaved_ms(
        {
            "direct": forward_backward(lambda: hash_sampling(candidates, x, offsets, planes), [x]),
            "by the table": forward_backward(lambda: lookup(bucket_table(x, offsets, planes), candidates, planes), [x]),
        },
        rounds=rounds,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = ratio(args.rounds)
    ms = found["ms"]
    for length in LENGTHS:
        sys.stdout.write(
            f"{length:6} behaviours: look-up {ms[f'look-up {length}']:.2f} ms, exact attention "
            f"{ms[f'exact {length}']:.2f} ms ({found['vs_exact'][length]:.1f} times), appending one "
            f"{ms[f'append {length}']:.2f} ms, table {ms[f'table {length}']:.2f} ms\n"
        )
    sys.stdout.write(f"look-up, slowest over fastest: {found['flat']:.2f}\n")
    found["training_ms"] = training(args.rounds)
    sys.stdout.write(f"training, 128 users, one candidate each: {found['training_ms']}\n")
    if args.json:
        found |= {"seed": SEED, "rounds": args.rounds, **provenance()}
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
