"""Where state lives: one folder, found once, so that nothing is written anywhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """The folders of one project.

    Args:
        project: the folder that holds ``data/`` and ``data.dvc``.
        root: the folder that holds everything else that a run writes (default ``<project>/.couturier``).

    Example:
        >>> ws = Workspace(project=Path("/p"), root=Path("/p/.couturier"))
        >>> ws.artifacts.name, ws.data.name
        ('artifacts', 'data')
    """

    project: Path
    root: Path

    @classmethod
    def find(cls) -> Workspace:
        """The workspace of this process: ``COUTURIER_PROJECT`` (default: the current folder or the nearest parent
        that holds ``data.dvc`` or ``.git``) and ``COUTURIER_WORKSPACE`` (default ``<project>/.couturier``)."""
        named = os.environ.get("COUTURIER_PROJECT")
        project = Path(named).resolve() if named else _nearest_project(Path.cwd())
        root = os.environ.get("COUTURIER_WORKSPACE")
        return cls(project=project, root=Path(root).resolve() if root else project / ".couturier")

    @property
    def data(self) -> Path:
        return self.project / "data"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def scratch(self) -> Path:
        """Checkpoints of stages that are under way; emptied when the stage is done."""
        return self.root / "scratch"

    @property
    def journal(self) -> Path:
        return self.root / "journal.sqlite"

    @property
    def mlflow_db(self) -> Path:
        return self.root / "mlflow" / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.root / "mlflow" / "artifacts"

    @property
    def prefect_home(self) -> Path:
        return self.root / "prefect"

    @property
    def bentos(self) -> Path:
        return self.root / "bentoml"

    @property
    def feedback(self) -> Path:
        """Events that served pictures earned, appended by the service."""
        return self.root / "feedback"

    @property
    def runs(self) -> Path:
        """One JSON file a retraining run: what ``couturier runs`` lists."""
        return self.root / "runs"


def _nearest_project(start: Path) -> Path:
    for folder in (start, *start.parents):
        if (folder / "data.dvc").exists() or (folder / ".git").exists():
            return folder
    return start
