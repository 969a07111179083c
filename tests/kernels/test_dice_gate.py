"""Dice as data: the unit of DIN's paper in one function, against the reference with Dice as a callable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from couturier.kernels import compiled, dispatch
from couturier.kernels.target_attention import DiceGate, Pooling, mlp_attention, native, torch_gate, torch_impl

from .jagged_cases import Lists, error, shuffled_rows

LENGTHS = (5, 9, 0, 30, 31, 1, 12, 31)


def gate_of(lists: Lists, training: bool) -> DiceGate:
    mean_F, var_F = lists.normal(6).detach() / 4, lists.normal(6).detach().square() + 0.5
    return DiceGate(alpha_F=lists.normal(6), mean_F=mean_F, var_F=var_F, training=training)


def results(backend: dispatch.Backend, dense: bool, pooling: Pooling, training: bool, own: bool) -> dict[str, Tensor]:
    """Everything that comes out of one call and of its backward."""
    rows = None if dense else shuffled_rows(len(LENGTHS), 21)
    lists = Lists(lengths=LENGTHS, row_user=rows, width=4)
    keys, layers, gate = lists.normal(sum(LENGTHS), 4), lists.layers(6), gate_of(lists, training)
    queries = lists.normal(len(LENGTHS), 3, 4) if dense else lists.normal(21, 4)
    values = lists.normal(sum(LENGTHS), 3) if own else keys
    leaves = {"queries": queries, "keys": keys, "alpha": gate.alpha_F} | ({"values": values} if own else {})
    leaves |= {f"layer {place}": one for place, one in enumerate(one for two in layers for one in two)}
    with dispatch.use(backend):
        pooled, weights = mlp_attention(
            queries,
            keys,
            lists.offsets,
            layers,
            row_user=rows,
            values=values,
            activations=[gate],
            pooling=pooling,
            return_weights=True,
        )
    whole = (pooled * lists.normal(*pooled.shape)).sum() + (weights * lists.normal(len(weights))).sum()
    grads = torch.autograd.grad(whole, list(leaves.values()))
    told = {"pooled": pooled, "weights": weights, "mean": gate.mean_F, "var": gate.var_F}
    return told | {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("block", [1 << 18, 300], ids=["one block", "many blocks"])
@pytest.mark.parametrize("training", [True, False], ids=["own statistics", "running statistics"])
@pytest.mark.parametrize("pooling", ["din_code", "din_paper"])
@pytest.mark.parametrize("dense", [True, False], ids=["as many rows for everyone", "rows in any order"])
def test_the_unit_in_one_function_and_all_its_gradients(
    monkeypatch: pytest.MonkeyPatch, dense: bool, pooling: Pooling, training: bool, block: int
) -> None:
    monkeypatch.setattr(torch_impl, "_folds", lambda *sizes: True)
    monkeypatch.setattr(torch_gate, "_BLOCK", block)
    monkeypatch.setattr(torch_gate, "_SPARE", block)
    found, wanted = (results(backend, dense, pooling, training, own=not dense) for backend in ("torch", "reference"))
    for name, value in wanted.items():  # some are 0 but for rounding: a softmax does not feel the scores' bias
        assert torch.allclose(found[name], value, rtol=1e-11, atol=1e-11), name


def test_scoring_goes_block_by_block_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "_folds", lambda *sizes: True)
    monkeypatch.setattr(torch_gate, "_BLOCK", 300)
    lists = Lists(lengths=LENGTHS, width=4)
    queries, keys, layers = lists.normal(len(LENGTHS), 3, 4), lists.normal(sum(LENGTHS), 4), lists.layers(6)
    gate = gate_of(lists, training=False)
    with torch.no_grad():
        found = mlp_attention(queries, keys, lists.offsets, layers, activations=[gate])
        wanted = mlp_attention(queries, keys, lists.offsets, layers, activations=[lambda x_PF: gate(x_PF)])
    assert error(found, wanted) < 1e-12


def test_nothing_to_attend_to() -> None:
    lists = Lists(lengths=(0, 0), width=4)
    queries, layers = lists.normal(2, 3, 4), lists.layers(6)
    gate = gate_of(lists, training=True)
    pooled = mlp_attention(queries, lists.normal(0, 4), lists.offsets, layers, activations=[gate])
    assert not pooled.any()
    assert not torch.autograd.grad(pooled.sum(), queries)[0].any()


def test_one_row_is_judged_by_what_was_seen_before() -> None:
    lists = Lists(lengths=(1,), width=4)
    gate = gate_of(lists, training=True)
    before = gate.mean_F.clone()
    assert bool(gate(lists.normal(1, 6)).isfinite().all())
    assert torch.equal(gate.mean_F, before)


def step(backend: dispatch.Wish, dtype: torch.dtype) -> list[Tensor]:
    """What a training step of the paper's unit gives, its gradients and the statistics it leaves."""
    lists = Lists(lengths=LENGTHS, width=16, dtype=dtype)
    queries, keys, layers = lists.normal(len(LENGTHS), 3, 16), lists.normal(sum(LENGTHS), 16), lists.layers(32)
    mean_F, var_F = torch.zeros(32, dtype=dtype), torch.ones(32, dtype=dtype)
    gate = DiceGate(alpha_F=lists.normal(32), mean_F=mean_F, var_F=var_F, training=True)
    with dispatch.use(backend):
        pooled = mlp_attention(queries, keys, lists.offsets, layers, activations=[gate], pooling="din_paper")
    leaves = [queries, keys, gate.alpha_F, *(one for two in layers for one in two)]
    grads = torch.autograd.grad((pooled * lists.normal(*pooled.shape)).sum(), leaves)
    return [pooled, mean_F, var_F, *grads]


@pytest.mark.skipif(native.library(32, 16) is None, reason="no C compiler")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_compiled_unit_and_all_its_gradients(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch_impl, "_folds", lambda *sizes: True)
    monkeypatch.setattr(native, "_LEAST", 0)
    wanted = step("reference", torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        found, again, torch_s = step("auto", torch.float32), step("auto", torch.float32), step("torch", torch.float32)
    finally:
        torch.set_num_threads(before)
    assert max(error(one, two) for one, two in zip(found, wanted, strict=True)) < 1e-5
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(found, torch_s, strict=True)), "it was not compiled"


def test_without_a_compiler_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "_folds", lambda *sizes: True)
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(compiled, "library", compiled.library.__wrapped__)
    monkeypatch.setattr(native, "_LEAST", 0)
    found, wanted = step("auto", torch.float32), step("torch", torch.float32)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
