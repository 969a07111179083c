"""MUSE: the search is exact, SA-TA reduces to attention, amounts are repeats, and new items are known by content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from couturier.components.data.formats import Windows
from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judge import history_batch, load_judge
from couturier.components.interest.judges.muse import MuseConfig, MuseJudge, Searched
from couturier.components.interest.tiers import attention_weights
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed

from ..conftest import StageOf
from ..planted import World, category_of
from ..worlds import muse as muse_world

ITEMS, WIDTH = 40, 8
SHORT = MuseConfig(width=4, top=6, recent=5, hidden=(8,))


def made(config: MuseConfig = SHORT) -> MuseJudge:
    with global_seed(0, "muse"):
        judge = MuseJudge(config, FeatureConfig(words=0, ids=3), Content.of_vectors(torch.randn(ITEMS, WIDTH)))
        torch.nn.init.normal_(judge.amount.by_age.weight, std=0.1)
    return judge.eval()


def lived(judge: ContentJudge, lengths: list[int], *, seed: int = 0) -> HistoryBatch:
    """Random items of random ages and weights."""
    random, n = torch.Generator().manual_seed(seed), sum(lengths)
    items = torch.randint(ITEMS, (n,), generator=random)
    return HistoryBatch(
        features_ND=judge.embed_items().detach()[items],
        age_days_N=100 * torch.rand(n, generator=random),
        weight_N=0.2 + torch.rand(n, generator=random),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        items_N=items,
    )


def shown(judge: ContentJudge, users: int, count: int = 7) -> torch.Tensor:
    return judge.embed_items().detach()[:count].expand(users, -1, -1)


def test_the_search_is_exact_and_finds_no_padding() -> None:
    judge, lengths = made(), [0, 3, 30]
    history = lived(judge, lengths).oldest_first()
    state = judge._encode(history)
    assert isinstance(state.whole, Searched)
    looks_UCP = judge.looks(shown(judge, 3))
    found, cosine = judge.search(state.whole, looks_UCP, 6)
    for user, length in enumerate(lengths):
        start = int(history.offsets[user])
        own = judge.looks(history.features_ND[start : start + length])
        for candidate in range(7):
            by_hand = (own @ looks_UCP[user, candidate]).sort(descending=True).values[:6]
            kept = found[user, candidate] >= 0
            assert int(kept.sum()) == min(6, length)
            torch.testing.assert_close(cosine[user, candidate][kept], by_hand)
            assert bool(
                ((found[user, candidate][kept] >= start) & (found[user, candidate][kept] < start + length)).all()
            )


def test_what_counts_for_nothing_is_not_found() -> None:
    judge = made()
    history = lived(judge, [30])
    state = judge._encode(replace(history, weight_N=history.weight_N * (torch.arange(30) % 2)).oldest_first())
    assert isinstance(state.whole, Searched)
    found, _ = judge.search(state.whole, judge.looks(shown(judge, 1)), 20)
    assert int((found >= 0).sum(-1).max()) == 15


def test_a_searched_history_that_is_found_whole_scores_as_one_that_is_not_searched() -> None:
    """Beside a longer history a short one goes through the search; that must change nothing."""
    judge = made()
    short = lived(judge, [6])
    both = lived(judge, [6, 25])
    both = replace(
        both,
        features_ND=torch.cat([short.features_ND, both.features_ND[6:]]),
        age_days_N=torch.cat([short.age_days_N, both.age_days_N[6:]]),
        weight_N=torch.cat([short.weight_N, both.weight_N[6:]]),
    )
    alone = judge.score(judge.encode(short), shown(judge, 1))
    beside = judge.score(judge.encode(both), shown(judge, 2))
    torch.testing.assert_close(beside[:1], alone, rtol=1e-4, atol=1e-5)


def test_sata_without_content_is_plain_attention() -> None:
    judge = made()
    random = torch.Generator().manual_seed(3)
    dot, cosine = torch.randn(2, 3, 5, generator=random), 2 * torch.rand(2, 3, 5, generator=random) - 1
    with torch.no_grad():
        near = cosine / 0.1
        torch.testing.assert_close(judge.sata(dot, cosine), dot + near + dot * near)
        judge.mix_3.copy_(torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(attention_weights(judge.sata(dot, cosine), torch.ones(2, 1, 5)), dot.softmax(-1))


def test_a_weight_of_two_is_a_behaviour_that_happened_twice() -> None:
    judge = made(replace(SHORT, top=20, recent=20))
    once = replace(lived(judge, [6]), weight_N=torch.ones(6))
    twice = replace(once, weight_N=torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, 1.0]))
    repeated = once.rows(torch.tensor([0, 1, 1, 2, 3, 4, 4, 5]), torch.tensor([0, 8]))
    scores = [judge.score(judge.encode(each), shown(judge, 1)) for each in (twice, repeated, once)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)
    assert float((scores[0] - scores[2]).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("lengths", [[4, 0, 1], [30, 2, 0, 1]], ids=["short", "searched"])
def test_explain_is_the_score_with_minus_the_score_without(lengths: list[int]) -> None:
    judge = made()
    history = lived(judge, lengths)
    parts = judge.explain(history, shown(judge, len(lengths)))
    wanted = ContentJudge.explain(judge, history, shown(judge, len(lengths)))
    torch.testing.assert_close(parts, wanted, rtol=1e-3, atol=1e-5)
    assert float(parts.abs().max()) > 1e-3


def test_a_long_history_is_explained_by_the_few_that_are_read() -> None:
    judge = made()
    parts = judge.explain(lived(judge, [200]), shown(judge, 1, 2))[0]
    assert parts.shape == (2, 200) and int((parts.abs() > 1e-6).sum(-1).max()) <= 6 + 5


def test_the_auxiliary_loss_teaches_the_search_alone() -> None:
    judge = made(replace(SHORT, auxiliary=0.5)).train()
    items_UC = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch = TrainBatch(
        history=lived(judge, [20, 3]), items_UC=items_UC, candidates_UCD=judge.embed_items()[items_UC], positives=1
    )
    loss, parts = judge.loss(batch, torch.Generator())
    loss.backward()
    assert "auxiliary" in parts
    assert all(value.grad is not None for value in judge.parameters())
    found = judge.get_parameter("found_head.0.weight").grad
    assert found is not None and float(found.abs().max()) > 0


def test_all_candidates_at_once_score_as_one_by_one() -> None:
    judge = made()
    state, items_ID = judge.encode(lived(judge, [20, 3, 0])), judge.embed_items().detach()
    torch.testing.assert_close(
        judge.score_all(state, items_ID), judge.score(state, items_ID.expand(3, -1, -1)), rtol=1e-4, atol=1e-5
    )
    nobody = judge.encode(HistoryBatch.empty(users=0, width=judge.width))
    assert judge.score_all(nobody, items_ID).shape == (0, ITEMS) and judge.score_all(state, items_ID[:0]).shape == (
        3,
        0,
    )


def test_explain_points_at_the_planted_reason(stage_of: StageOf, world: World) -> None:
    """For a candidate of a liked kind the history items of that kind say most."""
    judge, windows = load_judge(stage_of("muse").out / "judge"), Windows.load(world.folder, "test")
    batch = history_batch(windows, np.arange(len(windows)), judge.embed_items())
    newest_W = torch.from_numpy(windows.favourites_WK[:, 0].astype(np.int64))
    parts_WT = judge.explain(batch, judge.embed_items(words=False)[newest_W][:, None])[:, 0].numpy()
    kind_WT = category_of(windows.favourites_WK)
    same_WT = kind_WT == kind_WT[:, :1]
    assert parts_WT[same_WT].mean() > 0.1
    assert parts_WT[same_WT].mean() > 3 * abs(parts_WT[~same_WT].mean())


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"step": 2.0}, {"hidden": ()}, {"top": 0}])
def test_wrong_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MuseConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_new_items_are_known_by_content_and_warm_ones_no_worse(tmp_path: Path) -> None:
    new, warm = muse_world.compare_both(0, tmp_path)
    assert abs(new.other_U.mean() - 0.5) < 0.02, "identities say nothing of an item that nobody has met"
    assert new.difference()[1] > 0.3 and warm.difference()[1] > -0.02
    assert new.best_U is not None and new.ours_U.mean() > new.best_U.mean() - 0.03


@pytest.mark.slow
def test_finding_more_helps_until_it_is_enough(tmp_path: Path) -> None:
    """AUC on new items by K, with next to nothing read without a search: one is too few, twenty no worse than eight."""
    world = muse_world.plant(1)
    log = muse_world.planted_log(tmp_path, world.taken, len(world.topic_I))
    auc_of = {}
    for top in (1, 8, 20):
        config = MuseConfig(top=top, recent=1)
        judge = muse_world.fitted(world, log, "muse", ids_only=False, seed=1, rates=(1e-2,), muse=config)
        auc_of[top], _ = muse_world.aucs(world, judge, new=True, seed=1)
    gain_U = auc_of[8] - auc_of[1]
    assert gain_U.mean() - 1.96 * gain_U.std() / len(gain_U) ** 0.5 > 0
    assert abs((auc_of[20] - auc_of[8]).mean()) < 0.015
