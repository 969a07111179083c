"""``couturier explain``: why a registered model's judge would show a person an item, or the next picture it draws.

Letters: C candidates, T history length, D feature width, M modalities, I catalogue items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.judge import load_judge
from couturier.components.interest.judges.multimodal import MultimodalJudge, Reasons
from couturier.components.interest.types import HistoryBatch
from couturier.components.lineage.workspace import Workspace
from couturier.components.runtime import threads
from couturier.flows.service import bundle_folder, version_in_use
from couturier.serving.bundle import Bundle, History
from couturier.serving.sampling import Sampling

_MOST_CONCEPTS = 2000


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is explained: ``facts`` name it, ``features_D`` are the judge's."""

    facts: dict[str, Any]
    features_D: Tensor


def explain(*, user: str, items: str, n: int, seed: int, top: int, concept: str, model: str) -> dict[str, Any]:
    """Why items (ids with commas), or ``n`` pictures that the model draws next, would be shown to a user.

    Returns:
        What ``couturier explain --json`` prints.

    Raises:
        ConfigError: an unknown item or concept, or a number out of range.
        UnknownUserError: the model knows no such user.
        LineageError: there is no such model.
    """
    if top < 1:
        raise ConfigError(f"--top is {top}; it must be at least 1.")
    workspace = Workspace.find()
    version = version_in_use(workspace, model)
    folder = bundle_folder(workspace, version)
    bundle, judge = Bundle.load(folder), load_judge(folder / "judge")
    known = bundle.history_of(user)
    wanted = [part.strip() for part in items.split(",") if part.strip()]
    shown = _items(bundle, wanted) if wanted else _drawn(bundle, known, Sampling(n=n, seed=seed))
    with threads(1):
        found = explained(judge, bundle.catalogue, bundle.item_features_ID, known, shown, top=top, by=concept)
    return {
        "user": user,
        "model": {"name": "couturier", "version": version.number, "alias": next(iter(version.aliases), None)},
        **found,
    }


def _items(bundle: Bundle, ids: Sequence[str]) -> list[Shown]:
    rows, titles = bundle.indices(ids, "--items"), bundle.catalogue.items["title"].to_list()
    return [
        Shown(facts={"item_id": item_id, "title": titles[row]}, features_D=bundle.item_features_ID[row])
        for item_id, row in zip(ids, rows, strict=True)
    ]


def _drawn(bundle: Bundle, known: History, sampling: Sampling) -> list[Shown]:
    """The next pictures, as ``couturier generate`` draws them with the same seed."""
    drawn = bundle.generate([known], sampling)[0]
    rgb_NHWC = torch.from_numpy(np.stack([picture.rgb_HWC for picture in drawn]))
    features_ND = bundle.judge.embed_pictures(rgb_NHWC.permute(0, 3, 1, 2).float() / 255)
    titles, ids = bundle.catalogue.items["title"].to_list(), bundle.catalogue.item_ids
    facts = [
        {"picture": picture.id, "nearest": {"item_id": ids[picture.nearest], "title": titles[picture.nearest]}}
        for picture in drawn
    ]
    return [Shown(facts=fact, features_D=row) for fact, row in zip(facts, features_ND, strict=True)]


@torch.no_grad()
def explained(
    judge: ContentJudge,
    catalogue: Catalogue,
    item_features_ID: Tensor,
    known: History,
    shown: Sequence[Shown],
    *,
    top: int,
    by: str = "",
) -> dict[str, Any]:
    """Scores, in SDs over random pairs, and what of a history speaks for them; more where the judge is multimodal.

    Args:
        top: how many history items to name for each candidate, those that say most first.
        by: the attribute whose values name where an interest stands; empty for the catalogue's first.

    Raises:
        ConfigError: the catalogue has no such attribute.
    """
    rows = torch.tensor(known.items, dtype=torch.int64)
    history = HistoryBatch(
        features_ND=item_features_ID[rows],
        age_days_N=torch.tensor(known.ages_days),
        weight_N=torch.tensor(known.weights),
        offsets=torch.tensor([0, len(rows)]),
        items_N=rows,
    )
    candidates_1CD = torch.stack([one.features_D for one in shown])[None]
    scores_C = judge.standardise(judge.score(judge.encode(history), candidates_1CD))[0]
    parts_CT = _scaled(judge, judge.explain(history, candidates_1CD)[0])
    ids, titles = catalogue.item_ids, catalogue.items["title"].to_list()
    named = [{"item_id": ids[row], "title": titles[row]} for row in known.items]
    candidates = []
    for one, score, parts_T in zip(shown, scores_C.tolist(), parts_CT, strict=True):
        order = parts_T.abs().argsort(descending=True, stable=True)[:top].tolist()
        because = [
            {**named[t], "contribution": round(float(parts_T[t]), 4), "age_days": round(known.ages_days[t], 2)}
            for t in order
        ]
        candidates.append({**one.facts, "score": round(score, 4), "because": because})
    found: dict[str, Any] = {"judge": judge.name, "history": len(rows), "candidates": candidates}
    if isinstance(judge, MultimodalJudge):
        reasons = judge.reasons(history, candidates_1CD)
        _add_modalities(judge, reasons, candidates)
        found["interest"] = _interest(judge, catalogue, history, reasons.behaviour_UT[0], named, by)
    return found


def _scaled(judge: ContentJudge, parts: Tensor) -> Tensor:
    """Differences of logits in the judge's unit."""
    return judge.standardise(parts) - judge.standardise(torch.zeros_like(parts))


def _add_modalities(judge: ContentJudge, reasons: Reasons, candidates: list[dict[str, Any]]) -> None:
    """Add to each candidate the weight of its modalities, and what each of them adds to the score."""
    without_CM = _scaled(judge, reasons.without_UCM[0]).tolist()
    weights_CM = reasons.candidate_weight_UCM[0].tolist()
    for candidate, weights, without in zip(candidates, weights_CM, without_CM, strict=True):
        candidate["modalities"] = {
            name: {"weight": round(weight, 4), "adds": round(adds, 4)}
            for name, weight, adds in zip(reasons.names, weights, without, strict=True)
        }


def _interest(
    judge: MultimodalJudge,
    catalogue: Catalogue,
    history: HistoryBatch,
    share_T: Tensor,
    named: list[dict[str, str]],
    by: str,
) -> dict[str, Any]:
    """How the interest moved, oldest behaviour first, and the share of each behaviour in it."""
    concepts = _concepts(judge, catalogue, by)
    trace = judge.interest_trace(history, concepts)
    steps = [
        {
            **named[row],
            "age_days": round(float(history.age_days_N[row]), 2),
            "share": round(float(share_T[row]), 4),
            "drift": round(float(trace.drift_UT[0, place]), 4),
            "nearest": trace.label(0, place),
        }
        for place, row in enumerate(trace.row_UT[0].tolist())
    ]
    return {"concept": by or next(iter(catalogue.attributes), None), "trace": steps}


def _concepts(judge: MultimodalJudge, catalogue: Catalogue, by: str) -> dict[str, Tensor]:
    """For each value of an attribute the features of its items, as drawn pictures."""
    if by and by not in catalogue.attributes:
        raise ConfigError(
            f"--concept is {by!r}; this catalogue's attributes are {', '.join(catalogue.attributes) or 'none'}."
        )
    if not catalogue.attributes:
        return {}
    values = catalogue.items[by or catalogue.attributes[0]].fill_null("").to_numpy()
    pictures_ID = judge.embed_items(words=False)
    common, counts = np.unique(values, return_counts=True)
    kept = common[np.argsort(-counts, kind="stable")][:_MOST_CONCEPTS]
    return {str(value): pictures_ID[torch.from_numpy(np.flatnonzero(values == value))] for value in kept}
