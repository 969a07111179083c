"""What a process settles once: threads, seeds, and what machine it runs on."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch


def seeded(seed: int, *names: str) -> torch.Generator:
    """A CPU generator for one purpose. Different names give unrelated streams of the same seed; no global state.

    Example:
        >>> a, b = seeded(0, "sft", "order"), seeded(0, "sft", "order")
        >>> bool((torch.rand(3, generator=a) == torch.rand(3, generator=b)).all())
        True
    """
    generator = torch.Generator()
    generator.manual_seed(derived_seed(seed, *names))
    return generator


def seeded_numpy(seed: int, *names: str) -> np.random.Generator:
    """As :func:`seeded`, for numpy."""
    return np.random.default_rng(derived_seed(seed, *names))


def derived_seed(seed: int, *names: str) -> int:
    """A 63-bit seed from a seed and names, the same on every machine."""
    text = "/".join((str(seed), *names)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


@contextmanager
def global_seed(seed: int, *names: str) -> Iterator[None]:
    """Seed torch's global generator for the construction of modules, and put it back afterwards."""
    before = torch.get_rng_state()
    torch.manual_seed(derived_seed(seed, *names))
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with that many torch threads. Tiny models are often fastest on one."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def keep_freed_memory() -> bool:
    """Let this process keep what tensors free, up to 2 GiB, instead of giving it back each time; whether it does.

    glibc hands blocks from 128 KiB to 32 MiB back to the kernel when they are freed, and every page of the next such
    tensor is a page fault again: up to a tenth of the time of sampling in a virtual machine. Only glibc has the
    knobs; other C libraries are left as they are, and so is a process whose environment sets them itself.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h's M_TRIM_THRESHOLD, M_MMAP_MAX
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(trim_threshold, (1 << 31) - 1) and mallopt(mmap_max, 0))


def device_facts() -> dict[str, Any]:
    """What a figure was measured on."""
    facts: dict[str, Any] = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
    if torch.cuda.is_available():
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return facts


@cache
def matmul_flops(device: str = "cpu") -> float:
    """Operations a second of a large matrix product here, the best of a few: what MFU is a share of.

    float32 on a CPU, with the threads torch has at the first call; bfloat16 on a GPU.
    """
    gpu = device == "cuda"
    size, dtype = (8192, torch.bfloat16) if gpu else (768, torch.float32)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
