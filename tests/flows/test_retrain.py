"""What the retraining flow puts on record beside what its stages leave."""

from __future__ import annotations

from pathlib import Path

from couturier.components.lineage.journal import Journal
from couturier.components.lineage.stages import Artifact
from couturier.flows.retrain import note_stop


def aligned(folder: Path, stopped: str) -> Artifact:
    return Artifact(id="rl-1", path=folder, reused=False, seconds=1.0, facts={"stopped": stopped})


def test_a_stop_by_a_guard_is_on_record_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    assert note_stop(journal, aligned(tmp_path, "all steps done"), who="ada", run_id="r1") == ""
    assert journal.history() == []
    reason = "stopped at step 9: copied was 0.9 over the last 10 steps, over the limit rl.guards.copied=0.85"
    for run_id in ("r1", "r2"):
        assert note_stop(journal, aligned(tmp_path, reason), who="ada", run_id=run_id) == reason
    (entry,) = journal.history()
    assert (entry.kind, entry.who, entry.run_id) == ("training_stopped", "ada", "r1")
    assert entry.payload == {"stage": "rl", "artifact": "rl-1", "reason": reason}
