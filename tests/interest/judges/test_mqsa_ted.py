"""MQSA-TED: two kinds of query over the same keys, exact losses, and a teacher that counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.held_out import HeldOut
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.mqsa_ted import MqsaTedConfig, MqsaTedJudge, newest_mean, teacher
from couturier.components.interest.log_fit import LogFitConfig, fit_log
from couturier.components.interest.transitions import Transitions
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed, seeded

from ..worlds import mqsa_ted as world
from ..worlds.base import planted_log

ITEMS, WIDTH = 12, 6
SMALL = MqsaTedConfig(width=8, length=6, dropout=0.0)


def judge_of(config: MqsaTedConfig = SMALL) -> MqsaTedJudge:
    with global_seed(0, "test"):
        judge = MqsaTedJudge(config, FeatureConfig(words=0), Content.of_vectors(torch.randn(ITEMS, WIDTH))).eval()
    random = np.random.default_rng(0)
    judge.transitions = Transitions.counted(
        [(random.integers(6, size=30), random.integers(ITEMS, size=30))], items=ITEMS
    )
    return judge


def history_of(judge: MqsaTedJudge, lists: list[list[int]], weight: float = 1.0) -> HistoryBatch:
    items = torch.tensor([item for taken in lists for item in taken], dtype=torch.int64)
    return HistoryBatch(
        features_ND=judge.embed_items()[items].detach(),
        age_days_N=torch.cat([torch.arange(len(taken), 0, -1.0) for taken in lists]),
        weight_N=torch.full((len(items),), weight),
        offsets=torch.tensor([0, *np.cumsum([len(taken) for taken in lists])]),
        items_N=items,
        in_time_order=True,
    )


def batch_of(judge: MqsaTedJudge, lists: list[list[int]], items: list[list[int]], positives: int = 1) -> TrainBatch:
    items_UC = torch.tensor(items)
    return TrainBatch(
        history=history_of(judge, lists),
        items_UC=items_UC,
        candidates_UCD=judge.embed_items()[items_UC.clamp_min(0)],
        positives=positives,
    )


def shown(judge: MqsaTedJudge, users: int) -> torch.Tensor:
    return judge.embed_items().expand(users, -1, -1)


def test_the_long_query_is_the_mean_of_what_there_is() -> None:
    x = torch.randn(2, 7, 3)
    for count in (1, 3, 7, 20):
        wanted = torch.stack([x[:, max(0, t - count + 1) : t + 1].mean(1) for t in range(7)], dim=1)
        torch.testing.assert_close(newest_mean(x, count), wanted)


def test_with_a_mean_of_one_and_tied_weights_alpha_means_nothing() -> None:
    scores = []
    for alpha in (0.0, 0.3, 1.0):
        judge = judge_of(replace(SMALL, long=1, alpha=alpha))
        judge.long.load_state_dict(judge.short.state_dict())
        scores.append(judge.score(judge.encode(history_of(judge, [[1, 2, 3], [4]])), shown(judge, 2)))
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])
    other = judge_of(replace(SMALL, long=3, alpha=0.3))
    other.long.load_state_dict(other.short.state_dict())
    found = other.score(other.encode(history_of(other, [[1, 2, 3], [4]])), shown(other, 2))
    torch.testing.assert_close(found[1], scores[0][1])  # a history of one is its own mean
    assert not torch.allclose(found[0], scores[0][0], atol=1e-3)


def test_logits_are_the_shares_of_both_branches() -> None:
    whole = []
    for alpha in (1.0, 0.0, 0.25):
        judge = judge_of(replace(SMALL, alpha=alpha))
        judge.nothing.data.zero_()
        whole.append(judge.score(judge.encode(history_of(judge, [[1, 2, 3]])), shown(judge, 1)))
    torch.testing.assert_close(whole[2], 0.25 * whole[0] + 0.75 * whole[1])


def test_what_comes_later_changes_no_earlier_state() -> None:
    judge = judge_of()
    one, two = (history_of(judge, [[1, 2, 3, item, 5]]) for item in (4, 9))
    states = [judge._states(h, judge.tower(h.features_ND), _nothing_dropped()) for h in (one, two)]
    assert torch.equal(states[0][:, :3], states[1][:, :3]) and not torch.equal(states[0][:, 3:], states[1][:, 3:])


def _nothing_dropped():
    from couturier.components.interest.judges.mqsa_ted import _Drop

    return _Drop(0.0, None)


def test_one_product_ranks_the_catalogue_and_a_weight_of_one_is_a_plain_event() -> None:
    judge = judge_of()
    judge.amount.data.copy_(torch.randn(8))
    state = judge.encode(history_of(judge, [[1, 2, 3], [], [7] * 9]))
    torch.testing.assert_close(judge.score_all(state, judge.embed_items()), judge.score(state, shown(judge, 3)))
    heavy = judge.encode(history_of(judge, [[1, 2, 3], [], [7] * 9], weight=3.0))
    assert not torch.allclose(heavy.state_UW[0], state.state_UW[0])
    judge.amount.data.zero_()
    again = judge.encode(history_of(judge, [[1, 2, 3], [], [7] * 9], weight=3.0))
    plain = judge.encode(history_of(judge, [[1, 2, 3], [], [7] * 9]))
    torch.testing.assert_close(again.state_UW, plain.state_UW)


def test_a_teacher_row_sums_to_one_and_is_uniform_without_transitions() -> None:
    counts = torch.tensor([[0.0, 4.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    rows = teacher(counts, 0.1)
    torch.testing.assert_close(rows.sum(1), torch.ones(2))
    torch.testing.assert_close(rows[1], torch.full((4,), 0.25))
    wanted = torch.tensor([0.0, 10.0, 5.0, 0.0]).exp()
    torch.testing.assert_close(rows[0], wanted / wanted.sum())
    part = teacher(counts, 0.1, torch.tensor([2, 3]))
    torch.testing.assert_close(part[0], wanted[2:] / wanted[2:].sum())  # the peak is the whole row's


def test_the_loss_is_cross_entropy_at_every_place_and_the_distillation() -> None:
    judge = judge_of()
    lists, items = [[1, 2, 3], [4, 5]], [[6, 0], [7, 1]]
    batch = batch_of(judge, lists, items)
    items_IW = judge.tower(judge.embed_items())
    entropies, taught = [], []
    for taken, after in zip(lists, (6, 7), strict=True):
        states: list[torch.Tensor] = [judge.nothing]
        for place in range(1, len(taken) + 1):
            # A prefix as it stood: the places count from the newest of the whole piece.
            whole = history_of(judge, [taken])
            states.append(judge._states(whole, judge.tower(whole.features_ND), _nothing_dropped())[0, place - 1])
        for state, target in zip(states, [*taken, after], strict=True):
            entropies.append(F.cross_entropy(items_IW @ state, torch.tensor(target)))
        for head in taken:
            assert judge.transitions is not None
            student = (8**0.5 * items_IW[head] @ items_IW.T / 0.1).log_softmax(0)
            taught.append(-(teacher(judge.transitions.dense(torch.tensor([head])), 0.1)[0] * student).sum())
    loss, parts = judge.loss(batch, seeded(0))
    torch.testing.assert_close(parts["next"], torch.stack(entropies).mean())
    torch.testing.assert_close(parts["distillation"], torch.stack(taught).mean())
    torch.testing.assert_close(loss, torch.stack(entropies).mean() + 0.1 * torch.stack(taught).mean())


def test_a_pool_of_everything_else_is_the_whole_softmax() -> None:
    judge = judge_of(replace(SMALL, distillation=0.0))
    batch = batch_of(judge, [[1, 2, 3], [4, 5]], [[6, 0], [7, 1]])
    pool = torch.arange(ITEMS - 1)  # the last item is nobody's, and far away
    judge.tower.bias.data.zero_()
    sampled = replace(batch, pool_S=pool, pool_log_q_S=torch.zeros(len(pool)))
    full = judge.loss(batch, seeded(0))[0]
    gap = full - judge.loss(sampled, seeded(0))[0]
    assert 0 < gap.item() < 2 / ITEMS
    shifted = replace(sampled, pool_log_q_S=torch.full((len(pool),), 50.0))
    assert float(judge.loss(shifted, seeded(0))[0]) < 1e-6  # drawn so often that each draw counts for nothing


def test_noise_decides_what_is_dropped_and_who_is_taught() -> None:
    judge = judge_of(replace(SMALL, dropout=0.4, teacher_items=2)).train()
    batch = batch_of(judge, [[1, 2, 3], [4, 5]], [[6, 0], [7, 1]])
    one, same, other = (judge.loss(batch, seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_explain_is_the_score_with_minus_the_score_without() -> None:
    judge = judge_of()
    taken = [1, 5, 2, 8, 3, 9, 4, 7]  # two more than are read
    parts = judge.explain(history_of(judge, [taken, []]), shown(judge, 2))
    whole = judge.score(judge.encode(history_of(judge, [taken])), shown(judge, 1))[0]
    for place in range(8):
        without = judge.encode(history_of(judge, [taken[:place] + taken[place + 1 :]]))
        torch.testing.assert_close(
            parts[0, :, place], whole - judge.score(without, shown(judge, 1))[0], atol=1e-5, rtol=1e-4
        )
    assert not parts[0, :, :2].any() and not parts[1].any()


def test_what_is_missing_is_named() -> None:
    judge = judge_of()
    batch = batch_of(judge, [[1, 2]], [[3, 4]])
    with pytest.raises(DataError, match="items_N"):
        judge.loss(replace(batch, history=replace(batch.history, items_N=None)), seeded(0))
    judge.transitions = None
    with pytest.raises(DataError, match="set judge.transitions"):
        judge.loss(batch, seeded(0))
    for wrong in ({"alpha": 1.5}, {"tau": 0.0}, {"heads": 3}, {"long": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MqsaTedConfig(**wrong)


def test_a_chain_is_learned_and_explained_by_its_newest_item(tmp_path: Path) -> None:
    """Everybody walks round a ring: what comes next is the neighbour of the newest item."""
    random = np.random.default_rng(0)
    lists = [((start + np.arange(10)) % ITEMS).tolist() for start in random.integers(ITEMS, size=80)]
    log = planted_log(tmp_path, lists, ITEMS)
    config = LogFitConfig(
        model="mqsa_ted",
        mqsa_ted=MqsaTedConfig(width=16, length=8, dropout=0.0, distillation=0.02),
        features=FeatureConfig(words=0),
        history=8,
        batch=40,
        steps=60,
        eval_every=30,
        learning_rate=1e-2,
        skip_seen=False,
    )
    judge = fit_log(log, Content.of_vectors(torch.eye(ITEMS)), config).judge
    assert HeldOut(log, "test", history=8).rank(judge, skip_seen=False).ndcg(10).mean() > 0.98
    assert isinstance(judge, MqsaTedJudge)
    parts = judge.explain(
        history_of(judge, [[(start + place) % ITEMS for place in range(8)] for start in (0, 7)]), shown(judge, 2)
    )
    assert int(parts[0, 8].argmax()) == 7 and int(parts[1, 3].argmax()) == 7


@pytest.mark.slow
def test_it_ranks_a_first_order_world_with_stray_items_better_than_sasrec(tmp_path: Path) -> None:
    found = world.compare(0, tmp_path)
    assert found.difference()[1] > 0
    assert found.best_U is not None and found.best_U.mean() > found.ours_U.mean()
