"""HCN: levels that read what is left, interests as arrows, an item tower that knows nobody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.hcn import HcnConfig, HcnJudge, label_aware, redundancy
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed

from ..worlds import hcn as world
from ..worlds.base import planted_log

ITEMS, WIDTH = 12, 6
SMALL = HcnConfig(embedding=8, short=3, times=16)


def made(config: HcnConfig = SMALL) -> HcnJudge:
    with global_seed(0, "hcn"):
        judge = HcnJudge(config, FeatureConfig(words=0), Content.of_vectors(torch.randn(ITEMS, WIDTH)))
        torch.nn.init.normal_(judge.pull.weight, std=0.2)
    return judge.eval()


def lived(judge: ContentJudge, *histories: list[int]) -> HistoryBatch:
    """Histories oldest first, two days apart."""
    items = torch.tensor([item for history in histories for item in history], dtype=torch.int64)
    ages = [2.0 * back for history in histories for back in range(len(history), 0, -1)]
    return HistoryBatch(
        features_ND=judge.embed_items()[items],
        age_days_N=torch.tensor(ages),
        weight_N=torch.ones(len(items)),
        offsets=torch.tensor([0, *(len(history) for history in histories)]).cumsum(0),
        items_N=items,
    )


def batch_of(judge: HcnJudge, pool: list[int] | None = None) -> TrainBatch:
    items_UC = torch.tensor([[1, 2, 3, 4], [2, 5, 6, -1]])
    return TrainBatch(
        history=lived(judge, [0, 4, 9, 8], [3]),
        items_UC=items_UC,
        candidates_UCD=judge.embed_items()[items_UC.clamp_min(0)],
        positives=2,
        pool_S=None if pool is None else torch.tensor(pool),
        pool_log_q_S=None if pool is None else torch.full((len(pool),), 0.7),
    )


def test_a_catalogue_is_one_product_and_items_know_no_user() -> None:
    judge = made()
    history, items_ID = lived(judge, [0, 4, 9], [], [3]), judge.embed_items()
    state = judge.encode(history)
    everything = judge.score(state, items_ID.expand(3, -1, -1))
    torch.testing.assert_close(judge.score_all(state, items_ID), everything, rtol=1e-4, atol=1e-5)
    tower_IE, worth_I = judge.item_tower(items_ID), judge.worth(items_ID)[:, 0]
    best_UI = (state.interests_UKE @ tower_IE.T).amax(1)
    torch.testing.assert_close(everything, judge.scale.exp() * best_UI + worth_I, rtol=1e-4, atol=1e-5)


def test_an_item_far_from_every_interest_cannot_pull_another_down() -> None:
    """The score is the best interest's: an interest more can only add to it."""
    judge = made()
    state, shown = judge.encode(lived(judge, [0, 4, 9])), judge.embed_items()[None]
    fewer = replace(state, interests_UKE=state.interests_UKE[:, :-1])
    assert (judge.score(state, shown) >= judge.score(fewer, shown)).all()


def test_nobody_has_the_learned_interests() -> None:
    judge = made()
    one, other, known = judge.interests(lived(judge, [], [], [3]))
    assert torch.equal(one, other) and (one - known).abs().max() > 1e-2
    assert one.shape == (4, 8) and one.any(1).all()


def test_the_second_level_reads_what_the_first_left() -> None:
    """One behaviour, one centre: its part along the centre is gone, and little of it is left."""
    judge = made(replace(SMALL, centres=1)).requires_grad_(False)
    judge.pull.weight.zero_()
    first, second = judge._route(lived(judge, [5]))
    centre_E = judge._centre(0, first.sums().vector_MXJE)[0, 0, 0]
    rest_E = second.rest_MUTE[0, 0, 0]
    assert abs(float(rest_E @ centre_E)) < 1e-6
    assert rest_E.norm() < 0.2 * first.rest_MUTE[0, 0, 0].norm()


def test_all_of_a_behaviour_goes_to_the_centres_of_a_level() -> None:
    judge = made()
    judge.pull.weight.data.zero_()
    history = replace(lived(judge, [0, 1, 2, 3, 4]), weight_N=torch.tensor([1.0, 2.0, 1.0, 0.5, 3.0]))
    for level in judge._route(history):
        long_T, short_T = level.given_MUTJ.sum(-1)[:, 0]
        torch.testing.assert_close(long_T, history.weight_N)
        torch.testing.assert_close(short_T, history.weight_N * torch.tensor([0, 0, 1, 1, 1]))


def test_a_weight_is_how_often() -> None:
    judge = made(replace(SMALL, short=9))
    once = lived(judge, [4, 1])
    heavy = replace(once, weight_N=torch.tensor([3.0, 1.0]))
    thrice = once.rows(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 4]))
    torch.testing.assert_close(judge.interests(heavy), judge.interests(thrice), rtol=1e-4, atol=1e-5)


def test_a_sharp_focus_is_the_serving_rule_and_none_is_the_mean() -> None:
    random = torch.Generator().manual_seed(0)
    interests = torch.randn(2, 3, 5, generator=random)
    target = F.normalize(torch.randn(2, 4, 5, generator=random), dim=-1)
    best_UP = (target @ interests.transpose(1, 2)).amax(-1)
    torch.testing.assert_close((label_aware(interests, target, 1e5) * target).sum(-1), best_UP)
    torch.testing.assert_close(label_aware(interests, target, 0.0), interests.mean(1, keepdim=True).expand(-1, 4, -1))


def test_redundancy_is_nothing_for_a_right_angle_and_all_pairs_for_one_direction() -> None:
    assert redundancy(3 * torch.eye(4)[None]) == 0
    torch.testing.assert_close(redundancy(torch.ones(2, 3, 4)), torch.tensor(6.0))


def test_the_softmax_counts_the_negatives_that_it_should() -> None:
    """Without a pool: a user's own negatives and what others took and this user did not; missing ones never."""
    judge = made()
    batch = batch_of(judge)
    aware_UPE = judge.item_tower(batch.candidates_UCD[:, :2])
    logits_UPS = judge._negatives(batch, aware_UPE)
    # own negatives 3, 4 (user 0) and 6, missing (user 1); then what the batch took: 1, 2, 2, 5
    counted = torch.isfinite(logits_UPS)
    assert counted[0, 0].tolist() == [True, True, False, False, False, True]
    assert counted[1, 0].tolist() == [True, False, True, False, False, False]


def test_a_pool_is_corrected_for_how_often_it_is_drawn() -> None:
    judge = made()
    batch = batch_of(judge, pool=[2, 7, 7])
    aware_UPE = judge.item_tower(batch.candidates_UCD[:, :2])
    logits_UPS = judge._negatives(batch, aware_UPE)
    plain = judge.scale.exp() * aware_UPE @ judge.item_tower(judge.embed_items()[[7]]).T + judge.worth(
        judge.embed_items()[[7]]
    )
    assert logits_UPS.shape == (2, 2, 3) and torch.isinf(logits_UPS[..., 0]).all()
    torch.testing.assert_close(logits_UPS[..., 1:], (plain - 0.7).expand(-1, -1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", [None, [2, 7, 8]])
def test_everything_learns(pool: list[int] | None) -> None:
    judge = made().train()
    loss, parts = judge.loss(batch_of(judge, pool), torch.Generator())
    loss.backward()
    assert torch.isfinite(loss) and set(parts) == {"softmax", "bce", "redundancy"}
    for name, value in judge.named_parameters():
        assert value.grad is not None and bool(torch.isfinite(value.grad).all()), name
        assert bool(value.grad.any()), name


def test_the_penalty_alone_drives_interests_apart() -> None:
    judge = made().train()
    optimiser = torch.optim.SGD(judge.parameters(), lr=0.05)
    history = lived(judge, [0, 4, 9, 8], [3, 3, 1])
    before = float(redundancy(judge.interests(history)).detach())
    for _ in range(40):
        loss = redundancy(judge.interests(history))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.7 * before


def test_the_only_item_explains_all_that_is_not_the_default() -> None:
    judge = made()
    shown = judge.embed_items()[:5].expand(2, -1, -1)
    history = lived(judge, [5], [])
    scores = judge.score(judge.encode(history), shown)
    parts = judge.explain(history, shown)
    torch.testing.assert_close(parts[0, :, 0], scores[0] - scores[1], rtol=1e-4, atol=1e-5)
    assert (parts[1] == 0).all()


def test_explain_is_the_score_without_what_the_item_gave() -> None:
    """Written out for one item: its share of every centre, in both memories, is taken away."""
    judge = made()
    history, shown = lived(judge, [0, 4, 9, 8, 2]), judge.embed_items()[:5][None]
    left_out = 3
    levels = judge._route(history)
    for level in levels:
        level.given_MUTJ[:, :, left_out] = 0
    interests = judge._co_interest([level.sums() for level in levels])
    state = judge.encode(history)
    wanted = judge.score(state, shown) - judge.score(replace(state, interests_UKE=interests), shown)
    torch.testing.assert_close(judge.explain(history, shown)[..., left_out], wanted, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[world.World, HcnJudge]:
    """A hierarchy after its fit in the planted world of topics, shortened."""
    planted = world.plant(0)
    log = planted_log(tmp_path_factory.mktemp("topics"), planted.taken_UT.tolist(), len(planted.vectors_IP))
    return planted, world.fitted(planted, log, world.HIERARCHY, seed=0, steps=80, rates=[1e-2])


def test_explain_names_what_is_of_the_candidates_topic(planted: tuple[world.World, HcnJudge]) -> None:
    """What was taken of the candidate's topic speaks for it; what shares its interest and is not of it, against it."""
    topics, judge = planted
    history = world.history_of(topics)
    liked_U = topics.likes_U3[:, 0]
    shown_U1D = topics.vectors_IP[torch.from_numpy(liked_U * world.EACH)][:, None]
    parts_UT = judge.explain(history, shown_U1D)[:, 0].numpy()
    same_UT = topics.topic_I[topics.taken_UT[:, :-1]] == liked_U[:, None]
    assert parts_UT[same_UT].mean() > 0.05 and parts_UT[~same_UT].mean() < 0.01
    told = [parts[same].sum() > parts[~same].sum() for parts, same in zip(parts_UT, same_UT, strict=True)]
    assert np.mean(told) > 0.9


def test_interests_cover_the_planted_topics(planted: tuple[world.World, HcnJudge]) -> None:
    topics, judge = planted
    assert world.coverage(topics, judge).mean() > 0.8  # by chance 3 of 16


@pytest.mark.slow
def test_a_hierarchy_repeats_itself_less_than_single_layer_routing(tmp_path: Path) -> None:
    """At equal numbers of interests, and it still covers what people like and ranks as well."""
    topics, ours, other = world.both(0, tmp_path)
    gap_U = world.sameness(topics, other) - world.sameness(topics, ours)
    assert gap_U.mean() - 1.96 * gap_U.std() / len(gap_U) ** 0.5 > 0.02
    assert world.coverage(topics, ours).mean() > 0.9
    best, found, single = (world.aucs(topics, judge).mean() for judge in (None, ours, other))
    assert found > best - 0.03 and found > single - 0.01
