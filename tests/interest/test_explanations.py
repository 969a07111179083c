"""Why a picture is liked: an explanation names the planted cause and agrees with leaving the item out for real."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from couturier.components.interest.judge import load_judge
from couturier.components.interest.judges.attention import AttentionJudge
from couturier.components.interest.types import HistoryBatch

from .conftest import ITEMS, KINDS, Fitted


@pytest.fixture(scope="module")
def judge(fitted: Fitted) -> AttentionJudge:
    judge = load_judge(fitted.folder)
    assert isinstance(judge, AttentionJudge)
    return judge


def lived(judge: AttentionJudge, *histories: list[int]) -> HistoryBatch:
    items = torch.tensor([item for history in histories for item in history])
    return HistoryBatch(
        features_ND=judge.embed_items()[items],
        age_days_N=torch.full((len(items),), 5.0),
        weight_N=torch.ones(len(items)),
        offsets=torch.tensor([0, *(len(history) for history in histories)]).cumsum(0),
    )


def test_the_planted_cause_is_named(judge: AttentionJudge):
    """Whatever the candidate's colour, the one history item of that colour speaks for it most."""
    pictures = judge.embed_items(words=False)
    for kind in range(KINDS):
        history = [other if other != kind else kind + KINDS for other in range(KINDS)]
        shown = pictures[kind::KINDS][2:][None]  # items of this colour that the history lacks
        parts_UCT = judge.explain(lived(judge, history), shown)
        assert (parts_UCT[0].argmax(-1) == kind).all()
        assert (parts_UCT[0, :, kind] > 0).all()


def test_agrees_with_leaving_the_item_out(judge: AttentionJudge):
    batch = lived(judge, [0, 4, 9, 9], [3], [7, 2])
    shown = judge.embed_items(words=False)[:6].expand(3, -1, -1)
    state, parts = judge.encode(batch), judge.explain(batch, shown)
    whole = judge.score(state, shown)
    for t in range(4):
        real, bias, gates = state.real_UT.clone(), state.bias_UTH.clone(), state.gates_UTB.clone()
        real[:, t], bias[:, t + 1], gates[:, t] = False, -torch.inf, 0.0
        without = judge.score(dataclasses.replace(state, real_UT=real, bias_UTH=bias, gates_UTB=gates), shown)
        expected = (whole - without).masked_fill(~state.real_UT[:, t, None], 0.0)
        torch.testing.assert_close(parts[..., t], expected, rtol=1e-3, atol=1e-4)


def test_one_unit_is_one_sd_over_random_pairs(judge: AttentionJudge):
    everyone = [[k, k + KINDS, k + 2 * KINDS] for k in range(KINDS)]
    shown = judge.embed_items(words=False).expand(KINDS, -1, -1)
    scores = judge.standardise(judge.score(judge.encode(lived(judge, *everyone)), shown))
    assert abs(float(scores.mean())) < 0.5 and 0.6 < float(scores.std()) < 1.5
    own = torch.arange(ITEMS) % KINDS == torch.arange(KINDS)[:, None]
    assert scores[own].min() > scores[~own].max(), "each person's colour stands above the others"
