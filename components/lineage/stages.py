"""A stage is a function of input folders and a config into an output folder; a manifest says which.

    manifest id = hash(stage name, input manifest ids, config, our source files it depends on, locked versions)

The artifact store keeps ``artifacts/<id>/``. A stage writes into a folder beside it, which is renamed into place when
the stage is whole: a stage is done or absent, never half done. The same id again means the same work: it is reused.
Long stages keep checkpoints in ``scratch/<id>/``; the folder outlives a kill and goes when the stage is done.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from couturier.components.errors import LineageError
from couturier.components.files import read_json, sha256_of_json, sync_folder, write_json
from couturier.components.lineage.sources import source_digests
from couturier.components.lineage.workspace import Workspace

MANIFEST = "manifest.json"
FACTS = "facts.json"
# A new release of one of these may change what a stage writes; of the others, not.
_LOCKED = ("torch", "transformers", "diffusers", "polars", "numpy", "great-expectations", "bentoml", "safetensors")


class Tracker(Protocol):
    """What a stage may say while it works. MLflow stands behind it in a flow, nothing in a unit test."""

    def params(self, values: Mapping[str, Any]) -> None: ...
    def metrics(self, values: Mapping[str, float], *, step: int) -> None: ...
    def picture(self, name: str, rgb_HWC: Any) -> None: ...
    def file(self, path: Path, folder: str = "") -> None: ...


class Progress(Protocol):
    """One line with rate and time left. ``advance`` is cheap enough for every step of a loop."""

    def start(self, description: str, total: int, *, done: int = 0, unit: str = "it") -> None: ...
    def advance(self, n: int = 1, *, note: str = "") -> None: ...
    def stop(self) -> None: ...


class Silent:
    """A tracker and a progress line that say nothing; what unit tests and library callers use."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Nothing is kept."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Nothing is kept."""

    def picture(self, name: str, rgb_HWC: Any) -> None:
        """Nothing is kept."""

    def file(self, path: Path, folder: str = "") -> None:
        """Nothing is kept."""

    def start(self, description: str, total: int, *, done: int = 0, unit: str = "it") -> None:
        """Nothing is shown."""

    def advance(self, n: int = 1, *, note: str = "") -> None:
        """Nothing is shown."""

    def stop(self) -> None:
        """Nothing is shown."""


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a stage function is given.

    ``inputs`` maps a name to a finished folder, ``out`` is the empty folder to fill, ``scratch`` keeps checkpoints
    across a kill. ``facts`` collects the few figures people ask of this stage (JSON values); they are saved as
    ``facts.json`` in the artifact and shown in summaries and MLflow.
    """

    inputs: Mapping[str, Path]
    config: Any
    out: Path
    scratch: Path
    workspace: Workspace
    tracker: Tracker = field(default_factory=Silent)
    progress: Progress = field(default_factory=Silent)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``run`` fills ``context.out``; ``config`` is a frozen dataclass; ``inputs`` maps a name to a manifest id.

    ``external`` holds what the stage reads that is no artifact (the md5 of ``data/``, say): it enters the id.
    """

    name: str
    run: Callable[[StageContext], None]
    config: Any
    inputs: Mapping[str, str] = field(default_factory=dict)
    external: Mapping[str, str] = field(default_factory=dict)

    def manifest(self) -> dict[str, Any]:
        """The record that is hashed into the id. Paths, times and hosts are not in it."""
        return {
            "stage": self.name,
            "inputs": dict(sorted(self.inputs.items())),
            "external": dict(sorted(self.external.items())),
            "config": dataclasses.asdict(self.config),
            "sources": dict(source_digests(self.run.__module__)),
            "versions": {name: _version(name) for name in _LOCKED},
        }

    @property
    def id(self) -> str:
        return f"{self.name}-{sha256_of_json(self.manifest())[:16]}"


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A finished stage: its folder, what it cost, and whether this run had to make it."""

    id: str
    path: Path
    reused: bool
    seconds: float
    facts: dict[str, Any]


class ArtifactStore:
    """Finished stages under ``workspace.artifacts``, by manifest id."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def has(self, artifact_id: str) -> bool:
        return (self._folder(artifact_id) / MANIFEST).exists()

    def open(self, artifact_id: str) -> Artifact:
        """The finished stage of that id.

        Raises:
            LineageError: no such artifact.
        """
        folder = self._folder(artifact_id)
        if not self.has(artifact_id):
            raise LineageError(
                f"artifact {artifact_id!r} is not in {self.workspace.artifacts}. "
                "Run `couturier retrain` to make it again."
            )
        return Artifact(id=artifact_id, path=folder, reused=True, seconds=0.0, facts=read_json(folder / FACTS))

    def manifest(self, artifact_id: str) -> dict[str, Any]:
        """The manifest of a finished stage, with when it was made and what it cost.

        Raises:
            LineageError: no such artifact.
        """
        return read_json(self.open(artifact_id).path / MANIFEST)

    def materialise(
        self, stage: Stage, *, tracker: Tracker | None = None, progress: Progress | None = None
    ) -> Artifact:
        """Return the finished stage, running it only if it is not there yet."""
        artifact_id = stage.id
        if self.has(artifact_id):
            return self.open(artifact_id)
        final = self._folder(artifact_id)
        half = final.with_name(f".{artifact_id}.half")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        scratch = self.workspace.scratch / artifact_id
        scratch.mkdir(parents=True, exist_ok=True)
        context = StageContext(
            inputs={name: self.open(key).path for name, key in stage.inputs.items()},
            config=stage.config,
            out=half,
            scratch=scratch,
            workspace=self.workspace,
            tracker=tracker or Silent(),
            progress=progress or Silent(),
        )
        began, worked = time.perf_counter(), processor_seconds()
        try:
            stage.run(context)
        finally:
            context.progress.stop()
        seconds, worked = time.perf_counter() - began, processor_seconds() - worked
        write_json(half / FACTS, context.facts)
        made = {
            "id": artifact_id,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "processor_s": round(worked, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        write_json(half / MANIFEST, {**stage.manifest(), **made})
        sync_folder(half)
        if final.exists():  # a folder without a manifest: left by a copy that was cut short
            shutil.rmtree(final)
        half.rename(final)
        sync_folder(final.parent)
        shutil.rmtree(scratch, ignore_errors=True)
        return Artifact(id=artifact_id, path=final, reused=False, seconds=seconds, facts=context.facts)

    def ancestry(self, artifact_id: str) -> dict[str, dict[str, Any]]:
        """Manifests of an artifact and of everything it was made from, by id."""
        found: dict[str, dict[str, Any]] = {}
        waiting = [artifact_id]
        while waiting:
            key = waiting.pop()
            if key not in found:
                found[key] = self.manifest(key)
                waiting.extend(found[key]["inputs"].values())
        return found

    def _folder(self, artifact_id: str) -> Path:
        if not artifact_id.replace("-", "").replace("_", "").isalnum():
            raise LineageError(f"{artifact_id!r} is no artifact id: letters, digits, '-' and '_' only.")
        return self.workspace.artifacts / artifact_id


def processor_seconds() -> float:
    """What this process and its ended children have had of all cores, in seconds: the compute of a stage, where the
    clock also counts what else the machine was doing. A resumed stage counts from where it resumed."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def peak_rss_bytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "absent"
