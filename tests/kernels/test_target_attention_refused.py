"""Target attention: what is refused, and which backend runs."""

from __future__ import annotations

import pytest
import torch

from couturier.kernels import dispatch
from couturier.kernels.checks import BackendError, KernelError, KernelTypeError
from couturier.kernels.target_attention import dot_attention, mlp_attention

from .jagged_cases import Lists


def refused(match: str, kind: type[KernelError] = KernelError, **changes: object) -> None:
    lists = Lists(lengths=(2, 3), dtype=torch.float32)
    q, k, _ = lists.tensors(1)
    call = {"queries": q, "keys": k, "offsets": lists.offsets, **changes}
    with pytest.raises(kind, match=match):
        dot_attention(**call)  # type: ignore[call-overload]


def test_wrong_layouts_name_the_axis() -> None:
    refused(r"queries \[R, H\]: axis H has size 4, but the call has H = 6", queries=torch.ones(2, 4))
    refused(r"R = 3, but offsets speak of U = 2 lists", queries=torch.ones(3, 6))
    refused(r"row_user has values from 0 to 2; wanted 0 to 1", row_user=torch.tensor([0, 2]))
    refused(r"row_user goes with queries \[R, H\]", queries=torch.ones(2, 1, 6), row_user=torch.tensor([0, 1]))
    refused(r"offsets ends at 4, but keys has 5 rows", offsets=torch.tensor([0, 2, 4]))
    refused(r"offsets falls from 6 to 5", offsets=torch.tensor([0, 6, 5]))
    refused(r"starts at 1", offsets=torch.tensor([1, 2, 5]))
    refused(r"values \[N, E\]: axis N has size 4", values=torch.ones(4, 2))
    refused(r"pair_bias \[P\]: axis P has size 4, but the call has P = 5", pair_bias=torch.ones(4))
    refused(r"offsets has dtype torch.int32", KernelTypeError, offsets=torch.tensor([0, 2, 5]).int())
    refused(
        r"keys has dtype torch.float64, but queries has torch.float32", KernelTypeError, keys=torch.ones(5, 6).double()
    )


def test_wrong_layers_are_named() -> None:
    lists = Lists(lengths=(2, 3), dtype=torch.float32)
    q, k, _ = lists.tensors(1)
    good = lists.layers(4, 3)
    for layers, match in (
        (good[:1], "layers has 1 entries"),
        (good[1:], r"layers\[0\].weight \[out, in\]: axis in has size 4, but the call has in = 24"),
        (good[:2], r"layers\[1\].weight \[out, in\]: axis out has size 3, but the call has out = 1"),
    ):
        with pytest.raises(KernelError, match=match):
            mlp_attention(q, k, lists.offsets, layers)
    with pytest.raises(KernelError, match="pooling is 'mean'"):
        mlp_attention(q, k, lists.offsets, good, pooling="mean")  # type: ignore[call-overload]
    with pytest.raises(KernelError, match="activations has 1 entries; wanted 2"):
        mlp_attention(q, k, lists.offsets, good, activations=[torch.sigmoid])


# Backends.


def test_a_backend_asked_for_by_name_runs_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, offsets = torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0, 3])
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(BackendError, match="triton is not installed|the tensors are on cpu"):
        dot_attention(q, k, offsets)
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(BackendError, match="COUTURIER_KERNELS is 'cuda'; wanted one of auto, reference, torch, triton"):
        dot_attention(q, k, offsets)
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.choose("target_attention", k) == "reference"
    with dispatch.use("torch"):
        assert dispatch.choose("target_attention", k) == "torch"
    monkeypatch.delenv(dispatch.VARIABLE)
    assert dispatch.choose("target_attention", k) == "torch"
