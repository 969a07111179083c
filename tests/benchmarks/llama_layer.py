"""The compiled layers beside the same work with PyTorch's calls: products, a batch of samples, passes of training.

    python tests/benchmarks/llama_layer.py --json

The demo's model: width 128, four layers, gate 384. *Products*: a packed weight against ``torch.mm`` on one thread, the
least of many, since so short a time is only ever disturbed upwards. *Sampling* and *training* (a pass and its gradient
of all weights, on one thread): median CPU time of the process over rounds that take turns; the training passes are
those of GRPO and of fine-tuning.
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
from transformers import LlamaConfig, LlamaModel  # noqa: E402

from couturier.components.generator.packed import packed_hidden  # noqa: E402
from couturier.components.runtime import global_seed  # noqa: E402
from couturier.kernels import dispatch, llama_layer  # noqa: E402
from couturier.kernels.timing import interleaved_ms, provenance  # noqa: E402
from tests.benchmarks.alignment_peers import sampling  # noqa: E402

HEAD, WIDTH, GATE = 32, 128, 384
# Users, samples a user, tokens a sample, prompt tokens.
TRAINING = {"training, GRPO": (8, 8, 15, 40), "training, fine-tuning": (48, 1, 15, 39)}
PRODUCTS = ((64, WIDTH, 3 * WIDTH), (64, WIDTH, WIDTH), (64, WIDTH, 2 * GATE), (64, GATE, WIDTH))


def with_pytorch(call: Callable[[], object]) -> Callable[[], object]:
    """The same call with nothing compiled."""

    def plain() -> object:
        with dispatch.use("torch"):
            return call()

    return plain


def least_us(call: Callable[[], object], rounds: int) -> float:
    """The least wall microseconds of a call."""
    least = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - began)
    return 1e6 * least


def products(rounds: int) -> dict[str, dict[str, float]]:
    """GFLOP/s of both sides for each product of a layer."""
    found = {}
    for rows, width, columns in PRODUCTS:
        x, weight = torch.randn(rows, width), torch.randn(width, columns)
        packed, out = llama_layer.packed(weight, head=HEAD), torch.empty(rows, columns)
        work = 2e-3 * rows * width * columns
        ours = least_us(partial(llama_layer.product, x, packed, out, head=HEAD), rounds)
        other = least_us(partial(torch.mm, x, weight, out=out), rounds)
        found[f"{rows} x {width} x {columns}"] = {"packed": work / ours, "torch.mm": work / other}
    return found


def trained(model: LlamaModel, users: int, samples: int, own: int, prompt: int) -> Callable[[], object]:
    """A pass and its gradient."""
    prompt_UPD, own_UnSD = torch.randn(users, prompt, WIDTH), torch.randn(users, samples, own, WIDTH)
    leaves = [weight for name, weight in model.named_parameters() if "embed" not in name]
    mask_UP, position_UP = torch.ones(users, prompt, dtype=torch.bool), torch.arange(prompt).expand(users, -1)

    def call() -> object:
        last_UD, rest_UnSD = packed_hidden(model, prompt_UPD, own_UnSD, mask_UP, position_UP)
        return torch.autograd.grad(last_UD.sum() + rest_UnSD.sum(), leaves)

    return call


def calls() -> dict[str, Callable[[], object]]:
    """Sampling 8 pictures for each of 8 people, and training, compiled and not."""
    generator, shown_UK, seeds = sampling.generator(0), sampling.histories(0), list(range(sampling.USERS))

    def draw(guidance: float) -> object:
        return generator.sample(shown_UK, sampling.SAMPLES, seeds=seeds, guidance=guidance)

    named: dict[str, Callable[[], object]] = {
        "sampling, guidance 5": partial(draw, 5.0),
        "sampling": partial(draw, 1.0),
    }
    config = LlamaConfig(
        vocab_size=8, hidden_size=WIDTH, intermediate_size=GATE, num_hidden_layers=4, num_attention_heads=WIDTH // HEAD
    )
    with global_seed(0, "benchmark"):
        model = LlamaModel(config)
    named |= {name: trained(model, *size) for name, size in TRAINING.items()}
    both = {f"ours {name}": call for name, call in named.items()}
    return both | {f"torch {name}": with_pytorch(call) for name, call in named.items()}


def ratio(rounds: int = 9) -> dict[str, Any]:
    """PyTorch over compiled for sampling under guidance: ``{ratio, ours, other, unit, …}``.

    Raises:
        RuntimeError: nothing can be compiled here.
    """
    if llama_layer.library(HEAD) is None:
        raise RuntimeError("no C compiler here (cc or gcc): there is nothing to compare.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = interleaved_ms(calls(), rounds=rounds)
        made = products(40 * rounds)
    finally:
        torch.set_num_threads(threads)
    names = [name.removeprefix("ours ") for name in times if name.startswith("ours ")]
    return {
        "ratio": times["torch sampling, guidance 5"] / times["ours sampling, guidance 5"],
        "ours": times["ours sampling, guidance 5"],
        "other": times["torch sampling, guidance 5"],
        "unit": "CPU ms",
        "ratios": {name: times[f"torch {name}"] / times[f"ours {name}"] for name in names},
        "times_ms": times,
        "gflops": made,
    }


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    found = ratio(given.rounds) | provenance()
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for name, times in found["ratios"].items():
        sys.stdout.write(f"{name}: {times:.2f} times\n")
    for shape, both in found["gflops"].items():
        sys.stdout.write(f"{shape}: {both['packed']:.0f} against {both['torch.mm']:.0f} GFLOP/s\n")


if __name__ == "__main__":
    main()
