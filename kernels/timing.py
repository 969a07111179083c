"""Times that can be compared on a machine that is busy with other things: rounds that take turns, and medians.

On a CPU it is the process's own CPU time that counts, with one thread; on a GPU the time between two events on the
stream. One run's milliseconds mean little elsewhere; ratios inside one run do.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor


def interleaved_ms(calls: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of the process for each call, after one warm-up of each. Rounds take turns, so that a
    slow minute of the machine falls on all alike.

    Args:
        calls: name -> what to time.
        rounds: how often each is called.

    Example:
        >>> sorted(interleaved_ms({"list": lambda: [0] * 10, "tuple": lambda: (0,) * 10}, rounds=3))
        ['list', 'tuple']
    """
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if turn:
                seen[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(times) for name, times in seen.items()}


def cuda_ms(call: Callable[[], object], *, rounds: int = 30) -> float:
    """Median milliseconds of a call on the GPU, after five warm-ups, with the L2 cache written over in between."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        call()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for begin, end in pairs:
        flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def forward_backward(call: Callable[[], Tensor], leaves: Iterable[Tensor]) -> Callable[[], None]:
    """A call that runs forward and backward and leaves no gradient behind."""
    kept = list(leaves)

    def both() -> None:
        out = call()
        torch.autograd.grad(out, kept, torch.ones_like(out))

    return both


def provenance() -> dict[str, str]:
    """Where a figure comes from: date (UTC), commit of the source tree, machine, torch."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    cores = f"{os.cpu_count()} {platform.machine().replace('_', '-')} cores"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": done.stdout.strip() or "unknown",
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cores,
        "torch": torch.__version__,
    }
