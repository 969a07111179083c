"""Where something comes from, in one record: version → bento → artifacts → data → code; and the record as a tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from couturier.components.errors import LineageError
from couturier.components.lineage.mlflow_store import mlflow_client
from couturier.components.lineage.registry import Registry, Version
from couturier.components.lineage.stages import ArtifactStore
from couturier.components.lineage.tracking import ARTIFACT, require_run, run_facts, run_of
from couturier.components.lineage.workspace import Workspace

_TABLES = ("events", "items", "pictures", "users")


def lineage(workspace: Workspace, what: str) -> dict[str, Any]:
    """Everything known of where ``what`` comes from: a version (number, ``latest``, ``champion``, ``challenger``), a
    bento tag, an MLflow run id or an artifact id.

    Returns:
        ``asked``; ``version``, ``verdicts``, ``moves`` (alias moves that concern it) and ``bento`` when it is or led to
        a version; ``run``; ``git_commit``; ``data`` (md5 and rows raw, kept, quarantined of each table); ``made_from``,
        a list of nested artifacts: id, stage, made_at, seconds, config, inputs. An artifact that occurs twice is
        written out the first time only.

    Raises:
        LineageError: nothing of that name is known.
    """
    registry, store = Registry(workspace), ArtifactStore(workspace)
    version = _version_named(registry, what)
    if version is not None:
        roots, run_id = [version.manifests["package"], version.manifests["evaluate"]], version.run_id
    elif _is_artifact(store, what):
        roots, run_id = [what], run_of(workspace, what) or ""
    else:
        roots, run_id = _roots_of_run(workspace, what), what
    seen: set[str] = set()
    record: dict[str, Any] = {
        "asked": what,
        "version": None if version is None else version.as_dict(),
        "verdicts": _verdicts(registry, version),
        "moves": _moves(registry, version),
        "bento": None if version is None else _facts(store, version.manifests["package"]) | {"tag": version.bento},
        "run": _run(workspace, run_id),
        "made_from": [_node(store, root, seen) for root in roots],
    }
    record["git_commit"] = version.git_commit if version else (record["run"] or {}).get("git_commit")
    record["data"] = _data(store, seen, version)
    return record


def as_text(record: dict[str, Any]) -> str:
    """The record as a tree in plain text."""
    version, lines = record["version"], list[tuple[int, str]]()
    if version is None:
        lines.append((0, str(record["asked"])))
    else:
        names = f" ({', '.join(version['aliases'])})" if version["aliases"] else ""
        lines.append((0, f"couturier version {version['number']}{names}, recipe {version['recipe']}"))
        lines.append((1, f"registered  {version['created_at']}"))
    for verdict in record["verdicts"]:
        lines.append((1, f"verdict     {verdict['decision']}, {verdict['at'][:19]}: {verdict['reasons'][0]}"))
    for move in record["moves"]:
        lines.append(
            (1, f"{move['action']:<11} {move['at'][:19]} by {move['who']}: {move['why'] or 'no reason given'}")
        )
    if record["bento"]:
        lines.append((1, f"bento       {record['bento']['tag']}"))
    if record["run"]:
        lines.append((1, f"run         {record['run']['run_id']} ({record['run']['name']}, {record['run']['status']})"))
    if record["git_commit"]:
        lines.append((1, f"code        {record['git_commit']}"))
    if record["data"]:
        lines.append((1, f"data        md5 {record['data']['md5']}"))
        for name, rows in record["data"]["tables"].items():
            counts = ", ".join(f"{count:,} {kind}" for kind, count in rows.items())
            lines.append((2, f"{name:<10} {counts}"))
    for node in record["made_from"]:
        lines += _node_lines(node, 1)
    return _tree(lines)


def as_mermaid(record: dict[str, Any]) -> str:
    """The record as a Mermaid flow chart, from data to version."""
    edges: set[tuple[str, str]] = set()
    labels: dict[str, str] = {}
    for node in _walk(record["made_from"]):
        stage, _, digest = node["id"].rpartition("-")
        labels[node["id"]] = f"{stage}<br/>{digest}"
        edges.update((inner["id"], node["id"]) for inner in node["inputs"].values())
    if record["data"]:
        labels["data"] = f"data<br/>md5 {record['data']['md5'][:16]}"
        edges.update(("data", node["id"]) for node in _walk(record["made_from"]) if node["stage"] == "validate")
    version = record["version"]
    if version is not None:
        name = f"version {version['number']}"
        labels["bento"], labels["version"] = version["bento"], " ".join([name, *version["aliases"]])
        edges |= {(version["manifests"]["package"], "bento"), ("bento", "version")}
        edges.add((version["manifests"]["evaluate"], "version"))
    lines = [f'    {key}["{labels[key]}"]' for key in sorted(labels)]
    lines += [f"    {start} --> {end}" for start, end in sorted(edges)]
    return "\n".join(["flowchart LR", *lines])


def _version_named(registry: Registry, what: str) -> Version | None:
    for version in registry.versions():
        if what in (version.bento, version.run_id):
            return version
    if what in ("latest", "champion", "challenger") or what.removeprefix("v").isdigit():
        return registry.version(what)
    return None


def _is_artifact(store: ArtifactStore, what: str) -> bool:
    return bool(what) and what.replace("-", "").replace("_", "").isalnum() and store.has(what)


def _roots_of_run(workspace: Workspace, run_id: str) -> list[str]:
    """The artifacts a run made or reused that no other of them was made from."""
    try:
        tags = require_run(mlflow_client(workspace), run_id).data.tags
    except LineageError as error:
        raise LineageError(
            f"{run_id!r} is no version, bento, run or artifact of {workspace.root}. `couturier models` lists versions, "
            "`couturier runs` lists runs."
        ) from error
    if ARTIFACT in tags:
        return [tags[ARTIFACT]]
    children = [child["artifact"] for child in run_facts(workspace, run_id)["children"] if child["artifact"]]
    ids = {*children, *(value for key, value in tags.items() if key.startswith("reused."))}
    store = ArtifactStore(workspace)
    used = {inner for key in ids if store.has(key) for inner in store.manifest(key)["inputs"].values()}
    return sorted(ids - used)


def _node(store: ArtifactStore, artifact_id: str, seen: set[str]) -> dict[str, Any]:
    first = artifact_id not in seen
    seen.add(artifact_id)
    stage = artifact_id.rpartition("-")[0]
    if not first or not store.has(artifact_id):
        return {
            "id": artifact_id,
            "stage": stage,
            "inputs": {},
            "above": not first,
            "absent": not store.has(artifact_id),
        }
    manifest = store.manifest(artifact_id)
    return {
        "id": artifact_id,
        "stage": manifest["stage"],
        "made_at": manifest["made_at"],
        "seconds": manifest["seconds"],
        "config": manifest["config"],
        "external": manifest["external"],
        "above": False,
        "absent": False,
        "inputs": {name: _node(store, key, seen) for name, key in sorted(manifest["inputs"].items())},
    }


def _walk(nodes: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for node in nodes:
        yield node
        yield from _walk(list(node["inputs"].values()))


def _node_lines(node: dict[str, Any], depth: int) -> list[tuple[int, str]]:
    words = node["id"]
    if node["above"]:
        words += "  (see above)"
    elif node["absent"]:
        words += "  (no longer here)"
    else:
        words += f"  {node['made_at'][:19]}, {node['seconds']:.1f} s"
    lines = [(depth, words)]
    for inner in node["inputs"].values():
        lines += _node_lines(inner, depth + 1)
    return lines


def _tree(lines: list[tuple[int, str]]) -> str:
    """Lines with depths, drawn with branches."""
    drawn: list[str] = []
    open_below: dict[int, bool] = {}
    for depth, words in reversed(lines):
        bars = "".join("│  " if open_below.get(level) else "   " for level in range(1, depth))
        corner = "" if depth == 0 else "├─ " if open_below.get(depth) else "└─ "
        drawn.append(f"{bars}{corner}{words}")
        open_below = {level: below for level, below in open_below.items() if level < depth} | {depth: True}
    return "\n".join(reversed(drawn))


def _verdicts(registry: Registry, version: Version | None) -> list[dict[str, Any]]:
    if version is None:
        return []
    return [
        {"at": entry.at, "who": entry.who, **entry.payload}
        for entry in registry.journal.history(("verdict",), version=version.number)
    ]


def _moves(registry: Registry, version: Version | None) -> list[dict[str, Any]]:
    if version is None:
        return []
    return [
        {"at": entry.at, "who": entry.who, "action": entry.payload["action"], "why": entry.payload["why"]}
        for entry in reversed(registry.journal.history(("alias_done",), version=version.number))
    ]


def _run(workspace: Workspace, run_id: str) -> dict[str, Any] | None:
    try:
        run = run_facts(workspace, run_id)
    except LineageError:
        return None  # MLflow's database was begun anew; the artifacts still say where they come from
    tags = run["tags"]
    return {
        **{name: run[name] for name in ("run_id", "name", "status")},
        "git_commit": tags.get("mlflow.source.git.commit"),
        "who": tags.get("couturier.who"),
    }


def _facts(store: ArtifactStore, artifact_id: str) -> dict[str, Any]:
    return dict(store.open(artifact_id).facts) if store.has(artifact_id) else {}


def _data(store: ArtifactStore, artifacts: set[str], version: Version | None) -> dict[str, Any] | None:
    """The md5 of ``data/`` and its rows, from the ``validate`` artifact all others go back to."""
    for key in sorted(artifacts):
        if not store.has(key) or "data" not in (external := store.manifest(key)["external"]):
            continue
        facts = _facts(store, key)
        tables = {
            name: {kind: facts[name][kind] for kind in ("raw", "kept", "quarantined")}
            for name in _TABLES
            if name in facts
        }
        return {"md5": external["data"], "tables": tables}
    return None if version is None else {"md5": version.data_md5, "tables": {}}
