"""What a process settles once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from couturier.components.runtime import keep_freed_memory

_FAULTS = """
import resource, torch
from couturier.components.runtime import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.empty(1 << 24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
before, kept = faults(), keep_freed_memory()
for _ in range(8):
    faults()
print(before, faults(), kept)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other allocators")
def test_memory_that_tensors_free_is_not_given_back_and_faulted_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    before, after, kept = done.stdout.split()
    if kept == "True":
        assert int(after) < 100
        assert int(before) > 10 * int(after)
    else:
        assert not keep_freed_memory()


def test_who_sets_the_allocator_by_hand_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1048576")
    keep_freed_memory.cache_clear()
    assert keep_freed_memory() is False
    keep_freed_memory.cache_clear()
