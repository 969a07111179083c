"""Any order of registering, judging, promoting, rolling back, meddling and being cut short ends in a true registry."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from mlflow import MlflowClient

from couturier.components.errors import LineageError
from couturier.components.lineage.mlflow_store import MODEL, mlflow_client
from couturier.components.lineage.registry import Registered, Registry
from couturier.components.lineage.workspace import Workspace

# The calls a move makes, in MLflow and in the journal: being cut short at the n-th is being killed there.
CALLS = ("set_registered_model_alias", "delete_registered_model_alias", "set_registered_model_tag")


class Killed(BaseException):
    """What stands for SIGKILL here; test_registry.py has the real one. Nothing of ours may catch it."""


@contextmanager
def killed_at(call: int) -> Iterator[None]:
    left = call
    whole = {name: getattr(MlflowClient, name) for name in CALLS}

    def cut(original: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **more: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return original(*arguments, **more)

        return wrapped

    for name in CALLS:
        setattr(MlflowClient, name, cut(whole[name]))
    try:
        yield
    except Killed:
        return
    finally:
        for name, original in whole.items():
            setattr(MlflowClient, name, original)


class States(RuleBasedStateMachine):
    template: Path
    register_one: Callable[..., Registered]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        root = self.folder / ".couturier"
        shutil.copytree(type(self).template, root)
        self.workspace = Workspace(project=self.folder, root=root)
        self.registry = Registry(self.workspace)
        self.line: list[int] = []  # the model of the world: promotions that stand
        self.registered = 3
        self.dirty = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(seed=st.integers(3, 5), cut=st.one_of(st.none(), st.integers(0, 1)))
    def register(self, seed: int, cut: int | None) -> None:
        before = {version.bento for version in self.registry.versions()}
        if cut is None:
            made = type(self).register_one(self.workspace, seed)
            assert made.created == (f"couturier:{seed}" not in before)
        else:
            self.dirty = True
            with killed_at(cut):
                type(self).register_one(self.workspace, seed)
        self.registered = len(before | {f"couturier:{seed}"})

    @rule(data=st.data(), decision=st.sampled_from(["promote", "hold"]))
    def judge(self, data: st.DataObject, decision: str) -> None:
        number = data.draw(st.integers(1, self.registered))
        champion = self.registry.journal.aliases().get("champion")
        facts = {"decision": decision, "champion_version": champion}
        self.registry.journal.append("verdict", who="gate", version=number, payload=facts)

    @rule(data=st.data(), many=st.integers(1, 3), force=st.booleans(), cut=st.one_of(st.none(), st.integers(0, 2)))
    def promote(self, data: st.DataObject, many: int, force: bool, cut: int | None) -> None:
        """One after another; the last one is cut short, if any is."""
        self.registry.reconcile()
        for left in reversed(range(many)):
            number = data.draw(st.integers(1, self.registered))
            overrule = force or left > 0
            if self.line[-1:] == [number] or not (overrule or self.registry.earned(number)):
                with pytest.raises(LineageError):
                    self.registry.promote(number, who="ada", why="rule", force=overrule)
                continue
            if cut is None or left:
                self.registry.promote(number, who="ada", why="rule", force=overrule)
            else:
                self.dirty = True
                with killed_at(cut):
                    self.registry.promote(number, who="ada", why="rule", force=overrule)
            self.line.append(number)  # a move that was begun is finished, now or at the next start

    @rule(cut=st.one_of(st.none(), st.integers(0, 1)))
    def roll_back(self, cut: int | None) -> None:
        self.registry.reconcile()
        if len(self.line) < 2:
            with pytest.raises(LineageError, match="nothing to roll back"):
                self.registry.rollback(who="ada", why="rule")
            return
        if cut is None:
            assert self.registry.rollback(who="ada", why="rule").version == self.line[-2]
        else:
            self.dirty = True
            with killed_at(cut):
                self.registry.rollback(who="ada", why="rule")
        self.line.pop()

    @rule(data=st.data(), name=st.sampled_from(["champion", "challenger"]))
    def meddle(self, data: st.DataObject, name: str) -> None:
        number = data.draw(st.integers(1, self.registered))
        self.dirty = True
        mlflow_client(self.workspace).set_registered_model_alias(MODEL, name, str(number))

    @rule()
    def start_again(self) -> None:
        self.registry = Registry(self.workspace)
        self.registry.reconcile()
        assert self.registry.reconcile() == []
        self.dirty = False

    @invariant()
    def everything_agrees(self) -> None:
        if self.dirty:
            self.registry.reconcile()
            self.dirty = False
        journal, versions = self.registry.journal, self.registry.versions()
        assert journal.verify() == len(journal.history())
        assert journal.unfinished() == []
        assert sorted(version.number for version in versions) == list(range(1, self.registered + 1))
        assert len({version.bento for version in versions}) == self.registered, "each registered once"
        seen = {alias: version.number for version in versions for alias in version.aliases}
        assert seen == journal.aliases()
        assert [live.version for live in journal.champions()] == self.line
        assert [number for alias, number in seen.items() if alias == "champion"] == self.line[-1:]
        for number in self.line[-1:]:
            history = journal.history(("verdict", "override"), version=number)
            assert any(entry.kind == "override" or entry.payload["decision"] == "promote" for entry in history)


def test_any_order_of_events(
    make_workspace: Callable[[Path], Workspace], register: Callable[..., Registered], tmp_path: Path
) -> None:
    template = make_workspace(tmp_path)
    for seed in range(3):
        register(template, seed)
    States.template = template.root
    States.register_one = staticmethod(register)
    run_state_machine_as_test(
        States,
        settings=settings(
            max_examples=10,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            phases=[Phase.generate],  # looking for a smaller example takes minutes here
            suppress_health_check=list(HealthCheck),
        ),
    )
