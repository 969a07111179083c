"""The verify command: every operator is in it, a wrong result fails it, and its table says what ran."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from couturier.kernels import dispatch, verify
from couturier.kernels.verify_cases import Case, Maker, cases

EXACT = Maker(device="cpu", dtype=torch.float64, rounded=torch.float32, large=False)
SMALL = dataclasses.replace(EXACT, dtype=torch.float32)


def test_every_operator_passes_here() -> None:
    found = verify.check("cpu", torch.float32)
    assert {one["op"].split(" ")[0] for one in found} == {*dispatch.OPS, "causal_attention", "shared_prefix"}
    assert all(one["passed"] and one["repeats"] for one in found)


@pytest.mark.parametrize("case", cases(SMALL), ids=lambda case: case.op)
def test_the_naive_form_and_the_peers_compute_the_same(case: Case) -> None:
    # Softmax attention stands beside linear attention for its time, not for its numbers.
    others = {name: call for name, call in case.peers.items() if "softmax" not in name}
    for call in (case.naive, *others.values()):
        assert verify.error(call(), case.call()) < 1e-5


@pytest.mark.parametrize("wrong", [lambda x: x * (1 + 1e-4), lambda x: x * torch.nan, lambda x: x + torch.rand(())])
def test_a_wrong_result_fails(wrong) -> None:
    case, exact = cases(SMALL)[-1], cases(EXACT)[-1]

    def call() -> Tensor:
        out: Tensor = wrong(case.call())
        return out

    assert verify.check_case(case, exact, torch.float32)["passed"]
    assert not verify.check_case(dataclasses.replace(case, call=call), exact, torch.float32)["passed"]


def test_a_wrong_gradient_fails() -> None:
    case, exact = cases(SMALL)[-1], cases(EXACT)[-1]

    def call() -> Tensor:
        out = case.call()
        return out.detach() + 1.01 * (out - out.detach())

    found = verify.check_case(dataclasses.replace(case, call=call), exact, torch.float32)
    assert found["error_forward"] < 1e-5 < found["error_gradients"]
    assert not found["passed"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.md"
    status = verify.main(["--op", "shared_prefix", "--op", "linear", "--rounds", "1", "--json", "--out", str(out)])
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert status == 0
    assert out.read_text(encoding="utf-8") in printed
    assert ("No GPU here" in printed) == (not torch.cuda.is_available())
    assert {one["op"] for one in found["timings"]} == {"linear_attention", "shared_prefix"}
    assert all(one["fraction_of_floor"] > 0 for one in found["timings"])


def test_an_operator_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        verify.main(["--op", "flash"])
    assert exit_.value.code == 2
    assert "no operator is called flash" in capsys.readouterr().err
