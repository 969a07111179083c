"""TIN: what its three parts are for, the identity that makes it cheap, and what a weight means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.tin import TinConfig, TinJudge
from couturier.components.interest.recency import Time
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed

from ..worlds import tin as world
from ..worlds.base import Comparison

ITEMS, WIDTH = 12, 6
SMALL = TinConfig(embedding=8, times=16, hidden=12)


def made(config: TinConfig = SMALL) -> TinJudge:
    with global_seed(0, "tin"):
        judge = TinJudge(config, FeatureConfig(words=0), Content.of_vectors(torch.randn(ITEMS, WIDTH)))
        for value in judge.parameters():
            value.data.mul_(2)  # far enough from zero that an order or a weight is seen
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


def scored(judge: ContentJudge, history: HistoryBatch) -> torch.Tensor:
    with torch.no_grad():
        return judge.score(judge.encode(history), judge.embed_items().expand(len(history), -1, -1))


@pytest.mark.parametrize("time", get_args(Time))
def test_the_order_of_a_history_matters_only_with_time(time: Time) -> None:
    with_time = made(replace(SMALL, time=time))
    one, other = lived(with_time, [0, 1, 2, 3]), lived(with_time, [3, 2, 1, 0])
    assert (scored(with_time, one) - scored(with_time, other)).abs().max() > 1e-2
    without = made(replace(SMALL, use_time=False))
    torch.testing.assert_close(scored(without, one), scored(without, other))


def test_the_product_factors_out_of_the_sum() -> None:
    """The paper's form, ``sum a (v~_t * v~_q)``, from the weights and embeddings, through the same network."""
    judge = made()
    history = lived(judge, [4, 1, 7, 7, 2])
    keys_TE = judge.embedding(history.features_ND) + judge.times(torch.tensor([5, 4, 3, 2, 1]))
    query_CE = judge.embedding(judge.embed_items()) + judge.times.weight[0]
    weight_CT = (query_CE @ keys_TE.T / 8**0.5).softmax(-1)
    plain_CE = weight_CT @ keys_TE
    product_CE = (weight_CT[..., None] * keys_TE * query_CE[:, None]).sum(1)
    wanted_C = judge.head(torch.cat([plain_CE, query_CE, product_CE], dim=-1))[:, 0]
    torch.testing.assert_close(scored(judge, history)[0], wanted_C, rtol=1e-4, atol=1e-5)


def test_without_attention_everybody_counts_alike() -> None:
    judge = made(replace(SMALL, use_attention=False, use_time=False, use_product=False))
    history = lived(judge, [4, 1, 7])
    mean_E = judge.embedding(history.features_ND).mean(0)
    query_CE = judge.embedding(judge.embed_items())
    wanted_C = judge.head(torch.cat([mean_E.expand(ITEMS, -1), query_CE], dim=-1))[:, 0]
    torch.testing.assert_close(scored(judge, history)[0], wanted_C, rtol=1e-4, atol=1e-5)


def test_a_weight_is_how_often() -> None:
    judge = made(replace(SMALL, time="interval"))
    once = lived(judge, [4, 1])
    heavy = replace(once, weight_N=torch.tensor([3.0, 1.0]))
    thrice = once.rows(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 4]))
    torch.testing.assert_close(scored(judge, heavy), scored(judge, thrice), rtol=1e-4, atol=1e-5)


def test_an_empty_history_leaves_what_the_candidate_is_worth() -> None:
    judge = made()
    query_CE = judge.embedding(judge.embed_items()) + judge.times.weight[0]
    nothing_CE = torch.zeros_like(query_CE)
    wanted_C = judge.head(torch.cat([nothing_CE, query_CE, nothing_CE], dim=-1))[:, 0]
    torch.testing.assert_close(scored(judge, lived(judge, [], [3]))[0], wanted_C)


@pytest.mark.parametrize(
    "parts", [{}, {"use_attention": False}, {"use_product": False}, {"use_time": False}], ids=lambda parts: str(parts)
)
def test_explain_agrees_with_leaving_the_item_out(parts: dict[str, bool]) -> None:
    """With intervals, which leaving an item out does not move, it is the same as reading the history without it."""
    judge = made(replace(SMALL, time="interval", **parts))
    history = lived(judge, [0, 4, 9, 9], [3], [7, 2])
    shown = judge.embed_items()[:5].expand(3, -1, -1)
    by_replay = ContentJudge.explain(judge, history, shown)
    torch.testing.assert_close(judge.explain(history, shown), by_replay, rtol=1e-3, atol=1e-4)


def test_everything_learns() -> None:
    judge = made().train()
    items_UC = torch.tensor([[1, 2, 3], [4, 5, -1]])
    batch = TrainBatch(
        history=lived(judge, [0, 4, 9], [3]),
        items_UC=items_UC,
        candidates_UCD=judge.embed_items()[items_UC.clamp_min(0)],
        positives=1,
    )
    loss, _ = judge.loss(batch, torch.Generator())
    loss.backward()
    for name, value in judge.named_parameters():
        assert value.grad is not None and bool(value.grad.any()), name


def test_the_learned_correlation_has_a_matrix_a_target() -> None:
    judge = made()
    found = judge.correlation(judge.embed_items()[:4], 20)
    assert found.shape == (4, 4, 20) and found.amin() == 0 and found.amax() == 1
    assert torch.equal(found[..., 14], found[..., 19]), "what is older than the table shares its last row"
    still = made(replace(SMALL, use_time=False)).correlation(judge.embed_items()[:4], 3)
    assert torch.equal(still, still[..., :1].expand(-1, -1, 3))


def test_another_measure_of_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of position, interval"):
        TinConfig(time="weekday")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def learned() -> ContentJudge:
    """TIN after its fit in the planted world of ten kinds, shortened."""
    return world.fitted("tin", seed=0, steps=200, rates=[1e-2])


def test_explain_names_the_newest_behaviour_of_the_kind(learned: ContentJudge) -> None:
    """Planted: a behaviour of the candidate's kind speaks for it, the newer the louder; others say little."""
    kinds_T = torch.tensor([3, 7, 7, 5, 2, 3, 1, 8, 5, 3])  # oldest first; 3 is the oldest, in the middle, the newest
    history = HistoryBatch(
        features_ND=torch.eye(world.KINDS)[kinds_T],
        age_days_N=torch.arange(10, 0, -1) / 24,
        weight_N=torch.ones(10),
        offsets=torch.tensor([0, 10]),
        in_time_order=True,
    )
    parts_CT = learned.explain(history, torch.eye(world.KINDS)[[3, 5, 8]][None])[0]
    of_3, of_5, of_8 = parts_CT
    assert of_3.argmax() == 9 and of_3[9] > of_3[5] > of_3[0]
    assert of_5.argmax() == 8 and of_5[8] > of_5[3] > 0
    assert of_8.argmax() == 7 and of_8[7] > 3 * of_8[[0, 1, 2, 3, 4, 5, 6, 8, 9]].abs().mean()


def test_the_learned_correlation_is_the_measured_one(learned: ContentJudge) -> None:
    """Rank correlation of learned and measured (target, behaviour, position); no model without time can have it."""
    assert isinstance(learned, TinJudge)
    measured = world.measured(0)
    found = learned.correlation(torch.eye(world.KINDS), world.MEMORY).numpy()
    assert rank_correlation(found, measured) > 0.8
    whatever_the_order = np.broadcast_to(measured.mean(-1, keepdims=True), measured.shape)
    assert rank_correlation(whatever_the_order, measured) < 0.5


@pytest.mark.slow
def test_tin_beats_din_where_recency_and_category_matter(tmp_path: Path) -> None:
    comparison = world.compare(0, tmp_path)
    gain, low, _ = comparison.difference()
    assert low > 0.02
    assert comparison.best_U is not None and comparison.ours_U.mean() > comparison.best_U.mean() - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("part", ["use_time", "use_attention", "use_product"])
def test_every_part_is_needed(part: str) -> None:
    """With forty kinds: taking out time, attention or the product costs AUC."""
    shown = world.proof(0, world.MANY_KINDS)
    whole, less = (
        world.aucs(shown, world.fitted("tin", seed=0, kinds=world.MANY_KINDS, settings=settings))
        for settings in (world.SETTINGS, world.without(part))
    )
    _, low, _ = Comparison(claim="", ours="", other="", figure="", ours_U=whole, other_U=less).difference()
    assert low > 0.005


@pytest.mark.slow
def test_without_time_the_learned_correlation_is_not_the_measured_one() -> None:
    still = world.fitted("tin", seed=0, settings=world.without("use_time"))
    assert isinstance(still, TinJudge)
    found = still.correlation(torch.eye(world.KINDS), world.MEMORY).numpy()
    assert rank_correlation(found, world.measured(0)) < 0.5


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over targets of Spearman's correlation over (behaviour, position)."""
    return float(np.mean([spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(one, other, strict=True)]))
