"""The kernels' benchmarks hand the comparison what it reads. Their figures are no test: nothing here is timed."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from couturier.kernels import llama_layer as compiled_layers
from couturier.kernels.causal_attention import native as compiled_attention

from . import attention_stats, causal_attention, hash_sampling, linear_attention, llama_layer


@pytest.mark.parametrize("benchmark", [linear_attention, hash_sampling, attention_stats, llama_layer, causal_attention])
def test_a_ratio_says_both_sides(benchmark: ModuleType) -> None:
    if benchmark is llama_layer and compiled_layers.library(llama_layer.HEAD) is None:
        pytest.skip("no C compiler (cc or gcc) here: the benchmark compares compiled layers with PyTorch's")
    if benchmark is causal_attention and compiled_attention.library(64) is None:
        pytest.skip("no C compiler (cc or gcc) here: the benchmark compares compiled attention with PyTorch's")
    threads = torch.get_num_threads()
    found = benchmark.ratio(rounds=1)
    assert found["ratio"] == pytest.approx(found["other"] / found["ours"])
    assert isinstance(found["unit"], str)
    assert torch.get_num_threads() == threads
