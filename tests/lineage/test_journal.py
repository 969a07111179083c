from __future__ import annotations

import multiprocessing
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from couturier.components.errors import LineageError
from couturier.components.lineage.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "deep" / "journal.sqlite")


def _move(journal: Journal, action: str, version: int | None, why: str = "") -> None:
    after = {} if version is None else {"champion": version}
    facts = {"action": action, "before": journal.aliases(), "after": after, "why": why}
    intent = journal.append("alias_intent", who="ada", version=version, payload=facts)
    journal.append("alias_done", who="ada", version=version, payload={**facts, "intent": intent.number})


def test_rows_come_back_newest_first_and_filtered(journal: Journal) -> None:
    assert journal.history() == [] and journal.verify() == 0 and journal.entry(1) is None
    journal.append("registration", who="ada", run_id="r1", version=1, payload={"ä": [1, 2.5, None]})
    journal.append("verdict", who="gate", version=1, payload={"decision": "promote"})
    journal.append("verdict", who="gate", version=2, payload={"decision": "hold"})
    assert [entry.number for entry in journal.history()] == [3, 2, 1]
    assert [entry.version for entry in journal.history(("verdict",))] == [2, 1]
    assert [entry.kind for entry in journal.history(version=1, limit=1)] == ["verdict"]
    first = journal.entry(1)
    assert first is not None and first.payload == {"ä": [1, 2.5, None]} and first.run_id == "r1"
    assert datetime.fromisoformat(first.at).utcoffset() == timedelta(0)
    assert journal.verify() == 3


def test_refuses_unknown_kinds_and_nobody(journal: Journal) -> None:
    with pytest.raises(LineageError, match="registration, verdict"):
        journal.append("party", who="ada")
    with pytest.raises(LineageError, match="who"):
        journal.append("verdict", who="  ")
    assert journal.history() == []


@pytest.mark.parametrize("statement", ["UPDATE journal SET who = 'eve' WHERE number = 1", "DELETE FROM journal"])
def test_rows_cannot_be_changed_or_deleted(journal: Journal, statement: str) -> None:
    journal.append("deployment", who="ada", version=1)
    with (
        closing(sqlite3.connect(journal.path)) as connection,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        connection.execute(statement)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE journal SET who = 'eve' WHERE number = 2", "row 2 was changed"),
        ("UPDATE journal SET payload = '{}' WHERE number = 1", "row 1 was changed"),
        ("DELETE FROM journal WHERE number = 2", "row 2 is missing"),
        ("DELETE FROM journal WHERE number = 3", "cut off"),
    ],
)
def test_tampering_shows(journal: Journal, statement: str, words: str) -> None:
    for version in (1, 2, 3):
        journal.append("deployment", who="ada", version=version, payload={"n": version})
    assert journal.verify() == 3
    with closing(sqlite3.connect(journal.path)) as connection, connection:
        connection.executescript("DROP TRIGGER journal_no_update; DROP TRIGGER journal_no_delete;")
        connection.execute(statement)
    with pytest.raises(LineageError, match=words):
        journal.verify()


def test_what_was_live_on_a_date(journal: Journal) -> None:
    before = datetime.now(UTC)
    assert journal.what_was_live() is None
    _move(journal, "register", None)
    _move(journal, "promote", 1, "first")
    _move(journal, "promote", 2, "better")
    second = journal.history(limit=1)[0].at
    _move(journal, "rollback", 1, "complaints")
    assert journal.what_was_live(before) is None
    then = journal.what_was_live(datetime.fromisoformat(second))
    assert then is not None and (then.version, then.who, then.why) == (2, "ada", "better")
    now = journal.what_was_live()
    assert now is not None and (now.version, now.why, now.action) == (1, "complaints", "rollback")
    assert [live.version for live in journal.champions()] == [1]
    with pytest.raises(LineageError, match="zone"):
        journal.what_was_live(datetime(2026, 1, 1))  # without a zone


def test_time_never_runs_backwards(journal: Journal) -> None:
    journal.append("deployment", who="ada")
    later = "2999-01-01T00:00:00.000000+00:00"
    with closing(sqlite3.connect(journal.path)) as connection, connection:
        connection.executescript("DROP TRIGGER journal_no_update;")
        connection.execute("UPDATE journal SET at = ?", (later,))
    assert journal.append("deployment", who="ada").at == later


def test_a_move_cut_short_is_unfinished(journal: Journal) -> None:
    facts = {"action": "promote", "before": {}, "after": {"champion": 1}, "why": ""}
    _move(journal, "promote", 2)
    intent = journal.append("alias_intent", who="ada", version=1, payload=facts)
    assert [entry.number for entry in journal.unfinished()] == [intent.number]
    journal.append("alias_abandoned", who="couturier", version=1, payload={"intent": intent.number})
    assert journal.unfinished() == []


def _write_many(path: Path, who: str, count: int) -> None:
    for number in range(count):
        Journal(path).append("deployment", who=who, version=number)


def test_processes_write_at_once(journal: Journal) -> None:
    """The file does not exist when all of them begin: its making is part of the race."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_many, args=(journal.path, f"w{n}", 40)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert journal.verify() == 160
    for n in range(4):
        mine = [entry.version for entry in reversed(journal.history()) if entry.who == f"w{n}"]
        assert mine == list(range(40))
    assert not [path for path in journal.path.parent.iterdir() if path.name.startswith(".")]


def test_a_killed_writer_leaves_no_half_row_and_no_lock(journal: Journal) -> None:
    journal.append("deployment", who="ada", version=1)
    killed = (
        "import os, signal, sys; from pathlib import Path\n"
        "from couturier.components.lineage.journal import Journal\n"
        "with Journal(Path(sys.argv[1]))._writing() as connection:\n"
        "    connection.execute(\"INSERT INTO journal VALUES (2,'x','deployment','eve',null,1,'{}','p','h')\")\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", killed, str(journal.path)], check=False, timeout=60)
    assert done.returncode == -9
    assert journal.append("deployment", who="ada", version=2).number == 2
    assert journal.verify() == 2
