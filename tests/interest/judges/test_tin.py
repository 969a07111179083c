"""TIN: what its three parts are for, the identity that makes it cheap, and what a weight means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.tin import TinConfig, TinJudge
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed

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


@pytest.mark.parametrize("time", ["position", "interval"])
def test_the_order_of_a_history_matters_only_with_time(time: str) -> None:
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
