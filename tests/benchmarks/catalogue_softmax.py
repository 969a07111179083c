"""The compiled cross-entropy over a catalogue beside PyTorch's calls, loss and all gradients.

    python tests/benchmarks/catalogue_softmax.py --json

Shapes: a batch of SASRec on ML-100K (128 people, about 5,400 places, 1,682 items, width 64), the demo's catalogue, and
ten thousand items. Median CPU time of the process over rounds that take turns, one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from couturier.kernels import dispatch  # noqa: E402
from couturier.kernels.catalogue_softmax import cross_entropy, native  # noqa: E402
from couturier.kernels.timing import interleaved_ms, provenance  # noqa: E402

WIDTH = 64
SHAPES = {"5400 x 1682": (5400, 1682), "5400 x 1110": (5400, 1110), "1000 x 10000": (1000, 10_000)}
HEADLINE = "5400 x 1682"


def calls(rows: int, items: int) -> dict[str, Callable[[], object]]:
    """Three ways to the same loss and gradients: compiled, in pieces, and PyTorch's own with all logits."""
    random = torch.Generator().manual_seed(0)
    states = (0.3 * torch.randn(rows, WIDTH, generator=random)).requires_grad_()
    vectors = (0.3 * torch.randn(items, WIDTH, generator=random)).requires_grad_()
    own = torch.randint(items, (rows,), generator=random)
    bias, share = torch.zeros(items), torch.ones(rows)

    def step(backend: dispatch.Wish) -> None:
        with dispatch.use(backend):
            own_K = (states * vectors.index_select(0, own)).sum(1)
            _backward(cross_entropy(states, own_K, vectors, bias, None, own, share), states, vectors)

    def whole() -> None:
        _backward(F.cross_entropy(states @ vectors.T, own, reduction="sum"), states, vectors)

    return {"compiled": partial(step, "auto"), "pieces": partial(step, "torch"), "all logits": whole}


def _backward(loss: Tensor, *of: Tensor) -> None:
    torch.autograd.grad(loss, of)


def ratio(rounds: int = 9) -> dict[str, Any]:
    """PyTorch's own cross-entropy over ours: ``{ratio, ours, other, unit, …}``.

    Raises:
        RuntimeError: nothing can be compiled here.
    """
    if native.library(WIDTH) is None:
        raise RuntimeError("no C compiler here (cc or gcc): there is nothing to compare.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = {name: interleaved_ms(calls(*shape), rounds=rounds) for name, shape in SHAPES.items()}
    finally:
        torch.set_num_threads(threads)
    gflops = {name: 6e-6 * r * s * WIDTH / times[name]["compiled"] for name, (r, s) in SHAPES.items()}
    return {
        "ratio": times[HEADLINE]["all logits"] / times[HEADLINE]["compiled"],
        "ours": times[HEADLINE]["compiled"],
        "other": times[HEADLINE]["all logits"],
        "unit": "CPU ms",
        "times_ms": times,
        "gflops": gflops,
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
    for shape, times in found["times_ms"].items():
        figures = ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items())
        sys.stdout.write(f"{shape}: {figures}; {found['gflops'][shape]:.0f} GFLOP/s\n")


if __name__ == "__main__":
    main()
