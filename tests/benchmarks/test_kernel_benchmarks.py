"""The kernels' benchmarks hand the comparison what it reads. Their figures are no test: nothing here is timed."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from couturier.kernels import compiled

from . import attention_stats, catalogue_softmax, hash_sampling, linear_attention, llama_layer

COMPILED = {catalogue_softmax: "catalogue_softmax/softmax.c", llama_layer: "llama_layer/layer.c"}


@pytest.mark.parametrize("benchmark", [linear_attention, hash_sampling, attention_stats, *COMPILED])
def test_a_ratio_says_both_sides(benchmark: ModuleType) -> None:
    if benchmark in COMPILED and compiled.library(COMPILED[benchmark], W=32) is None:
        pytest.skip("no C compiler (cc or gcc) here: the benchmark compares what is compiled with PyTorch's calls")
    threads = torch.get_num_threads()
    found = benchmark.ratio(rounds=1)
    assert found["ratio"] == pytest.approx(found["other"] / found["ours"])
    assert isinstance(found["unit"], str)
    assert torch.get_num_threads() == threads
