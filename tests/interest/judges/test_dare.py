"""DARE: two tables that share nothing, TWIN when tied, a search that is exact, and the pull on a shared table."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge, ranking_loss
from couturier.components.interest.decoupling import gradient_paths
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.dare import DareConfig, DareJudge
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed

from ..worlds import dare as world
from ..worlds.base import Comparison

ITEMS, WIDTH = 12, 6
SMALL = DareConfig(attention=8, representation=8, time_width=4, times=10, top=4, hidden=10)


def made(config: DareConfig = SMALL, features: FeatureConfig | None = None) -> DareJudge:
    with global_seed(0, "dare"):
        content = Content.of_vectors(torch.randn(ITEMS, WIDTH))
        judge = DareJudge(config, features or FeatureConfig(words=0), content)
        for value in judge.parameters():
            value.data.mul_(2)
    return judge.eval()


def lived(judge: ContentJudge, *histories: list[int]) -> HistoryBatch:
    """Histories oldest first, two days apart."""
    items = torch.tensor([item for history in histories for item in history])
    ages = [2.0 * back for history in histories for back in range(len(history), 0, -1)]
    return HistoryBatch(
        features_ND=judge.embed_items()[items],
        age_days_N=torch.tensor(ages),
        weight_N=torch.ones(len(items)),
        offsets=torch.tensor([0, *(len(history) for history in histories)]).cumsum(0),
        items_N=items,
    )


LONG = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def batch_of(judge: DareJudge) -> TrainBatch:
    items_UC = torch.tensor([[1, 2, 3], [4, 5, 6]])
    shown_UCD = judge.embed_items()[items_UC]
    return TrainBatch(history=lived(judge, LONG, [3, 7]), items_UC=items_UC, candidates_UCD=shown_UCD, positives=1)


def scored(judge: ContentJudge, history: HistoryBatch) -> torch.Tensor:
    with torch.no_grad():
        return judge.score(judge.encode(history), judge.embed_items().expand(len(history), -1, -1))


def twin(judge: DareJudge, history: list[int], candidate: int) -> torch.Tensor:
    """TWIN written out for one candidate: one table, the best K by its score, softmax over them, the same network."""
    items_ID, config = judge.embed_items(), judge.config
    table_IE, times = items_ID @ judge.representation.weight.T, judge.representation_times.weight
    when = [min(back, config.times - 1) for back in range(len(history), 0, -1)]
    meaning = torch.stack([table_IE[item] @ table_IE[candidate] for item in history]) / config.representation**0.5
    moment = torch.stack([times[place] @ times[0] for place in when]) / config.time_width**0.5
    score = meaning + moment
    best = score.argsort(descending=True)[: config.top]
    weight = score[best].softmax(0)
    value = torch.stack([torch.cat([table_IE[history[place]], times[when[place]]]) for place in best.tolist()])
    found, shown = weight @ value, torch.cat([table_IE[candidate], times[0]])
    return judge.head(torch.cat([shown, found, found * shown]))[0]


def test_tied_is_twin() -> None:
    judge = made(replace(SMALL, tied=True))
    scores_C = scored(judge, lived(judge, LONG))[0]
    for candidate in range(ITEMS):
        torch.testing.assert_close(scores_C[candidate], twin(judge, LONG, candidate), rtol=1e-4, atol=1e-5)


def test_two_tables_of_equal_content_are_twin_and_of_other_content_are_not() -> None:
    tied, apart = made(replace(SMALL, tied=True)), made()
    history = lived(tied, LONG, [], [2, 2])
    assert (scored(apart, history) - scored(tied, history)).abs().max() > 1e-2
    for name in ("representation", "representation_times", "head"):
        getattr(apart, name).load_state_dict(getattr(tied, name).state_dict())
    apart.attention.load_state_dict(tied.representation.state_dict())
    apart.attention_times.load_state_dict(tied.representation_times.state_dict())
    torch.testing.assert_close(scored(apart, history), scored(tied, history), rtol=0, atol=0)


@pytest.mark.parametrize("features", [FeatureConfig(words=0), FeatureConfig(words=0, ids=6)], ids=["content", "ids"])
def test_the_tables_share_no_parameter(features: FeatureConfig) -> None:
    """A change of anything that attention reads leaves the values as they are, and the other way round."""
    judge = made(features=features)
    history = lived(judge, LONG)
    state = judge.encode(history)
    reads = dict(judge.named_parameters())
    attends = torch.autograd.grad(state.keys_NH.sum(), list(reads.values()), allow_unused=True, retain_graph=True)
    represents = torch.autograd.grad(state.values_NV.sum(), list(reads.values()), allow_unused=True)
    touched = 0
    for name, one, other in zip(reads, attends, represents, strict=True):
        if one is not None and other is not None:
            assert name == "items.identity.weight" and not bool(((one != 0) & (other != 0)).any())
        touched += one is not None or other is not None
    assert touched >= 4


def test_attention_does_not_teach_representation_when_what_it_found_is_fixed() -> None:
    """With h detached, the loss leaves the representation's table of behaviours alone: only the candidate reads it."""
    judge = made().train()
    batch = batch_of(judge)
    state = judge.encode(batch.history)
    query_UCH = judge._query(batch.candidates_UCD)
    fixed = replace(state, values_NV=torch.randn_like(state.values_NV))
    loss = judge._found(fixed, query_UCH).square().sum()
    loss.backward()
    assert judge.attention.weight.grad is not None and judge.attention.weight.grad.any()
    assert judge.representation.weight.grad is None and judge.representation_times.weight.grad is None


def test_the_search_finds_the_best_whatever_the_length() -> None:
    judge = made()
    history = lived(judge, LONG, [], [2, 2], [7])
    shown = judge.embed_items()[:3].expand(4, -1, -1)
    found_UCK = judge.search(history, shown)
    assert found_UCK.shape == (4, 3, 4)
    assert (found_UCK[1] == -1).all() and (found_UCK[3, :, 1:] == -1).all() and (found_UCK[3, :, 0] == 0).all()
    state, query_UCH = judge.encode(history), judge._query(shown)
    score_CT = query_UCH[0] @ state.keys_NH[: len(LONG)].T
    assert torch.equal(found_UCK[0], score_CT.topk(4).indices)
    assert judge.search(HistoryBatch.empty(users=2, width=WIDTH), shown[:2]).shape == (2, 3, 0)


def test_what_the_search_leaves_out_says_nothing() -> None:
    judge = made()
    history = lived(judge, LONG)
    shown = judge.embed_items()[:1][None]
    left_out = sorted(set(range(len(LONG))) - set(judge.search(history, shown)[0, 0].tolist()))
    parts_T = judge.explain(history, shown)[0, 0]
    assert (parts_T[left_out] == 0).all() and (parts_T != 0).sum() == judge.config.top


@pytest.mark.parametrize("top", [1, 3, 20])
def test_explain_agrees_with_leaving_the_item_out(top: int) -> None:
    judge = made(replace(SMALL, time="interval", top=top))
    history, shown = lived(judge, LONG, [3], [7, 2], []), judge.embed_items()[:5].expand(4, -1, -1)
    by_replay = ContentJudge.explain(judge, history, shown)
    torch.testing.assert_close(judge.explain(history, shown), by_replay, rtol=1e-3, atol=1e-4)


def test_searching_all_is_attending_to_all() -> None:
    judge = made(replace(SMALL, top=len(LONG)))
    history = lived(judge, LONG)
    whole = scored(judge, history)
    state, shown = judge.encode(history), judge.embed_items()[None]
    found, every = judge._found(state, judge._query(shown)), judge._all(state, judge._query(shown))
    torch.testing.assert_close(found, every, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(whole).all()


def test_the_auxiliary_head_reaches_behaviours_that_the_search_drops() -> None:
    """Without it, the score of a behaviour outside the best K gets no gradient at all."""
    for auxiliary in (0.0, 0.5):
        judge = made(replace(SMALL, top=2, auxiliary=auxiliary)).train()
        batch = batch_of(judge)
        features_ND = batch.history.features_ND.detach().requires_grad_(True)
        loss, parts = judge.loss(
            replace(batch, history=replace(batch.history, features_ND=features_ND)), torch.Generator()
        )
        (grad_ND,) = torch.autograd.grad(loss, features_ND)
        reached = int(grad_ND[: len(LONG)].any(1).sum())
        assert reached == len(LONG) if auxiliary else reached < len(LONG)
        assert ("auxiliary" in parts) == bool(auxiliary)


def test_the_loss_is_that_of_the_scores_served() -> None:
    judge = made(replace(SMALL, auxiliary=0.0))
    batch = batch_of(judge)
    served = judge.score(judge.encode(batch.history), batch.candidates_UCD)
    wanted, _ = ranking_loss(served, batch, judge.config.bce)
    torch.testing.assert_close(judge.loss(batch, torch.Generator())[0], wanted)


def test_attention_may_be_narrow_and_tied_tables_must_be_equally_wide() -> None:
    judge = made(replace(SMALL, attention=2))
    assert judge.encode(lived(judge, LONG)).keys_NH.shape == (len(LONG), 2 + 4)
    with pytest.raises(ConfigError, match="attention is 2 wide and representation 8"):
        replace(SMALL, attention=2, tied=True)


def test_what_a_tied_judge_keeps_is_one_table() -> None:
    tied = made(replace(SMALL, tied=True))
    assert not [name for name in tied.state_dict() if name.startswith("attention")]
    again = copy.deepcopy(tied)
    again.load_state_dict(tied.state_dict())
    assert F.mse_loss(scored(again, lived(tied, LONG)), scored(tied, lived(tied, LONG))) == 0


@pytest.fixture(scope="module")
def learned() -> DareJudge:
    """DARE after its fit in the planted world, shortened."""
    return world.fitted(world.DARE, seed=0, steps=120, rates=[1e-2])


def test_explain_names_the_behaviours_of_the_candidates_kind(learned: DareJudge) -> None:
    """Planted: only behaviours of the candidate's kind inform; of those, the ones of its colour speak for it."""
    people = world.proof(0)
    rows, shown = np.arange(200), world.features(people.kind_X[:200], people.colour_X[:200])[:, None]
    parts_UT = learned.explain(world.history_of(people, rows), shown)[:, 0].numpy()
    kind_UT = people.kind_XT[rows] == people.kind_X[rows, None]
    colour_UT = people.colour_XT[rows] == people.colour_X[rows, None]
    assert parts_UT[kind_UT & colour_UT].mean() > 0.02 > -0.02 > parts_UT[kind_UT & ~colour_UT].mean()
    assert np.abs(parts_UT[kind_UT]).mean() > 5 * np.abs(parts_UT[~kind_UT]).mean()


@pytest.mark.slow
def test_two_tables_find_what_informs_and_rank_better_than_one(tmp_path: Path) -> None:
    """DARE against TWIN: the search finds more of the mutual information, and the item taken ranks higher."""
    people, twin = world.proof(0), world.fitted(world.TWIN, seed=0)
    dare = world.fitted(world.DARE, seed=0)
    found, ranked = (
        Comparison(
            claim="", ours="", other="", figure="", ours_U=of(people, dare), other_U=of(people, twin)
        ).difference()
        for of in (world.retrieved, world.aucs)
    )
    assert found[1] > 0.1 and world.retrieved(people, dare).mean() > 0.95
    assert ranked[1] > 0.005 and world.aucs(people, dare).mean() > world.aucs(people, None).mean() - 0.015
    paths = gradient_paths(twin, world.Choices(people, 0).batch(twin, 0))
    assert paths.domination() > 2, "representation pulls the one table harder than attention"
