"""The journal: who did what to which model version, when and why. Rows are only ever added.

One SQLite file (WAL). Triggers refuse UPDATE and DELETE, so a slip of our own code or a stray client cannot rewrite
the past. Every row carries the hash of the row before it, so a rewrite with the triggers taken off shows in
:meth:`Journal.verify`, and SQLite's own row counter shows rows cut off the end.

MLflow keeps no history of its aliases; here they are derived: an alias points where the last ``alias_done`` or
``alias_corrected`` row says (:meth:`Journal.aliases`), and "what was live on date T" is one query.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from couturier.components.errors import LineageError
from couturier.components.files import sha256_of_json

KINDS = (
    "registration",
    "verdict",
    "override",
    "approval",
    "alias_intent",
    "alias_done",
    "alias_abandoned",
    "alias_corrected",
    "deployment",
    "rollback",
    "training_stopped",
)
CHAMPION, CHALLENGER = "champion", "challenger"
_SETTLED = ("alias_done", "alias_corrected")
_GENESIS = "0" * 64
_WAIT_S = 30.0
_COLUMNS = "number, at, kind, who, run_id, version, payload, previous, hash"
_SCHEMA = """
CREATE TABLE journal (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    kind TEXT NOT NULL,
    who TEXT NOT NULL,
    run_id TEXT,
    version INTEGER,
    payload TEXT NOT NULL,
    previous TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE
);
CREATE INDEX journal_kind ON journal (kind, number);
CREATE TRIGGER journal_no_update BEFORE UPDATE ON journal
    BEGIN SELECT RAISE(ABORT, 'the journal is append-only: rows are never changed'); END;
CREATE TRIGGER journal_no_delete BEFORE DELETE ON journal
    BEGIN SELECT RAISE(ABORT, 'the journal is append-only: rows are never deleted'); END;
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row. ``at`` is UTC, ISO 8601 with microseconds, and never runs backwards, whatever the clock does."""

    number: int
    at: str
    kind: str
    who: str
    run_id: str | None
    version: int | None
    payload: dict[str, Any]
    previous: str
    hash: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Live:
    """The champion at a moment: which version, since when, who moved it there and why."""

    version: int
    since: str
    who: str
    why: str
    action: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Journal:
    """The journal in one file; made when it is first written to. Safe for several threads and processes at once.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(Path(folder) / "journal.sqlite")
        ...     first = journal.append("deployment", who="ada", version=1)
        ...     journal.verify(), [entry.kind for entry in journal.history()]
        (1, ['deployment'])
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(
        self,
        kind: str,
        *,
        who: str,
        run_id: str | None = None,
        version: int | None = None,
        payload: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Add one row and return it, once it is on the disk.

        Raises:
            LineageError: unknown kind, nobody named, or another process held the journal for half a minute.
        """
        if kind not in KINDS:
            raise LineageError(f"journal kind {kind!r} is unknown; use one of {', '.join(KINDS)}.")
        if not who.strip():
            raise LineageError("the journal needs to know who acts: `who` is empty. Pass --who NAME.")
        with self._writing() as connection:
            last = connection.execute("SELECT at, hash FROM journal ORDER BY number DESC LIMIT 1").fetchone()
            at = datetime.now(UTC).isoformat(timespec="microseconds")
            previous = _GENESIS
            if last is not None:
                at, previous = max(at, last[0]), last[1]
            counter = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'journal'").fetchone()
            body: dict[str, Any] = {
                "number": 1 if counter is None else counter[0] + 1,
                "at": at,
                "kind": kind,
                "who": who,
                "run_id": run_id,
                "version": version,
                "payload": json.loads(json.dumps(dict(payload or {}), sort_keys=True)),
                "previous": previous,
            }
            entry = Entry(**body, hash=sha256_of_json(body))
            connection.execute(f"INSERT INTO journal ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", _row(entry))
        return entry

    def history(
        self, kinds: Sequence[str] = (), *, version: int | None = None, limit: int | None = None
    ) -> list[Entry]:
        """Rows, newest first; only of those ``kinds`` and that ``version`` when given."""
        where, values = ["1"], list[Any]()
        if kinds:
            where.append(f"kind IN ({', '.join('?' * len(kinds))})")
            values += kinds
        if version is not None:
            where.append("version = ?")
            values.append(version)
        query = f"SELECT {_COLUMNS} FROM journal WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ?"
        with self._reading() as connection:
            rows = connection.execute(query, (*values, -1 if limit is None else limit)).fetchall() if connection else []
        return [_entry(row) for row in rows]

    def entry(self, number: int) -> Entry | None:
        """The row of that number, or None."""
        with self._reading() as connection:
            if connection is None:
                return None
            row = connection.execute(f"SELECT {_COLUMNS} FROM journal WHERE number = ?", (number,)).fetchone()
        return None if row is None else _entry(row)

    def aliases(self) -> dict[str, int]:
        """Where every alias must point: the registry's aliases are a projection of the journal."""
        for entry in self.history(_SETTLED, limit=1):
            return dict(entry.payload["after"])
        return {}

    def champions(self) -> list[Live]:
        """The line of promotions that still stands, oldest first; the last one is live. A rollback takes one off."""
        line: list[Live] = []
        for entry in reversed(self.history(_SETTLED)):
            version = entry.payload["after"].get(CHAMPION)
            if entry.payload["action"] == "rollback":
                line = line[:-1]
            elif version is not None and (not line or line[-1].version != version):
                line.append(_live(entry, version))
        return line

    def what_was_live(self, at: datetime | None = None) -> Live | None:
        """The champion at ``at`` (default: now), or None when there was none yet.

        Raises:
            LineageError: ``at`` has no time zone.
        """
        moment = at or datetime.now(UTC)
        if moment.tzinfo is None:
            raise LineageError(f"the time {moment.isoformat()} has no zone; write it like 2026-11-22T09:00:00+00:00.")
        until = moment.astimezone(UTC).isoformat(timespec="microseconds")
        live: Live | None = None
        for entry in reversed(self.history(_SETTLED)):
            if at is not None and entry.at > until:
                break
            version = entry.payload["after"].get(CHAMPION)
            if version is None:
                live = None
            elif live is None or live.version != version:
                live = _live(entry, version)
        return live

    def unfinished(self) -> list[Entry]:
        """Alias moves that were begun and neither finished nor given up, oldest first."""
        rows = self.history(("alias_intent", "alias_done", "alias_abandoned"))
        closed = {entry.payload["intent"] for entry in rows if entry.kind != "alias_intent"}
        return [entry for entry in reversed(rows) if entry.kind == "alias_intent" and entry.number not in closed]

    def verify(self) -> int:
        """Check every row's hash, the chain and that no row is missing; return the number of rows.

        Raises:
            LineageError: naming the first row that does not fit.
        """
        previous, expected = _GENESIS, 1
        with self._reading() as connection:
            if connection is None:
                return 0
            for row in connection.execute(f"SELECT {_COLUMNS} FROM journal ORDER BY number"):
                entry = _entry(row)
                body = {name: value for name, value in entry.as_dict().items() if name != "hash"}
                if entry.number != expected:
                    raise LineageError(f"the journal {self.path} was tampered with: row {expected} is missing.")
                if entry.previous != previous or entry.hash != sha256_of_json(body):
                    raise LineageError(f"the journal {self.path} was tampered with: row {entry.number} was changed.")
                previous, expected = entry.hash, expected + 1
            counter = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'journal'").fetchone()
        if counter is not None and counter[0] != expected - 1:
            raise LineageError(
                f"the journal {self.path} was tampered with: rows {expected} to {counter[0]} were cut off its end."
            )
        return expected - 1

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its first statement, so that reading the last hash and
        adding the next row cannot be torn apart by another writer."""
        if not self.path.exists():
            _create(self.path)
        with closing(sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise LineageError(
                    f"the journal {self.path} is held by another process ({error}) for {_WAIT_S:.0f} s. Try again."
                ) from error
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        if not self.path.exists():
            yield None
            return
        with closing(sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)) as connection:
            yield connection


def _create(path: Path) -> None:
    """Make the file whole beside its place, then link it there: the first of several processes wins, none sees half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        with closing(sqlite3.connect(beside)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)
        try:
            os.link(beside, path)
        except FileExistsError:
            return
    finally:
        for leftover in (beside, Path(f"{name}-wal"), Path(f"{name}-shm")):
            leftover.unlink(missing_ok=True)


def _row(entry: Entry) -> tuple[Any, ...]:
    payload = json.dumps(entry.payload, sort_keys=True, ensure_ascii=False)
    return (
        *(getattr(entry, name) for name in ("number", "at", "kind", "who", "run_id", "version")),
        payload,
        entry.previous,
        entry.hash,
    )


def _entry(row: Sequence[Any]) -> Entry:
    number, at, kind, who, run_id, version, payload, previous, digest = row
    return Entry(
        number=number,
        at=at,
        kind=kind,
        who=who,
        run_id=run_id,
        version=version,
        payload=json.loads(payload),
        previous=previous,
        hash=digest,
    )


def _live(entry: Entry, version: int) -> Live:
    payload = entry.payload
    return Live(version=version, since=entry.at, who=entry.who, why=payload.get("why", ""), action=payload["action"])
