"""Weights are read as data: what torch saved comes back, and nothing that a file says is ever run."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from couturier.components.errors import CouturierError
from couturier.components.evaluation.torch_archive import UnsafeArchiveError, read_state_dict


def _legacy(path: Path, value: object) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 2))


def test_what_torch_saved_comes_back_to_the_bit(tmp_path: Path, network: nn.Module) -> None:
    saved = network.state_dict()
    found = read_state_dict(_legacy(tmp_path / "network.pth", saved))
    assert list(found) == list(saved)
    for name, value in saved.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value), name


def test_views_of_a_shared_storage_keep_their_shape_and_place(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    state = OrderedDict(whole=whole, turned=whole.T, row=whole[2], part=whole[1:3, ::2])
    found = read_state_dict(_legacy(tmp_path / "views.pth", state))
    for name, value in state.items():
        assert torch.equal(found[name], value), name
    found["whole"][2, 0] = -1  # each has memory of its own
    assert found["row"][0] == 12


def test_a_file_that_names_a_function_is_refused_and_nothing_is_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(witness),)

    with pytest.raises(UnsafeArchiveError, match="Nothing of it was run"):
        read_state_dict(_legacy(tmp_path / "hostile.pth", {"weight": Hostile()}))
    assert not witness.exists()


@pytest.mark.parametrize(
    "value",
    [{"weight": 3}, {"weight": torch.ones(2), "epoch": 7}, [torch.ones(2)], "words", {"half": torch.ones(2).half()}],
)
def test_anything_but_plain_tensors_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(UnsafeArchiveError):
        read_state_dict(_legacy(tmp_path / "other.pth", value))


def test_another_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "zip.pth"
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(UnsafeArchiveError, match="safetensors"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps([1, 2, 3], protocol=2) * 5)
    with pytest.raises(UnsafeArchiveError, match="safetensors"):
        read_state_dict(path)


def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path: Path) -> None:
    path = _legacy(tmp_path / "reach.pth", {"weight": torch.zeros(3)})
    raw = path.read_bytes()
    # The shape is the only place where the pickle says (3,): BININT1 3, TUPLE1.
    assert raw.count(b"K\x03\x85") == 1
    path.write_bytes(raw.replace(b"K\x03\x85", b"K\x7f\x85"))
    with pytest.raises(UnsafeArchiveError, match="outside"):
        read_state_dict(path)


@pytest.fixture(scope="module")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _legacy(tmp_path_factory.mktemp("archive") / "small.pth", OrderedDict(a=torch.ones(3), b=torch.arange(4)))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_an_error_in_words_or_harmless(small_archive: Path, data: st.DataObject) -> None:
    raw = bytearray(small_archive.read_bytes())
    end = data.draw(st.integers(0, len(raw)))
    if data.draw(st.booleans()):
        del raw[end:]
    for place, value in data.draw(
        st.dictionaries(st.integers(0, max(0, len(raw) - 1)), st.integers(0, 255), max_size=3)
    ).items():
        if place < len(raw):
            raw[place] = value
    path = small_archive.with_name("damaged.pth")
    path.write_bytes(raw)
    try:
        found = read_state_dict(path)
    except CouturierError:
        return
    assert all(isinstance(value, torch.Tensor) for value in found.values())
