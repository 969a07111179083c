from __future__ import annotations

from collections.abc import Callable

import pytest

from couturier.components.errors import LineageError
from couturier.components.lineage.gate import Config
from couturier.components.lineage.promotion import consider, current, duel_stage, examine, people
from couturier.components.lineage.registry import Registered, Registry
from couturier.components.lineage.stages import ArtifactStore
from couturier.components.lineage.tracking import run_facts
from couturier.components.lineage.workspace import Workspace

Register = Callable[..., Registered]
GATE = Config(draws=300)


def _consider(workspace: Workspace, number: int) -> tuple[str, int | None]:
    verdict, move = consider(workspace, number, config=GATE, who="ada", why="retrained")
    return verdict.decision, None if move is None else move.version


def test_a_better_model_takes_over_and_a_worse_one_does_not(
    workspace: Workspace, register: Register, quick_duel: None
) -> None:
    assert current(workspace)["champion"] is None
    register(workspace, 1)
    assert _consider(workspace, 1) == ("promote", 1), "the first one stands on its own"
    register(workspace, 2)
    assert _consider(workspace, 2) == ("promote", 2)
    register(workspace, 0)
    assert _consider(workspace, 3) == ("reject", None)
    now = current(workspace)
    assert now["champion"]["number"] == 2 and (now["who"], now["why"]) == ("ada", "retrained")
    verdicts = Registry(workspace).journal.history(("verdict",))
    assert [entry.payload["decision"] for entry in verdicts] == ["reject", "promote", "promote"]
    assert verdicts[0].payload["champion_version"] == 2 and verdicts[0].payload["config"]["draws"] == 300
    assert {piece["column"] for piece in verdicts[0].payload["figures"]["slices"]} == {"age", "history"}
    run = run_facts(workspace, Registry(workspace).version(3).run_id)
    assert [child["name"] for child in run["children"]] == ["duel"], "the duel is in the run that made the candidate"


def test_nothing_is_judged_twice(workspace: Workspace, register: Register, quick_duel: None) -> None:
    register(workspace, 1)
    _consider(workspace, 1)
    assert _consider(workspace, 1) == ("promote", None), "the champion already"
    register(workspace, 0)
    assert _consider(workspace, 2) == _consider(workspace, 2) == ("reject", None)
    assert len(Registry(workspace).journal.history(("verdict",))) == 2


def test_a_promotion_cut_off_after_its_verdict_is_carried_out(
    workspace: Workspace, register: Register, quick_duel: None
) -> None:
    register(workspace, 1)
    examine(workspace, 1, config=GATE, who="ada")
    assert Registry(workspace).champion() is None
    assert _consider(workspace, 1) == ("promote", 1)
    assert len(Registry(workspace).journal.history(("verdict",))) == 1


def test_a_new_champion_makes_old_verdicts_void(workspace: Workspace, register: Register, quick_duel: None) -> None:
    for seed in (1, 2, 3):
        register(workspace, seed)
    assert examine(workspace, 2, config=GATE, who="ada").champion is None
    assert _consider(workspace, 3) == ("promote", 3)
    assert _consider(workspace, 2) == ("reject", None), "compared with version 3 now"


def test_the_same_model_in_a_new_bento_waits_for_people(
    workspace: Workspace, register: Register, quick_duel: None
) -> None:
    register(workspace, 1)
    _consider(workspace, 1)
    register(workspace, 1, bento="couturier:repacked")
    verdict, move = consider(workspace, 2, config=GATE, who="ada", why="")
    assert verdict.decision == "hold" and move is None and "--force" in verdict.reasons[0]
    with pytest.raises(LineageError, match="with itself"):
        examine(workspace, 2, config=GATE, who="ada")


def test_people_are_described(workspace: Workspace, register: Register) -> None:
    version = register(workspace, 1).version
    frame = people(ArtifactStore(workspace).open(version.manifests["sequences"]))
    assert frame.columns == ["user_id", "history", "age"] and frame["history"][3] == 3.0


def test_the_duel_sets_the_champion_before_the_candidates_people(workspace: Workspace, register: Register) -> None:
    pytest.importorskip("couturier.components.evaluation.duel")
    candidate, champion = register(workspace, 2).version, register(workspace, 1).version
    inputs = duel_stage(candidate, champion).inputs
    assert inputs["rl"] == champion.manifests["rl"] and inputs["tokenise"] == champion.manifests["tokenise"]
    assert inputs["evaluate"] == candidate.manifests["evaluate"]
