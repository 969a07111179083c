"""The bento of a registered version, found, loaded or served."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from couturier.components.errors import LineageError
from couturier.components.files import read_json
from couturier.components.lineage.registry import Registry, Version
from couturier.components.lineage.stages import ArtifactStore
from couturier.components.lineage.workspace import Workspace
from couturier.components.ports import free_port, is_free, wanted_port
from couturier.serving.client import ServedBento, serve_bento

PORT = 3000


def version_in_use(workspace: Workspace, model: str) -> Version:
    """The registered version that people mean.

    Raises:
        LineageError: there is none; the sentence says how to get one.
    """
    registry = Registry(workspace)
    if model == "champion" and registry.champion() is None:
        there = registry.versions()
        way = f"`couturier promote {there[0].number}`, or name one with --model" if there else "`couturier retrain`"
        raise LineageError(f"there is no champion in {workspace.root} yet; make one with {way}.")
    return registry.version(model)


def bundle_folder(workspace: Workspace, version: Version) -> Path:
    """The folder inside the version's bento that ``Bundle.load`` reads.

    Raises:
        LineageError: the package artifact or the bento is gone.
    """
    facts = read_json(ArtifactStore(workspace).open(version.manifests["package"]).path / "bento.json")
    folder = workspace.root / facts["path"] / "src" / "model"
    if not folder.is_dir():
        raise LineageError(f"bento {version.bento} is not in {workspace.bentos}. `couturier retrain` makes it again.")
    return folder


def chosen_port(port: int, usual: int, *, option: str, purpose: str) -> int:
    """The port asked for; or, where none was, the usual one if it is free, else any free one.

    Raises:
        CouturierError: the port asked for is in use.
    """
    if port:
        return wanted_port(port, option=option, purpose=purpose)
    return usual if is_free(usual) else free_port()


def model_service(workspace: Workspace, version: Version, port: int) -> AbstractContextManager[ServedBento]:
    """The version's bento on loopback for the time of a ``with`` block."""
    return serve_bento(
        version.bento,
        port,
        bentoml_home=workspace.bentos,
        feedback=workspace.feedback,
        log=workspace.root / "logs" / "service.log",
        registered={
            "model": "couturier",
            "version": version.number,
            "run_id": version.run_id,
            "alias": next(iter(version.aliases), None),
        },
    )
