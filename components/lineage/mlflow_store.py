"""MLflow's database: where it is, made whole before anyone sees it, and one client for both of its halves.

MLflow takes seconds to import, so every import of it is inside a function.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from couturier.components.errors import MissingExtraError
from couturier.components.files import sync_folder
from couturier.components.lineage.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "couturier"
MODEL = "couturier"
# Set before the import: MLflow reads them once.
_SILENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}


def mlflow_uri(workspace: Workspace) -> str:
    """The tracking and registry URI: ``COUTURIER_MLFLOW_URI`` (a server or a PostgreSQL), else SQLite in the
    workspace."""
    return os.environ.get("COUTURIER_MLFLOW_URI") or f"sqlite:///{workspace.mlflow_db.resolve()}"


def mlflow_client(workspace: Workspace) -> MlflowClient:
    """A client for runs and for the registry. It sets nothing global, so threads and workspaces do not mix.

    Raises:
        MissingExtraError: MLflow is not installed.
    """
    ensure_database(workspace)
    _import_mlflow()
    from mlflow import MlflowClient

    uri = mlflow_uri(workspace)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def ensure_database(workspace: Workspace) -> None:
    """Make MLflow's SQLite file if it is not there: beside its place, then renamed, so that a kill between two of
    its migrations leaves no half-made database, and only one of several processes makes it."""
    final = workspace.mlflow_db
    if database_exists(workspace):
        return
    with lock(workspace, "mlflow"):
        if final.exists():
            return
        _import_mlflow()
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        half = final.with_name(f".{final.name}.half")
        for leftover in (half, Path(f"{half}-wal"), Path(f"{half}-shm")):
            leftover.unlink(missing_ok=True)
        artifacts = str(workspace.mlflow_artifacts.resolve())
        store = SqlAlchemyStore(f"sqlite:///{half.resolve()}", artifacts)
        store.create_experiment(EXPERIMENT, artifact_location=artifacts)
        store.engine.dispose()
        # A write-ahead log lets readers (the MLflow page) and writers (stages) go on together, and saves syncs.
        with closing(sqlite3.connect(half)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        half.rename(final)
        sync_folder(final.parent)


def database_exists(workspace: Workspace) -> bool:
    """Whether there is anything to ask. What an URL names is taken to exist."""
    return bool(os.environ.get("COUTURIER_MLFLOW_URI")) or workspace.mlflow_db.exists()


def experiment_id(client: MlflowClient, workspace: Workspace) -> str:
    """The id of our experiment; made if the database is somebody else's."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            # A server decides itself where artifacts go.
            remote = mlflow_uri(workspace).startswith("http")
            location = None if remote else str(workspace.mlflow_artifacts.resolve())
            return str(client.create_experiment(EXPERIMENT, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(EXPERIMENT)  # another process was quicker
            if found is None:
                raise
    return str(found.experiment_id)


@contextmanager
def lock(workspace: Workspace, name: str) -> Iterator[None]:
    """Only one process (or thread) at a time in this block; the lock of a killed process is free at once."""
    path = workspace.root / "mlflow" / f".{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _import_mlflow() -> None:
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise MissingExtraError("mlflow", extra="train", needed_for="tracking runs") from error
    # Migrations and system metrics announce themselves at INFO; people asked for our lines.
    for name in (mlflow.__name__, "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
