"""Model versions and the two names that matter, ``champion`` and ``challenger``.

MLflow holds the versions; the journal holds what happened to them. A move of an alias::

    journal: alias_intent ──▶ MLflow: aliases set ──▶ journal: alias_done
                  └─ killed in between: reconcile() does the rest, or gives the move up when its version is gone

so the aliases are always what the journal says. One process moves at a time (a file lock that a kill sets free).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from couturier.components.errors import LineageError
from couturier.components.files import sha256_of_json
from couturier.components.lineage.journal import CHALLENGER, CHAMPION, Entry, Journal
from couturier.components.lineage.mlflow_store import MODEL, database_exists, lock, mlflow_client
from couturier.components.lineage.provenance import code_commit, data_md5, whoami
from couturier.components.lineage.stages import ArtifactStore
from couturier.components.lineage.tracker import RunTracker
from couturier.components.lineage.tracking import require_run, run_of
from couturier.components.lineage.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_OURS = (CHAMPION, CHALLENGER)
_MANIFEST, _HEAD, _KEY = "manifest.", "couturier.journal_head", "couturier.key"
_MACHINE = "couturier"


@dataclass(frozen=True, kw_only=True)
class Version:
    """A registered model version and where it comes from. ``manifests`` maps a stage to its artifact id; ``verdict``
    is the newest decision of the gate on it, None when it was never examined."""

    number: int
    aliases: tuple[str, ...]
    created_at: str
    run_id: str
    bento: str
    recipe: str
    git_commit: str
    data_md5: str
    config_hash: str
    manifests: dict[str, str]
    source: str
    verdict: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version, and whether this call made it."""

    version: Version
    created: bool


@dataclass(frozen=True, kw_only=True)
class Move:
    """An alias move that was done: ``promote`` or ``rollback``. ``previous`` is the champion before it."""

    action: str
    version: int
    previous: int | None
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Registry:
    """The model registry of one workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.journal = Journal(workspace.journal)
        self.store = ArtifactStore(workspace)
        self._model_exists = False

    def register(
        self,
        *,
        rl: str,
        evaluate: str,
        package: str,
        bento: str,
        recipe: str,
        config_hash: str,
        run_id: str,
        who: str | None = None,
    ) -> Registered:
        """Register the model of the ``rl`` artifact with its whole lineage as tags, and call it challenger.

        The same model in the same bento is registered once: a second call returns the version there is.

        Args:
            rl, evaluate, package: artifact ids; the other stages are found through them.
            bento: tag of the packaged bento.
            run_id: the MLflow run of the flow that registers.

        Raises:
            LineageError: an artifact is absent, or the ``rl`` artifact holds no ``model/``.
        """
        who = who or whoami()
        key = sha256_of_json({"rl": rl, "bento": bento})
        with self._moving() as client:
            found = list(client.search_model_versions(f"name = '{MODEL}' AND tags.`{_KEY}` = '{key}'"))
            created = not found
            if created:
                ancestry = {**self.store.ancestry(package), **self.store.ancestry(evaluate), **self.store.ancestry(rl)}
                tags = {
                    _KEY: key,
                    "git_commit": code_commit(),
                    "data_md5": data_md5(self.store, rl),
                    "config_hash": config_hash,
                    "recipe": recipe,
                    "bento": bento,
                    "run_id": run_id,
                    **{f"{_MANIFEST}{manifest['stage']}": name for name, manifest in sorted(ancestry.items())},
                }
                source, source_run = self._model_source(client, rl, run_id)
                found = [
                    client.create_model_version(MODEL, source, source_run, tags=tags, description=f"recipe {recipe}")
                ]
            number = int(found[0].version)
            self._record_registration(client, number, run_id=run_id, who=who, tags=dict(found[0].tags))
        return Registered(version=self.version(number), created=created)

    def promote(self, number: int, *, who: str, why: str, force: bool = False) -> Move:
        """Make a version the champion.

        Raises:
            LineageError: no such version; it is the champion already; the gate has not said ``promote`` since the
                champion last changed and ``force`` is not set; ``force`` without a reason.
        """
        with self._moving() as client:
            self.version(number)
            aliases = self.journal.aliases()
            previous = aliases.get(CHAMPION)
            if previous == number:
                raise LineageError(f"version {number} is the champion already; nothing was moved.")
            if not self.earned(number):
                if not force:
                    raise LineageError(
                        f"version {number} has no verdict 'promote' against the champion there is now "
                        f"({_named(previous)}). Run `couturier promote {number}`, which asks the gate, or add "
                        "--force --why REASON to overrule it; that is put on record."
                    )
                if not why.strip():
                    raise LineageError("a promotion by force needs a reason: add --why REASON. It goes on record.")
                self.journal.append("override", who=who, version=number, payload={"why": why, "champion": previous})
            after = {name: version for name, version in aliases.items() if name == CHAMPION or version != number}
            self._move(client, action="promote", version=number, after={**after, CHAMPION: number}, who=who, why=why)
        instead = f" instead of version {previous}" if previous else ""
        return Move(
            action="promote", version=number, previous=previous, sentence=f"Version {number} is the champion{instead}."
        )

    def rollback(self, *, who: str, why: str) -> Move:
        """Make the champion before this one the champion again. Twice in a row goes back two.

        Raises:
            LineageError: there was no champion before this one.
        """
        with self._moving() as client:
            line = self.journal.champions()
            if len(line) < 2:
                now = f"version {line[0].version} is the first champion" if line else "there is no champion yet"
                raise LineageError(f"nothing to roll back to: {now}. `couturier models` lists the versions there are.")
            gone, back = line[-1].version, line[-2].version
            self.version(back)
            self.journal.append("rollback", who=who, version=back, payload={"why": why, "from": gone, "to": back})
            after = {**self.journal.aliases(), CHAMPION: back}
            self._move(client, action="rollback", version=back, after=after, who=who, why=why)
        return Move(
            action="rollback",
            version=back,
            previous=gone,
            sentence=f"Version {back} is the champion again; version {gone} was rolled back.",
        )

    def earned(self, number: int) -> bool:
        """Whether the gate's newest verdict on a version is ``promote``, given since the champion last changed."""
        verdict = self.standing_verdict(number)
        return verdict is not None and verdict.payload["decision"] == "promote"

    def standing_verdict(self, number: int) -> Entry | None:
        """The newest verdict on a version, if the champion it was compared with is still the champion."""
        changed = 0
        for entry in self.journal.history(("alias_done", "alias_corrected")):
            if entry.payload["before"].get(CHAMPION) != entry.payload["after"].get(CHAMPION):
                changed = entry.number
                break
        for entry in self.journal.history(("verdict",), version=number, limit=1):
            # The second half: the champion may have changed while the gate was at work.
            if entry.number > changed and entry.payload["champion_version"] == self.journal.aliases().get(CHAMPION):
                return entry
        return None

    def versions(self) -> list[Version]:
        """All versions, newest first."""
        if not database_exists(self.workspace):
            return []  # looking must not cost the seconds that making the database does
        client = self._client()
        verdicts: dict[int, str] = {}
        for entry in self.journal.history(("verdict",)):
            if entry.version is not None:
                verdicts.setdefault(entry.version, entry.payload["decision"])
        aliases = _aliases(client)
        found = client.search_model_versions(f"name = '{MODEL}'", max_results=10_000)
        versions = [_version(row, aliases, verdicts.get(int(row.version))) for row in found]
        return sorted(versions, key=lambda version: -version.number)

    def version(self, which: int | str) -> Version:
        """A version by number, or ``latest``, ``champion``, ``challenger``.

        Raises:
            LineageError: there is none.
        """
        versions = self.versions()
        for version in versions:
            if which == "latest" or which in version.aliases or str(which).lstrip("v") == str(version.number):
                return version
        there = ", ".join(str(version.number) for version in reversed(versions)) or "none yet: run `couturier retrain`"
        raise LineageError(f"no model version {which!r}; there are: {there} (or latest, champion, challenger).")

    def champion(self) -> Version | None:
        """The version in use, or None before the first promotion."""
        number = self.journal.aliases().get(CHAMPION)
        return None if number is None else self.version(number)

    def reconcile(self) -> list[str]:
        """Finish or give up alias moves that a kill cut in two, and put back aliases that something else moved.
        Returns what was done, in words. Every change calls it first.

        Raises:
            LineageError: the journal or MLflow has lost what the other remembers.
        """
        with lock(self.workspace, "registry"):
            return self._reconcile(self._client())

    @contextmanager
    def _moving(self) -> Iterator[MlflowClient]:
        with lock(self.workspace, "registry"):
            client = self._client()
            self._reconcile(client)
            yield client

    def _client(self) -> MlflowClient:
        from mlflow.exceptions import MlflowException

        client = mlflow_client(self.workspace)
        if not self._model_exists and not client.search_registered_models(f"name = '{MODEL}'"):
            try:
                client.create_registered_model(MODEL, description="The generator; champion is in use.")
            except MlflowException:
                client.get_registered_model(MODEL)  # another process was quicker
        self._model_exists = True
        return client

    def _move(
        self, client: MlflowClient, *, action: str, version: int, after: Mapping[str, int], who: str, why: str
    ) -> None:
        facts = {"action": action, "before": self.journal.aliases(), "after": dict(after), "why": why}
        intent = self.journal.append("alias_intent", who=who, version=version, payload=facts)
        _point(client, after)
        self._settle(client, intent)

    def _settle(self, client: MlflowClient, intent: Entry, **more: Any) -> None:
        facts = {**intent.payload, "intent": intent.number, **more}
        self._remember(client, self.journal.append("alias_done", who=intent.who, version=intent.version, payload=facts))

    def _remember(self, client: MlflowClient, entry: Entry) -> None:
        """Leave the journal's newest hash with MLflow, so that a journal that was lost or cut back shows."""
        client.set_registered_model_tag(MODEL, _HEAD, f"{entry.number} {entry.hash}")

    def _reconcile(self, client: MlflowClient) -> list[str]:
        self._check_head(client)
        done = []
        numbers = {int(row.version) for row in client.search_model_versions(f"name = '{MODEL}'", max_results=10_000)}
        for intent in self.journal.unfinished():
            words = f"{intent.payload['action']} of version {intent.version} by {intent.who}"
            if set(intent.payload["after"].values()) <= numbers:
                _point(client, intent.payload["after"])
                self._settle(client, intent, recovered=True)
                done.append(f"finished the {words}, which had been cut short")
            else:
                self.journal.append(
                    "alias_abandoned", who=_MACHINE, version=intent.version, payload={"intent": intent.number}
                )
                done.append(f"gave up the {words}: the registry has lost that version")
        wanted, seen = self.journal.aliases(), _aliases(client)
        lost = sorted(set(wanted.values()) - numbers)
        if lost:
            raise LineageError(
                f"the journal says that {wanted}, but the registry {self.workspace.mlflow_db} has no version "
                f"{lost[0]}. Put the database back from a copy, or move {self.workspace.journal} away to begin anew."
            )
        if seen != wanted:
            _point(client, wanted)
            facts = {"action": "correct", "before": wanted, "seen": seen, "after": wanted, "why": "moved outside"}
            entry = self.journal.append("alias_corrected", who=_MACHINE, version=wanted.get(CHAMPION), payload=facts)
            self._remember(client, entry)
            done.append(f"put the aliases back to {wanted or 'none'}: something else had set {seen or 'none'}")
        return done

    def _check_head(self, client: MlflowClient) -> None:
        number, _, digest = client.get_registered_model(MODEL).tags.get(_HEAD, "").partition(" ")
        entry = self.journal.entry(int(number)) if number else None
        if number and (entry is None or entry.hash != digest):
            raise LineageError(
                f"the journal {self.workspace.journal} has lost or changed row {number}, which MLflow remembers. "
                "Put the journal back from a copy; nothing is moved until then."
            )

    def _record_registration(
        self, client: MlflowClient, number: int, *, run_id: str, who: str, tags: Mapping[str, str]
    ) -> None:
        """The journal rows of a registration, each once, also when an earlier call was killed between them."""
        if not self.journal.history(("registration",), version=number, limit=1):
            self.journal.append("registration", who=who, run_id=run_id, version=number, payload={"tags": dict(tags)})
        moves = self.journal.history(("alias_done",), version=number)
        if not any(entry.payload["action"] == "register" for entry in moves):
            after = {**self.journal.aliases(), CHALLENGER: number}
            self._move(client, action="register", version=number, after=after, who=who, why="newly registered")

    def _model_source(self, client: MlflowClient, rl: str, run_id: str) -> tuple[str, str]:
        """Where the model's files are (plain artifacts of a run; no flavour, no pickle) and the run that made them."""
        folder = self.store.open(rl).path / "model"
        if not folder.is_dir():
            raise LineageError(f"artifact {rl!r} holds no model/ folder; remove it and run `couturier retrain` again.")
        made_by = run_of(self.workspace, rl) or run_id
        uri = require_run(client, made_by).info.artifact_uri
        if "model" not in {file.path for file in client.list_artifacts(made_by)}:
            RunTracker(client, made_by).file(folder)
            if "model" not in {file.path for file in client.list_artifacts(made_by)}:
                return str(folder), made_by  # too large for a copy
        return f"{uri}/model", made_by


def _point(client: MlflowClient, wanted: Mapping[str, int]) -> None:
    seen = _aliases(client)
    for name in _OURS:
        if name in wanted and seen.get(name) != wanted[name]:
            client.set_registered_model_alias(MODEL, name, str(wanted[name]))
        elif name in seen and name not in wanted:
            client.delete_registered_model_alias(MODEL, name)


def _aliases(client: MlflowClient) -> dict[str, int]:
    aliases = client.get_registered_model(MODEL).aliases
    return {name: int(number) for name, number in aliases.items() if name in _OURS}


def _version(row: ModelVersion, aliases: Mapping[str, int], verdict: str | None) -> Version:
    tags = row.tags
    return Version(
        number=int(row.version),
        aliases=tuple(sorted(name for name, number in aliases.items() if number == int(row.version))),
        created_at=datetime.fromtimestamp(row.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        run_id=tags["run_id"],
        bento=tags["bento"],
        recipe=tags["recipe"],
        git_commit=tags["git_commit"],
        data_md5=tags["data_md5"],
        config_hash=tags["config_hash"],
        manifests={name.removeprefix(_MANIFEST): tags[name] for name in sorted(tags) if name.startswith(_MANIFEST)},
        source=str(row.source),
        verdict=verdict,
    )


def _named(number: int | None) -> str:
    return "there is none yet" if number is None else f"version {number}"
