"""The kernels' benchmarks hand the comparison what it reads. Their figures are no test: nothing here is timed."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from couturier.kernels import compiled

from . import attention_stats, catalogue_softmax, causal_attention, hash_sampling, linear_attention, llama_layer

COMPILED = {catalogue_softmax, causal_attention, llama_layer}


@pytest.mark.parametrize(
    "benchmark", [linear_attention, hash_sampling, attention_stats, catalogue_softmax, causal_attention, llama_layer]
)
def test_a_ratio_says_both_sides(benchmark: ModuleType) -> None:
    if benchmark in COMPILED and compiled.library("llama_layer/layer.c", W=32) is None:
        pytest.skip("no C compiler (cc or gcc) here: the benchmark compares what is compiled with PyTorch's calls")
    threads = torch.get_num_threads()
    found = benchmark.ratio(rounds=1)
    assert found["ratio"] == pytest.approx(found["other"] / found["ours"])
    assert isinstance(found["unit"], str)
    assert torch.get_num_threads() == threads
