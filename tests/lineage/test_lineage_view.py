from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from couturier.components.errors import LineageError
from couturier.components.lineage.lineage_view import as_mermaid, as_text, lineage
from couturier.components.lineage.registry import Registered, Registry
from couturier.components.lineage.stages import ArtifactStore
from couturier.components.lineage.tracking import open_run
from couturier.components.lineage.workspace import Workspace


def test_a_version_leads_back_to_its_data(workspace: Workspace, register: Callable[..., Registered]) -> None:
    with open_run(workspace, name="retrain-smoke", who="ada") as flow:
        version = register(workspace, 1, run_id=flow.run_id).version
    Registry(workspace).promote(1, who="bob", why="first", force=True)
    for what in ("champion", "latest", "1", "v1", "couturier:1", flow.run_id):
        record = json.loads(json.dumps(lineage(workspace, what)))
        assert record["version"]["number"] == 1 and record["data"]["md5"] == "d41d8"
        assert record["run"]["name"] == "retrain-smoke" and record["run"]["who"] == "ada"
        assert [(move["action"], move["who"]) for move in record["moves"]] == [("register", "ada"), ("promote", "bob")]
    ids = set(re.findall(r"\w+-[0-9a-f]{16}", json.dumps(record["made_from"])))
    assert ids == set(version.manifests.values())
    text = as_text(lineage(workspace, "champion"))
    assert text.splitlines()[0] == "couturier version 1 (champion), recipe smoke"
    assert "by bob: first" in text and "md5 d41d8" in text and text.count(f"{version.manifests['validate']}  2") == 1
    assert "(see above)" in text and "└─ " in text


def test_an_artifact_leads_back_to_its_data(workspace: Workspace, make_chain: Callable[..., dict[str, str]]) -> None:
    ids = make_chain(workspace, 1)
    record = lineage(workspace, ids["sft"])
    assert record["version"] is None and record["run"] is None and record["data"]["md5"] == "d41d8"
    assert set(record["made_from"][0]["inputs"]) == {"sequences", "tokenise"}
    assert as_text(record).splitlines()[0] == ids["sft"]


def test_the_chart_has_every_artifact_once(workspace: Workspace, register: Callable[..., Registered]) -> None:
    version = register(workspace, 1).version
    chart = as_mermaid(lineage(workspace, "1"))
    assert chart.startswith("flowchart LR\n") and 'version["version 1 challenger"]' in chart
    for key in version.manifests.values():
        assert chart.count(f'    {key}["') == 1
    assert f"    data --> {version.manifests['validate']}" in chart and "    bento --> version" in chart


def test_an_artifact_that_is_gone_is_said_so(workspace: Workspace, register: Callable[..., Registered]) -> None:
    version = register(workspace, 1).version
    folder = ArtifactStore(workspace).open(version.manifests["judge"]).path
    (folder / "manifest.json").unlink()
    record = lineage(workspace, "1")
    assert f"{version.manifests['judge']}  (no longer here)" in as_text(record)
    assert record["data"]["md5"] == "d41d8"


def test_what_is_not_known_is_said_so(workspace: Workspace) -> None:
    with pytest.raises(LineageError, match="no version, bento, run or artifact"):
        lineage(workspace, "nonsense")
    with pytest.raises(LineageError, match="couturier retrain"):
        lineage(workspace, "champion")
