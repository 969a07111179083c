"""DIN: its activation, its regulariser, what its two forms of pooling promise, and reading the right behaviours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.din import DinConfig, DinJudge, mini_batch_aware_l2
from couturier.components.interest.layers import Dice
from couturier.components.interest.log_fit import fit_log
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed, seeded

from ..worlds import din as world
from ..worlds.base import planted_log

ITEMS = 12
Form = Literal["din_code", "din_paper"]
FORMS: list[Form] = ["din_code", "din_paper"]


def made(config: DinConfig, *, ids: int = 4) -> DinJudge:
    with global_seed(0, "test"):
        counts_I = torch.arange(1, ITEMS + 1).float()
        content = Content.of_vectors(torch.randn(ITEMS, 3), counts_I)
        judge = DinJudge(config, FeatureConfig(words=0, ids=ids), content)
        torch.nn.init.normal_(judge.amount)
    return judge.eval()


def lived(judge: DinJudge, *histories: list[int]) -> HistoryBatch:
    items_N = torch.tensor([item for history in histories for item in history], dtype=torch.int64)
    return HistoryBatch(
        features_ND=judge.embed_items()[items_N].detach(),
        age_days_N=torch.arange(len(items_N)).float(),
        weight_N=torch.ones(len(items_N)),
        offsets=torch.tensor([0, *(len(history) for history in histories)]).cumsum(0),
        items_N=items_N,
    )


def found(judge: DinJudge, *histories: list[int]) -> torch.Tensor:
    """What candidates 0 to 3 find of each history, ``[U, 4, W]``."""
    query = judge.embedding(judge.embed_items()[:4]).expand(len(histories), -1, -1)
    return judge.interest(judge.encode(lived(judge, *histories)), query)


def test_dice_is_the_identity_at_alpha_one_and_half_at_the_mean() -> None:
    dice, x = Dice(3), 2 * torch.randn(500, 3, generator=seeded(0)) + 5
    with torch.no_grad():
        dice.alpha.fill_(1.0)
        torch.testing.assert_close(dice(x), x)
        dice.alpha.zero_()
        mean = x.mean(0, keepdim=True)
        at_mean = dice(torch.cat([x, 2 * mean - x, mean]))[-1:]  # a batch whose mean is that row
        torch.testing.assert_close(at_mean, mean / 2, rtol=1e-4, atol=1e-4)
    assert dice.norm.running_mean is not None
    seen = dice.norm.running_mean.clone()
    dice.eval()(x)
    assert torch.equal(dice.norm.running_mean, seen), "what is judged is not learned from"


@pytest.mark.parametrize("config", [DinConfig(form=form, ages=True) for form in FORMS] + [DinConfig(mean_pool=True)])
def test_the_order_of_a_history_does_not_matter(config: DinConfig) -> None:
    judge = made(config)
    history, order = lived(judge, [1, 2, 3, 4]), torch.tensor([2, 0, 3, 1])
    shown = judge.embed_items()[None]
    one = judge.score(judge.encode(history), shown)
    torch.testing.assert_close(judge.score(judge.encode(history.rows(order, history.offsets)), shown), one)


def test_doubling_a_history_doubles_what_the_paper_finds_and_not_what_the_code_finds() -> None:
    paper, code = (made(DinConfig(form=form)) for form in FORMS[::-1])
    torch.testing.assert_close(found(paper, [1, 2, 1, 2]), 2 * found(paper, [1, 2]))
    torch.testing.assert_close(found(code, [1, 2, 1, 2]), found(code, [1, 2]))
    assert float(found(code, [1, 2]).detach().abs().max()) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_what_is_found_depends_on_who_asks_and_mean_pooling_does_not(form: Form) -> None:
    """Each is the sum over its history with the weights that ``weights`` tells."""
    judge = made(DinConfig(form=form))
    history = lived(judge, [1, 2, 3], [5])
    query = judge.embedding(judge.embed_items()[:4]).expand(2, -1, -1)
    state = judge.encode(history)
    weight_UCT, keys_UTW = judge.weights(state, query, history.real_UT()), history.pad(state.keys_NW)
    torch.testing.assert_close(judge.interest(state, query), weight_UCT @ keys_UTW, rtol=1e-4, atol=1e-5)
    assert bool((weight_UCT[1, :, 1:] == 0).all())
    assert float(weight_UCT[0].detach().std(0).max()) > 1e-4
    pooled = found(made(DinConfig(mean_pool=True)), [1, 2, 3], [5])
    torch.testing.assert_close(pooled, pooled[:, :1].expand_as(pooled))


def test_the_unit_is_the_paper_s_formula_written_out() -> None:
    judge = made(DinConfig(form="din_paper", activation="prelu", width=4, unit=5))
    history = lived(judge, [1, 2, 3])
    keys, query = judge.encode(history).keys_NW, judge.embedding(judge.embed_items()[0])
    wanted = torch.zeros(4)
    for key in keys:
        wanted = wanted + judge.unit(torch.cat([query, key, query - key, query * key])[None])[0] * key
    torch.testing.assert_close(found(judge, [1, 2, 3])[0, 0], wanted, rtol=1e-4, atol=1e-5)


def test_weights_and_ages_change_a_score_and_plain_ones_do_not() -> None:
    judge, shown = made(DinConfig(ages=True)), torch.zeros(1, 1, 8)
    torch.nn.init.normal_(judge.ages.weight)
    plain = lived(judge, [1, 2])
    scores = [
        judge.score(judge.encode(history), shown)
        for history in (
            plain,
            replace(plain, weight_N=torch.tensor([1.0, 3.0])),
            replace(plain, age_days_N=torch.tensor([90.0, 0.0])),
        )
    ]
    assert not torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    blind = made(DinConfig())
    assert torch.equal(
        *(blind.encode(replace(plain, age_days_N=ages)).keys_NW for ages in (torch.ones(2), torch.zeros(2)))
    )


def test_mini_batch_aware_l2_leaves_unseen_rows_exactly_as_they_are() -> None:
    judge = made(DinConfig(mba_l2=0.5)).train()
    items_UC = torch.tensor([[3, 4, -1]])
    batch = TrainBatch(
        history=lived(judge, [1, 2, 2]),
        items_UC=items_UC,
        candidates_UCD=judge.embed_items()[items_UC.clamp_min(0)].detach(),
        positives=1,
    )
    loss, parts = judge.loss(batch, seeded(0))
    table = judge.items.identity.weight
    (grad,) = torch.autograd.grad(loss, table)
    seen = torch.tensor([1, 2, 3, 4])
    wanted = torch.zeros_like(table)
    wanted[seen] = 0.5 * table[seen].detach() / (seen + 1)[:, None]  # item i was met i + 1 times
    torch.testing.assert_close(grad, wanted)
    assert torch.equal(parts["mba_l2"], mini_batch_aware_l2(table, seen, judge.counts_I).detach())


@pytest.mark.parametrize("form", FORMS)
def test_a_catalogue_that_is_shown_as_it_is_gives_the_same_loss_and_gradients(form: Form) -> None:
    judge = made(DinConfig(form=form)).train()
    items_UC, items_ID = torch.tensor([[3, 4, -1], [1, 7, 8]]), judge.embed_items()
    history = lived(judge, [1, 2, 2, 5, 6, 8, 9, 3], [4, 4, 7, 0, 11, 2])
    batch = TrainBatch(
        history=replace(history, features_ND=items_ID[history.items_N]),
        items_UC=items_UC,
        candidates_UCD=items_ID[items_UC.clamp_min(0)],
        positives=1,
    )
    found = {}
    for name, catalogue_ID in (("rows", None), ("once", items_ID)):
        loss, _ = judge.loss(replace(batch, catalogue_ID=catalogue_ID), seeded(0))
        leaves = [judge.embedding.weight, judge.items.identity.weight]
        found[name] = loss, *torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(found["once"], found["rows"])


@pytest.mark.parametrize(
    "config", [*(DinConfig(form=form, activation="prelu") for form in FORMS), DinConfig(mean_pool=True)]
)
def test_explain_is_leaving_out(config: DinConfig) -> None:
    judge = made(config)
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    history = replace(lived(judge, [1, 2, 2, 7], [], [5]), weight_N=weight)
    shown = judge.embed_items()[:3].detach().expand(3, -1, -1)
    torch.testing.assert_close(
        judge.explain(history, shown), ContentJudge.explain(judge, history, shown), rtol=1e-4, atol=1e-5
    )


def test_scores_in_parts_are_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = made(DinConfig())
    state, shown = judge.encode(lived(judge, [1, 2, 3], [4])), judge.embed_items().expand(2, -1, -1)
    whole = judge.score(state, shown)
    monkeypatch.setattr("couturier.components.interest.judges.din._PAIRS", 30)
    with torch.no_grad():
        torch.testing.assert_close(judge.score(state, shown), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"form": "din"}, {"activation": "relu"}, {"unit": 0}, {"mba_l2": -1.0}])
def test_wrong_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DinConfig(**wrong)  # type: ignore[arg-type]


def test_it_reads_and_names_the_behaviours_of_the_candidate_s_category(tmp_path: Path) -> None:
    habits = world.habits(0, users=200, length=26, faithful=1.0)
    log = planted_log(tmp_path, habits.taken, world.ITEMS)
    config = replace(world.settings(0, history=24, steps=150, batch=48), model="din", eval_every=150)
    judge = fit_log(log, world.content(), config).judge
    items_ID = judge.embed_items()
    # One behaviour a category, each of its own flavour, and another item of each of those cells to be judged.
    category_T = torch.arange(world.CATEGORIES)
    history_T = (category_T * world.FLAVOURS + category_T % world.FLAVOURS) * world.EACH
    shown = items_ID[history_T + 1]
    history = HistoryBatch(
        features_ND=items_ID[history_T],
        age_days_N=torch.ones(len(history_T)),
        weight_N=torch.ones(len(history_T)),
        offsets=torch.tensor([0, len(history_T)]),
    )
    parts_CT = judge.explain(history, shown[None])[0]
    assert (parts_CT.argmax(1) == torch.arange(world.CATEGORIES)).sum() >= world.CATEGORIES - 1


@pytest.mark.slow
def test_attention_beats_the_mean_where_only_the_same_category_counts(tmp_path: Path) -> None:
    _, low, _ = world.compare(0, tmp_path).difference()
    assert low > 0.1
