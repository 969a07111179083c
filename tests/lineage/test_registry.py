from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from couturier.components.errors import LineageError
from couturier.components.lineage.mlflow_store import MODEL, mlflow_client
from couturier.components.lineage.registry import Registered, Registry
from couturier.components.lineage.workspace import Workspace

Register = Callable[..., Registered]


def _aliases(workspace: Workspace) -> dict[str, int]:
    found = mlflow_client(workspace).get_registered_model(MODEL).aliases
    return {name: int(number) for name, number in found.items()}


def _verdict(registry: Registry, number: int, decision: str = "promote") -> None:
    facts = {"decision": decision, "champion_version": registry.journal.aliases().get("champion")}
    registry.journal.append("verdict", who="gate", version=number, payload=facts)


def test_a_version_carries_its_whole_lineage(workspace: Workspace, register: Register) -> None:
    version = register(workspace, 1).version
    assert (version.number, version.aliases, version.recipe, version.bento) == (
        1,
        ("challenger",),
        "smoke",
        "couturier:1",
    )
    assert version.data_md5 == "d41d8" and version.config_hash == "c0ffee" and version.git_commit
    assert set(version.manifests) == {
        "validate", "sequences", "tokenise", "judge", "sft", "rl", "evaluate", "package",
    }  # fmt: skip
    assert all(Registry(workspace).store.has(name) for name in version.manifests.values())
    assert (Path(version.source) / "config.json").exists(), "the model's files are with MLflow"
    registry = Registry(workspace)
    assert [entry.kind for entry in registry.journal.history()] == ["alias_done", "alias_intent", "registration"]
    assert registry.journal.history(("registration",))[0].payload["tags"]["manifest.rl"] == version.manifests["rl"]


def test_the_same_model_and_bento_register_once(workspace: Workspace, register: Register) -> None:
    first, again = register(workspace, 1), register(workspace, 1)
    assert first.created and not again.created and again.version == first.version
    assert len(Registry(workspace).journal.history(("registration",))) == 1
    other = register(workspace, 1, bento="couturier:new")
    assert other.created and other.version.number == 2


def test_promotion_needs_a_verdict(workspace: Workspace, register: Register) -> None:
    registry = Registry(workspace)
    register(workspace, 1)
    with pytest.raises(LineageError, match="no verdict 'promote'"):
        registry.promote(1, who="ada", why="")
    _verdict(registry, 1, "hold")
    with pytest.raises(LineageError, match="no verdict 'promote'"):
        registry.promote(1, who="ada", why="")
    _verdict(registry, 1)
    move = registry.promote(1, who="ada", why="first")
    assert (move.version, move.previous) == (1, None)
    assert _aliases(workspace) == {"champion": 1} == registry.journal.aliases()
    with pytest.raises(LineageError, match="already"):
        registry.promote(1, who="ada", why="again")


def test_a_verdict_against_an_earlier_champion_is_stale(workspace: Workspace, register: Register) -> None:
    registry = Registry(workspace)
    for seed in (1, 2, 3):
        register(workspace, seed)
        _verdict(registry, seed)
    registry.promote(2, who="ada", why="")
    with pytest.raises(LineageError, match="version 2"):
        registry.promote(3, who="ada", why="")
    stale = {"decision": "promote", "champion_version": 1}  # given while the champion changed
    registry.journal.append("verdict", who="gate", version=3, payload=stale)
    with pytest.raises(LineageError, match="version 2"):
        registry.promote(3, who="ada", why="")
    with pytest.raises(LineageError, match="reason"):
        registry.promote(3, who="ada", why=" ", force=True)
    move = registry.promote(3, who="ada", why="the shop asked for it", force=True)
    assert move.previous == 2
    override = registry.journal.history(("override",))[0]
    assert override.version == 3 and override.payload == {"why": "the shop asked for it", "champion": 2}


def test_rollback_goes_back_and_says_so(workspace: Workspace, register: Register) -> None:
    registry = Registry(workspace)
    with pytest.raises(LineageError, match="no champion yet"):
        registry.rollback(who="ada", why="")
    for seed in (1, 2, 3):
        register(workspace, seed)
        _verdict(registry, seed)
        registry.promote(seed, who="ada", why="")
    assert (
        registry.rollback(who="bob", why="mush").sentence
        == "Version 2 is the champion again; version 3 was rolled back."
    )
    with pytest.raises(LineageError, match="no verdict"):
        registry.promote(3, who="ada", why="what got it there was before the complaints")
    assert registry.rollback(who="bob", why="mush").version == 1
    with pytest.raises(LineageError, match="version 1 is the first champion"):
        registry.rollback(who="bob", why="")
    assert _aliases(workspace) == {"champion": 1}
    live = registry.journal.what_was_live()
    assert live is not None and (live.version, live.who, live.why) == (1, "bob", "mush")


def test_names_of_versions(workspace: Workspace, register: Register) -> None:
    registry = Registry(workspace)
    assert registry.versions() == [] and registry.champion() is None
    with pytest.raises(LineageError, match="couturier retrain"):
        registry.version("latest")
    for seed in (1, 2):
        register(workspace, seed)
    _verdict(registry, 1)
    registry.promote(1, who="ada", why="")
    found = {name: registry.version(name).number for name in ("1", 2, "v2", "latest", "champion", "challenger")}
    assert found == {"1": 1, 2: 2, "v2": 2, "latest": 2, "champion": 1, "challenger": 2}
    assert registry.version(1).verdict == "promote" and registry.version(2).verdict is None
    with pytest.raises(LineageError, match="there are: 1, 2"):
        registry.version(7)
    with pytest.raises(LineageError, match="there are: 1, 2"):
        registry.promote(7, who="ada", why="x", force=True)


def test_an_alias_moved_from_outside_is_put_back_and_recorded(workspace: Workspace, register: Register) -> None:
    registry = Registry(workspace)
    for seed in (1, 2):
        register(workspace, seed)
    _verdict(registry, 1)
    registry.promote(1, who="ada", why="")
    mlflow_client(workspace).set_registered_model_alias(MODEL, "champion", "2")
    assert "something else had set" in registry.reconcile()[0]
    assert _aliases(workspace)["champion"] == 1 and registry.reconcile() == []
    assert registry.journal.history(("alias_corrected",))[0].payload["seen"]["champion"] == 2


def test_a_lost_journal_or_registry_is_noticed(workspace: Workspace, register: Register) -> None:
    registry = Registry(workspace)
    register(workspace, 1)
    saved = {path: path.read_bytes() for path in workspace.root.glob("journal.sqlite*")}
    for path in saved:
        path.unlink()
    with pytest.raises(LineageError, match="has lost or changed row 3"):
        registry.reconcile()
    for path, content in saved.items():
        path.write_bytes(content)
    assert registry.reconcile() == []
    mlflow_client(workspace).delete_model_version(MODEL, "1")
    with pytest.raises(LineageError, match="no version 1"):
        registry.reconcile()


@pytest.mark.parametrize("after_calls", [0, 1, 2])
def test_killed_inside_a_promotion(workspace: Workspace, register: Register, after_calls: int) -> None:
    """SIGKILL before the first alias is set, between the two, and after both but before the journal says so."""
    registry = Registry(workspace)
    for seed in (1, 2):
        register(workspace, seed)
        _verdict(registry, seed)
    killed = (
        "import os, signal, sys; from pathlib import Path\n"
        "from mlflow import MlflowClient\n"
        "from couturier.components.lineage.registry import Registry\n"
        "from couturier.components.lineage.workspace import Workspace\n"
        "left = int(sys.argv[2])\n"
        "def cut(original):\n"
        "    def call(*a, **k):\n"
        "        global left\n"
        "        if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        left -= 1\n"
        "        return original(*a, **k)\n"
        "    return call\n"
        "for name in ('set_registered_model_alias', 'delete_registered_model_alias', 'set_registered_model_tag'):\n"
        "    setattr(MlflowClient, name, cut(getattr(MlflowClient, name)))\n"
        "root = Path(sys.argv[1])\n"
        "Registry(Workspace(project=root.parent, root=root)).promote(2, who='ada', why='better')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", killed, str(workspace.root), str(after_calls)], check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert registry.reconcile() == (
        [] if after_calls == 2 else ["finished the promote of version 2 by ada, which had been cut short"]
    )
    assert _aliases(workspace) == {"champion": 2} == registry.journal.aliases()
    assert registry.journal.unfinished() == [] and registry.journal.verify() == len(registry.journal.history())
    assert registry.reconcile() == []


def test_two_processes_promote_at_once(workspace: Workspace, register: Register) -> None:
    for seed in (1, 2):
        register(workspace, seed)
    code = (
        "import sys; from pathlib import Path\n"
        "from couturier.components.lineage.registry import Registry\n"
        "from couturier.components.lineage.workspace import Workspace\n"
        "root = Path(sys.argv[1])\n"
        "Registry(Workspace(project=root.parent, root=root)).promote(int(sys.argv[2]), who='p', why='w', force=True)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(workspace.root), str(n)], env=environment) for n in (1, 2)
    ]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    registry = Registry(workspace)
    assert _aliases(workspace) == registry.journal.aliases()
    assert sorted(live.version for live in registry.journal.champions()) == [1, 2]
    assert registry.journal.verify() == len(registry.journal.history())
