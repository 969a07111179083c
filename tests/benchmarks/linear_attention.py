"""linear_attention beside what people write for it: the masked square, and softmax attention of the same size.

    OMP_NUM_THREADS=1 python tests/benchmarks/linear_attention.py --json

Forward and backward, float32, one thread, batch x length constant; medians of the process's CPU time over rounds that
take turns. The ratios are the result, not the milliseconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from couturier.kernels.linear_attention import linear_attention, slopes_tnl
from couturier.kernels.linear_attention.reference import quadratic
from couturier.kernels.timing import forward_backward, interleaved_ms, provenance

HEADS, WIDTH, TOKENS = 4, 32, 8192
LENGTHS = (256, 1024, 4096)
SEED = 0


def leaves(length: int) -> list[Tensor]:
    """q, k and v ``[B, T, H, D]``, normal, with ``B T = 8192``."""
    g = torch.Generator().manual_seed(SEED)
    shape = (TOKENS // length, length, HEADS, WIDTH)
    return [torch.randn(shape, generator=g).requires_grad_() for _ in "qkv"]


def calls(length: int, *, others: bool = True) -> dict[str, Any]:
    """What is timed at one length."""
    slopes, (q, k, v) = slopes_tnl(HEADS), leaves(length)
    found = {f"ours {length}": lambda: linear_attention(q, k, v, slopes)[0]}
    if others:
        found[f"square {length}"] = lambda: quadratic(q, k, v, slopes)
        found[f"softmax {length}"] = lambda: scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
    return {name: forward_backward(call, (q, k, v)) for name, call in found.items()}


def ratio(rounds: int = 7) -> dict[str, Any]:
    """Masked square over ours at length 1024, forward and backward: ``{ratio, ours, other, unit}``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ms = interleaved_ms(calls(1024), rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    ours, other = ms["ours 1024"], ms["square 1024"]
    return {"ratio": other / ours, "ours": ours, "other": other, "unit": "ms forward and backward, L = 1024"}


def measure(rounds: int) -> dict[str, Any]:
    """All lengths: milliseconds, ratios to the square and to softmax attention, and how flat time a token is."""
    torch.set_num_threads(1)
    ours = {name: call for length in LENGTHS for name, call in calls(length, others=False).items()}
    ms = interleaved_ms(ours, rounds=2 * rounds)
    flat = max(ms.values()) / min(ms.values())
    for length in LENGTHS[:2]:
        ms |= interleaved_ms(calls(length), rounds=rounds)
    # The square of 4096 takes seconds and gigabytes: twice is enough.
    ms |= interleaved_ms(calls(LENGTHS[2]), rounds=2)
    return {
        "linear_attention_vs_naive": ms["square 1024"] / ms["ours 1024"],
        "slowest_over_fastest_token_256_to_4096": flat,
        "ms": ms,
        "vs_square": {length: ms[f"square {length}"] / ms[f"ours {length}"] for length in LENGTHS},
        "vs_softmax": {length: ms[f"softmax {length}"] / ms[f"ours {length}"] for length in LENGTHS},
        "shape": f"B T = {TOKENS}, H = {HEADS}, D = {WIDTH}, float32, one thread",
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
    for length in LENGTHS:
        sys.stdout.write(
            f"L = {length:5}: ours {found['ms'][f'ours {length}']:7.1f} ms, the square takes "
            f"{found['vs_square'][length]:5.1f} times as long, softmax attention {found['vs_softmax'][length]:4.1f}\n"
        )
    sys.stdout.write(
        f"time a token, 256 to 4096, slowest over fastest: {found['slowest_over_fastest_token_256_to_4096']:.2f}\n"
    )
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
