"""What ``couturier explain`` tells: facts that agree with the judge, for any judge, and more for the multimodal one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.encoder import EncoderConfig, TileEncoder, embedded, pictures_of
from couturier.components.interest.fit import content_of
from couturier.components.interest.items import FeatureConfig
from couturier.components.interest.judge import JudgeSettings, make_judge
from couturier.components.interest.types import HistoryBatch
from couturier.components.runtime import global_seed
from couturier.flows.explain import Shown, explain, explained
from couturier.serving.bundle import History

from ..interest.conftest import planted_catalogue

KNOWN = History(items=(4, 1, 9), weights=(2.0, 1.0, 0.5), ages_days=(3.0, 40.0, 11.0), user_id="u")


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return planted_catalogue()


def judge_of(name: str, catalogue: Catalogue) -> ContentJudge:
    """Untrained, with a unit of its own."""
    with global_seed(0, name):
        eyes = TileEncoder(EncoderConfig(side=16, width=16, channels=8)).eval()
        content = content_of(catalogue, 64, embedded(eyes, pictures_of(catalogue)), eyes)
        judge = make_judge(name, JudgeSettings().settings_of(name), FeatureConfig(words=8), content).eval()
    judge.calibrate(torch.tensor([1.0, 2.0, 6.0]))
    return judge.requires_grad_(False)


def told(judge: ContentJudge, catalogue: Catalogue, known: History = KNOWN, **more: Any) -> dict[str, Any]:
    features_ID = judge.embed_items()
    shown = [Shown(facts={"item_id": catalogue.item_ids[row]}, features_D=features_ID[row]) for row in (0, 5)]
    found = explained(judge, catalogue, features_ID, known, shown, **{"top": 2, **more})
    return dict(json.loads(json.dumps(found)))


@pytest.mark.parametrize("name", ["attention", "muse", "multimodal"])
def test_contributions_are_the_judges_in_its_unit(name: str, catalogue: Catalogue) -> None:
    judge = judge_of(name, catalogue)
    found = told(judge, catalogue, top=3)
    assert found["judge"] == name and found["history"] == 3
    features_ID = judge.embed_items()
    rows = torch.tensor(KNOWN.items)
    history = HistoryBatch(
        features_ND=features_ID[rows],
        age_days_N=torch.tensor(KNOWN.ages_days),
        weight_N=torch.tensor(KNOWN.weights),
        offsets=torch.tensor([0, 3]),
    )
    shown = features_ID[[0, 5]][None]
    parts = judge.explain(history, shown)[0] / judge.calibration[1]
    scores = judge.standardise(judge.score(judge.encode(history), shown))[0]
    for place, candidate in enumerate(found["candidates"]):
        assert candidate["score"] == pytest.approx(float(scores[place]), abs=1e-3)
        said = {reason["item_id"]: reason["contribution"] for reason in candidate["because"]}
        wanted = {catalogue.item_ids[row]: float(parts[place, t]) for t, row in enumerate(KNOWN.items)}
        assert said == pytest.approx(wanted, abs=1e-3)
        sizes = [abs(reason["contribution"]) for reason in candidate["because"]]
        assert sizes == sorted(sizes, reverse=True)


def test_the_multimodal_judge_tells_of_modalities_and_of_how_the_interest_moved(catalogue: Catalogue) -> None:
    found = told(judge_of("multimodal", catalogue), catalogue)
    for candidate in found["candidates"]:
        assert set(candidate["modalities"]) == {"picture", "words"} and len(candidate["because"]) == 2
        assert sum(said["weight"] for said in candidate["modalities"].values()) == pytest.approx(1, abs=1e-3)
    trace = found["interest"]["trace"]
    assert found["interest"]["concept"] == "kind"
    assert [step["age_days"] for step in trace] == [40.0, 11.0, 3.0]
    assert [step["item_id"] for step in trace] == [catalogue.item_ids[row] for row in (1, 9, 4)]
    assert trace[0]["drift"] == 0 and trace[2]["drift"] > 0
    assert {step["nearest"] for step in trace} <= {f"kind{kind}" for kind in range(4)}
    assert 0 < sum(step["share"] for step in trace) <= 1


@pytest.mark.parametrize("name", ["attention", "multimodal"])
def test_a_stranger_has_a_score_and_no_reasons(name: str, catalogue: Catalogue) -> None:
    found = told(judge_of(name, catalogue), catalogue, History(items=(), weights=(), ages_days=()))
    assert found["history"] == 0 and all(candidate["because"] == [] for candidate in found["candidates"])


def test_an_unknown_concept_is_named(catalogue: Catalogue) -> None:
    with pytest.raises(ConfigError, match="'smell'; this catalogue's attributes are kind"):
        told(judge_of("multimodal", catalogue), catalogue, by="smell")


def test_a_number_out_of_range_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUTURIER_PROJECT", str(tmp_path))
    with pytest.raises(ConfigError, match="--top is 0"):
        explain(user="1", items="", n=1, seed=0, top=0, concept="", model="champion")
