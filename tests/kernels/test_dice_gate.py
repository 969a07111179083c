"""Dice as data: the unit of DIN's paper in one function, against the reference with Dice as a callable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.target_attention import DiceGate, Pooling, mlp_attention, torch_gate, torch_impl

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
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: name + text)


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
