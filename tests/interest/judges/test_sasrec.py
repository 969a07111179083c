"""SASRec and gSASRec: causality, the losses against their formulas, and order as the one thing that is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judge import make_judge
from couturier.components.interest.judges.profile import ProfileConfig
from couturier.components.interest.judges.sasrec import (
    SasrecConfig,
    SasrecJudge,
    _Next,
    gbce,
    gbce_power,
    next_softmax,
)
from couturier.components.interest.layers import RowDropout
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed, seeded, threads

from ..worlds import sasrec as world
from ..worlds.base import planted_log

ITEMS = 15
SMALL = SasrecConfig(width=16, blocks=2, length=6, dropout=0.0)


def made(config: SasrecConfig = SMALL) -> SasrecJudge:
    with global_seed(0, "test"):
        content = Content.of_vectors(torch.randn(ITEMS, 3))
        judge = SasrecJudge(config, FeatureConfig(words=0, ids=8), content)
        # A fit starts with networks that add nothing; here everything should count.
        for parameter in judge.blocks.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return judge


def lived(judge: SasrecJudge, *histories: list[int], in_time_order: bool = True) -> HistoryBatch:
    items_N = torch.tensor([item for history in histories for item in history], dtype=torch.int64)
    lengths = torch.tensor([0, *(len(history) for history in histories)])
    ages = [float(len(history) - place) for history in histories for place in range(len(history))]
    return HistoryBatch(
        features_ND=judge.embed_items()[items_N],
        age_days_N=torch.tensor(ages),
        weight_N=torch.ones(len(items_N)),
        offsets=lengths.cumsum(0),
        items_N=items_N,
        in_time_order=in_time_order,
    )


def batch_of(judge: SasrecJudge, histories: list[list[int]], taken: list[int], bad: list[int]) -> TrainBatch:
    items_UC = torch.tensor([[item, *bad] for item in taken])
    shown = judge.embed_items()[items_UC]
    return TrainBatch(history=lived(judge, *histories), items_UC=items_UC, candidates_UCD=shown, positives=1)


def loss_of(judge: SasrecJudge, batch: TrainBatch) -> torch.Tensor:
    return judge.loss(batch, seeded(0, "noise"))[0]


def test_the_future_changes_nothing_bit_for_bit() -> None:
    judge = made().eval()
    one, two = (judge.states(lived(judge, [1, 2, 3, 4, 5], [7, *tail])) for tail in ([8, 9], [10, 11]))
    assert torch.equal(one[:6], two[:6])
    assert not torch.equal(one[6:], two[6:])


def test_who_else_is_there_and_how_long_they_are_changes_nothing() -> None:
    judge = made().eval()
    alone, beside = judge.states(lived(judge, [1, 2])), judge.states(lived(judge, [3, 4, 5, 6, 7], [1, 2], [9]))
    torch.testing.assert_close(alone, beside[5:7], rtol=1e-5, atol=1e-6)


def test_only_the_newest_items_are_read_and_in_their_order() -> None:
    judge, shown = made().eval(), torch.arange(ITEMS)
    items = judge.embed_items()[shown].detach()
    scores = [
        judge.score_all(judge.encode(lived(judge, history)), items)
        for history in ([1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 8, 7])
    ]
    torch.testing.assert_close(scores[0], scores[1])
    assert float((scores[0] - scores[2]).detach().abs().max()) > 1e-3
    mixed = lived(judge, [1, 2, 3], [4, 5])
    order = torch.tensor([2, 0, 1, 4, 3])
    shuffled = replace(mixed.rows(order, mixed.offsets), in_time_order=False)
    torch.testing.assert_close(judge.encode(shuffled).state_UW, judge.encode(mixed).state_UW)


def test_one_product_ranks_a_catalogue_as_scoring_does() -> None:
    judge = made().eval()
    state, items = judge.encode(lived(judge, [1, 2], [])), judge.embed_items()
    torch.testing.assert_close(judge.score_all(state, items), judge.score(state, items.expand(2, -1, -1)))


def test_states_are_of_what_can_be_read() -> None:
    judge = made()
    with pytest.raises(DataError, match="at most 6"):
        judge.states(lived(judge, list(range(7))))
    with pytest.raises(DataError, match="time order"):
        judge.states(lived(judge, [1, 2], in_time_order=False))


@pytest.mark.parametrize("loss", ["softmax", "gbce"])
def test_a_catalogue_that_is_shown_as_it_is_gives_the_same_loss_and_gradients(loss: Literal["softmax", "gbce"]) -> None:
    judge = made(replace(SMALL, loss=loss))
    batch = batch_of(judge, [[1, 2, 3, 4, 5, 6, 7, 8], [9], []], [3, 4, 5], [6])
    found = []
    for catalogue_ID in (None, judge.embed_items()):
        total, _ = judge.loss(replace(batch, catalogue_ID=catalogue_ID), seeded(0))
        leaves = [judge.tower.weight, judge.items.identity.weight, judge.nothing]
        found.append((total, *torch.autograd.grad(total, leaves, retain_graph=True)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["sasrec", "profile"])
def test_users_shared_out_to_cores_give_the_same_loss_and_gradients(kind: str) -> None:
    config = replace((ProfileConfig if kind == "profile" else SasrecConfig)(), width=16, length=6, dropout=0.25)
    with global_seed(0, "test"):
        content = Content.of_vectors(torch.randn(ITEMS, 3))
        judge = make_judge(kind, config, FeatureConfig(words=0, ids=8), content).train()
    assert isinstance(judge, SasrecJudge)
    random = np.random.default_rng(0)
    lengths = [0, 1, 9, 30, *random.integers(8, size=30).tolist()]
    histories = [random.integers(ITEMS, size=length).tolist() for length in lengths]
    batch = batch_of(judge, histories, random.integers(ITEMS, size=len(lengths)).tolist(), [6])
    found = []
    for count in (1, 2):
        with threads(count):
            total, parts = judge.loss(replace(batch, catalogue_ID=judge.embed_items()), seeded(0))
            assert ("_SummedBackward" in graph(total)) == (count == 2)
            grads = torch.autograd.grad(total, list(judge.parameters()), allow_unused=True)
            found.append([total, parts["next"], *grads])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def graph(value: torch.Tensor) -> set[str]:
    """Names of what a value was made by, two steps back."""
    node = value.grad_fn
    assert node is not None
    return {type(node).__name__, *(type(into).__name__ for into, _ in node.next_functions)}


def rows_of_loss(seed: int, dtype: torch.dtype = torch.float32, *, scale: float = 1.0) -> tuple[_Next, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    items_IW = torch.randn(ITEMS, 4, generator=random, dtype=dtype).requires_grad_()
    items_K = torch.randint(ITEMS, (40,), generator=random)
    states_KW = (scale * torch.randn(40, 4, generator=random, dtype=dtype)).requires_grad_()
    share_K = torch.rand(40, generator=random, dtype=dtype)
    return _Next(states_KW=states_KW, own_KW=items_IW[items_K], items_K=items_K, share_K=share_K), items_IW


@pytest.mark.parametrize("scale", [1.0, 100.0])  # the larger one's exponentials overflow
def test_the_loss_of_what_came_next_is_cross_entropy_with_all_its_gradients(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    monkeypatch.setattr("couturier.kernels.catalogue_softmax.torch_impl._PIECE", 7 * ITEMS)
    next_, items_IW = rows_of_loss(0, scale=scale)
    found = next_softmax(next_, items_IW, torch.zeros(ITEMS), None)
    wanted = (F.cross_entropy(next_.states_KW @ items_IW.T, next_.items_K, reduction="none") * next_.share_K).sum()
    torch.testing.assert_close(found, wanted)
    of = (next_.states_KW, items_IW)
    for mine, theirs in zip(
        torch.autograd.grad(3 * found, of, retain_graph=True), torch.autograd.grad(3 * wanted, of), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_pool_that_is_the_catalogue_is_the_full_softmax_and_a_drawn_one_estimates_it() -> None:
    next_, items_IW = rows_of_loss(1)
    whole = next_softmax(next_, items_IW, torch.zeros(ITEMS), None)
    order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(next_softmax(next_, items_IW[order], torch.zeros(ITEMS), order), whole)
    chance_I = torch.softmax(torch.arange(ITEMS) / 5.0, 0)
    drawn = torch.multinomial(chance_I, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    corrected = next_softmax(next_, items_IW[drawn], -(40_000 * chance_I[drawn]).log(), drawn)
    torch.testing.assert_close(corrected, whole, rtol=0.01, atol=0.0)
    plain = next_softmax(next_, items_IW[drawn], torch.zeros(40_000), drawn)
    assert abs(float((plain - whole).detach())) > 0.1 * float(whole.detach()), (
        "without the correction it is another loss"
    )


def test_gbce_is_bce_at_zero_and_its_transform_at_any_t() -> None:
    """Petrov and Macdonald: gBCE is BCE of a transformed score, ``log(1 / (sigmoid(s)^-beta - 1))``."""
    random = torch.Generator().manual_seed(0)
    good, bad = torch.randn(9, generator=random).double(), torch.randn(9, 4, generator=random).double()
    real = torch.ones_like(bad, dtype=torch.bool)
    both = torch.cat([good[:, None], bad], 1)
    labels = torch.zeros_like(both)
    labels[:, 0] = 1
    assert gbce_power(4, 101, 0.0) == pytest.approx(1.0)
    plain = F.binary_cross_entropy_with_logits(both, labels, reduction="none").mean(1)
    torch.testing.assert_close(gbce(good, bad, real, 1.0), plain, rtol=1e-8, atol=1e-8)
    power = gbce_power(4, 101, 0.75)
    both[:, 0] = (1 / (torch.sigmoid(good) ** -power - 1)).log()
    turned = F.binary_cross_entropy_with_logits(both, labels, reduction="none").mean(1)
    torch.testing.assert_close(gbce(good, bad, real, power), turned, rtol=1e-8, atol=1e-8)


def test_gbce_makes_chances_true_where_bce_is_too_sure() -> None:
    """One state, ten items with known chances, three negatives a draw."""
    chance_I = torch.softmax(torch.linspace(0, 2, 10), 0)
    error = {}
    for t in (0.0, 1.0):
        random, logit_I = torch.Generator().manual_seed(0), torch.zeros(10, requires_grad=True)
        optimiser = torch.optim.Adam([logit_I], lr=0.1)
        for _ in range(200):
            taken = torch.multinomial(chance_I, 256, replacement=True, generator=random)
            bad = torch.randint(10, (256, 3), generator=random)
            loss = gbce(logit_I[taken], logit_I[bad], bad != taken[:, None], gbce_power(3, 10, t)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        error[t] = float((torch.sigmoid(logit_I.detach()) - chance_I).abs().mean())
    assert error[1.0] < 0.05 < 0.1 < error[0.0]


# Binary losses stay a hundred steps where every score is low before they tell items apart.
@pytest.mark.parametrize(
    ("loss", "steps", "rate"), [("softmax", 60, 1e-2), ("sampled", 120, 1e-2), ("gbce", 280, 5e-3)]
)
def test_every_loss_learns_what_comes_next(loss: str, steps: int, rate: float) -> None:
    config = replace(SMALL, loss=loss, negatives=14)  # type: ignore[arg-type]
    with global_seed(0, "test"):
        judge = SasrecJudge(config, FeatureConfig(words=0, ids=16), Content.of_vectors(torch.zeros(ITEMS, 1)))
    walks = [[(user + step) % ITEMS for step in range(7)] for user in range(ITEMS)]
    optimiser = torch.optim.Adam(judge.parameters(), lr=rate)
    for step in range(steps):
        batch = batch_of(judge, [walk[:6] for walk in walks], [walk[6] for walk in walks], [0])
        value, _ = judge.loss(batch, seeded(step, "noise"))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    judge.eval()
    scores = judge.score_all(judge.encode(lived(judge, *(walk[:6] for walk in walks))), judge.embed_items())
    assert sum(best == walk[6] for best, walk in zip(scores.argmax(1).tolist(), walks, strict=True)) >= 12
    first = judge.score_all(judge.encode(HistoryBatch.empty(users=1, width=judge.width)), judge.embed_items())
    assert float(first.detach().std()) < float(scores.detach().std()) / 2, "anything may come first"


def test_the_loss_is_a_mean_over_users() -> None:
    judge, histories, taken = made(), [[1, 2, 3], [4], [], [5, 6]], [7, 8, 9, 10]
    whole = loss_of(judge, batch_of(judge, histories, taken, [0, 1]))
    halves = [loss_of(judge, batch_of(judge, histories[at::2], taken[at::2], [0, 1])) for at in (0, 1)]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


def test_worn_candidates_are_learned_from_as_shown_and_clean_ones_once() -> None:
    judge = made()
    clean = batch_of(judge, [[1, 2]], [3], [4, 5])
    worn = replace(clean, candidates_UCD=clean.candidates_UCD + 0.1)
    assert set(judge.loss(clean, seeded(0))[1]) == {"next"}
    assert set(judge.loss(worn, seeded(0))[1]) == {"next", "ranking", "bce"}
    nameless = replace(clean, history=replace(clean.history, items_N=None))
    with pytest.raises(DataError, match="items_N"):
        judge.loss(nameless, seeded(0))


def test_dropout_follows_the_generator_and_keeps_the_mean() -> None:
    x = torch.ones(200, 16)
    one, again, other = (
        RowDropout(0.25, rows=200, width=16, layers=1, noise=seeded(seed)).of(0, 200)(x) for seed in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert float((one == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert float(one.mean()) == pytest.approx(1.0, abs=0.04)


def test_explain_is_leaving_out_whatever_the_order_and_length() -> None:
    judge = made().eval()
    history = lived(judge, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    order = torch.tensor([8, 0, 1, 2, 3, 4, 5, 6, 7])  # the newest stands first
    mixed = replace(history.rows(order, history.offsets), in_time_order=False)
    shown = judge.embed_items()[:4].detach()[None]
    parts = judge.explain(mixed, shown)[0]
    whole = judge.score(judge.encode(mixed), shown)[0]
    for left_out in range(9):
        rest = torch.tensor([place for place in range(9) if place != left_out])
        without = judge.score(judge.encode(mixed.rows(rest, torch.tensor([0, 8]))), shown)[0]
        torch.testing.assert_close(parts[:, left_out], whole - without, rtol=1e-4, atol=1e-5)
    assert bool((parts[:, [1, 2, 3]] == 0).all()), "older than what is read"


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"loss": "hinge"}, {"dropout": 1.0}, {"calibration": 1.5}])
def test_wrong_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SasrecConfig(**wrong)  # type: ignore[arg-type]


def test_walks_are_followed_and_shuffled_ones_are_not(tmp_path: Path) -> None:
    """The next item of a cycle is found; in walks that lost their order there is nothing to find."""
    found = {}
    for shuffled in (False, True):
        taken = world.walks(0, users=120, stay=1.0, shuffled=shuffled)
        log = planted_log(tmp_path / str(shuffled), taken, world.ITEMS)
        fit = world.fitted(log, "sasrec", seed=0, steps=100)
        found[shuffled] = world.ranked(log, fit).ndcg(10).mean()
        if not shuffled:
            judge = fit.judge
            assert isinstance(judge, SasrecJudge)
            steps = np.array(taken)
            shown = judge.embed_items()[steps[:8, 10]][:, None]
            parts_UT = judge.explain(lived(judge, *steps[:8, :10].tolist()), shown)[:, 0]
            assert parts_UT.argmax(1).tolist() == [9] * 8, "the last item is the reason for the next"
    assert found[False] > 0.99
    assert found[True] < 0.5


@pytest.mark.slow
def test_order_is_worth_more_than_attention(tmp_path: Path) -> None:
    _, low, _ = world.compare(0, tmp_path).difference()
    assert low > 0.2
