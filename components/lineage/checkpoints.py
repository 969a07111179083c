"""Checkpoints inside a training loop: tensors in safetensors, the rest in JSON, no pickle.

A checkpoint is a folder ``step-00001200/`` written beside, synced and renamed. ``newest`` takes the latest whole one
and skips a torn one with a warning, so a run killed at any instant goes on from its last good step to the same bits.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from couturier.components.files import read_json, sha256_of_file, sync_file, sync_folder, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything a loop needs to go on: named tensors and JSON facts."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training loop in one folder.

    Args:
        folder: where they lie; made when the first is saved.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        final = self.folder / f"step-{step:08d}"
        half = final.with_name(f".{final.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        state = half / "state.safetensors"
        save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, state)
        sync_file(state)
        write_json(half / "state.json", {"step": step, "facts": dict(facts), "sha256": sha256_of_file(state)})
        shutil.rmtree(final, ignore_errors=True)
        half.rename(final)
        sync_folder(self.folder)
        for old in self._folders()[: -self.keep]:
            shutil.rmtree(old)

    def newest(self) -> Checkpoint | None:
        """The latest whole checkpoint, or None when there is none."""
        for folder in reversed(self._folders()):
            try:
                facts = read_json(folder / "state.json")
                state = folder / "state.safetensors"
                if sha256_of_file(state) == facts["sha256"]:
                    return Checkpoint(step=facts["step"], tensors=load_file(state), facts=facts["facts"])
                log.warning("checkpoint %s is torn (its digest differs): skipped", folder.name)
            except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:
                log.warning("checkpoint %s cannot be read (%s): skipped", folder.name, error)
        return None

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's state under ``prefix.``; tensors that share memory are saved once each, as copies."""
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def load_module(prefix: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    dot = f"{prefix}."
    module.load_state_dict({k.removeprefix(dot): v for k, v in tensors.items() if k.startswith(dot)})


def optimiser_tensors(prefix: str, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as ``(tensors, JSON facts)``."""
    state = optimiser.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            key = f"{prefix}.{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                scalars[key] = value
    return tensors, {"groups": state["param_groups"], "scalars": scalars}


def load_optimiser(
    prefix: str, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    dot = f"{prefix}."
    for key, value in [*tensors.items(), *facts["scalars"].items()]:
        if key.startswith(dot):
            index, name = key.removeprefix(dot).split(".", 1)
            state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": facts["groups"]})


def generator_tensor(generator: torch.Generator) -> Tensor:
    """A random generator's state, a uint8 tensor; ``generator.set_state`` takes it back."""
    return generator.get_state().clone()
