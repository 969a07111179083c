"""A stage is done or absent; its id names all it depends on; a killed one leaves its checkpoints and nothing else."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from couturier.components.errors import LineageError
from couturier.components.lineage import sources
from couturier.components.lineage.stages import ArtifactStore, Stage, StageContext
from couturier.components.lineage.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Config:
    word: str = "hello"
    fail: bool = False


CALLS: list[str] = []


def write(ctx: StageContext) -> None:
    CALLS.append(ctx.config.word)
    (ctx.scratch / "checkpoint").write_text("kept")
    (ctx.out / "word.txt").write_text(ctx.config.word)
    if ctx.config.fail:
        raise OSError("no space left on device")
    ctx.facts["length"] = len(ctx.config.word)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    CALLS.clear()
    return ArtifactStore(Workspace(project=tmp_path, root=tmp_path / ".couturier"))


def stage(inputs: dict[str, str] | None = None, **config: object) -> Stage:
    return Stage(name="write", run=write, config=Config(**config), inputs=inputs or {})  # type: ignore[arg-type]


def test_a_finished_stage_is_reused(store: ArtifactStore) -> None:
    first, second = store.materialise(stage()), store.materialise(stage())
    assert (first.reused, second.reused) == (False, True)
    assert CALLS == ["hello"]
    assert first.id == second.id and second.facts == {"length": 5}
    assert not (store.workspace.scratch / first.id).exists()


def test_a_failed_stage_is_absent_and_keeps_its_checkpoints(store: ArtifactStore) -> None:
    broken = stage(fail=True)
    with pytest.raises(OSError, match="no space"):
        store.materialise(broken)
    assert not store.has(broken.id)
    assert (store.workspace.scratch / broken.id / "checkpoint").read_text() == "kept"
    with pytest.raises(LineageError, match="couturier retrain"):
        store.open(broken.id)


def test_a_folder_without_a_manifest_is_made_again(store: ArtifactStore) -> None:
    one = stage()
    torn = store.workspace.artifacts / one.id
    torn.mkdir(parents=True)
    (torn / "word.txt").write_text("torn")
    assert store.materialise(one).path.joinpath("word.txt").read_text() == "hello"


def test_the_id_changes_with_config_inputs_external_facts_and_sources(
    monkeypatch: pytest.MonkeyPatch, store: ArtifactStore
) -> None:
    ids = {
        stage().id,
        stage(word="other").id,
        stage({"a": "x-1"}).id,
        stage({"a": "x-2"}).id,
        Stage(name="write", run=write, config=Config(), external={"data": "md5"}).id,
    }
    monkeypatch.setattr(
        "couturier.components.lineage.stages.source_digests", lambda module: (("couturier.fake", "0" * 64),)
    )
    ids.add(stage().id)
    assert len(ids) == 6


def test_ancestry_reaches_every_input(store: ArtifactStore) -> None:
    a = store.materialise(stage(word="a"))
    b = store.materialise(stage({"first": a.id}, word="b"))
    c = store.materialise(stage({"second": b.id}, word="c"))
    assert set(store.ancestry(c.id)) == {a.id, b.id, c.id}
    manifest = store.manifest(c.id)
    assert manifest["config"] == {"word": "c", "fail": False} and manifest["peak_rss_bytes"] > 0


def work(ctx: StageContext) -> None:
    began = time.process_time()
    while time.process_time() - began < 0.2:
        pass


def sleep(ctx: StageContext) -> None:
    time.sleep(0.2)


def test_waiting_is_no_compute(store: ArtifactStore) -> None:
    working, sleeping = (
        store.manifest(store.materialise(Stage(name="cost", run=run, config=Config(word=run.__name__))).id)
        for run in (work, sleep)
    )
    assert working["processor_s"] >= 0.19 and working["seconds"] >= 0.19
    assert sleeping["processor_s"] < 0.1 and sleeping["seconds"] >= 0.19


@pytest.mark.parametrize("bad", ["../etc", "a/b", "", "a b", "x\x00"])
def test_ids_are_no_paths(store: ArtifactStore, bad: str) -> None:
    with pytest.raises(LineageError):
        store.open(bad)


def test_sources_follow_imports_but_not_into_bookkeeping() -> None:
    names = {name for name, _ in sources.source_digests("couturier.components.alignment.sft")}
    assert "couturier.kernels.shared_prefix" in names  # through the sampler
    assert "couturier.components.data.formats" in names
    assert not any(name.startswith("couturier.components.lineage") for name in names)


def test_the_workspace_is_found_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.dvc").write_text("outs: []")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    monkeypatch.delenv("COUTURIER_PROJECT", raising=False)
    monkeypatch.delenv("COUTURIER_WORKSPACE", raising=False)
    assert Workspace.find() == Workspace(project=tmp_path, root=tmp_path / ".couturier")
    monkeypatch.setenv("COUTURIER_WORKSPACE", str(tmp_path / "elsewhere"))
    assert Workspace.find().root == tmp_path / "elsewhere"
