"""DMF: decoupled attention is the plain one, its price does not depend on the projection, and alpha picks a path."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from couturier.components.data.formats import Windows
from couturier.components.errors import ConfigError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judge import history_batch, load_judge
from couturier.components.interest.judges.dmf import DmfConfig, DmfJudge
from couturier.components.interest.tiers import bucket, tier_sums
from couturier.components.interest.types import HistoryBatch
from couturier.components.runtime import global_seed

from ..conftest import StageOf
from ..planted import World, category_of

ITEMS, WIDTH = 30, 8
SMALL = DmfConfig(width=6, likeness_width=4, hidden=8)


def made(config: DmfConfig = SMALL) -> DmfJudge:
    with global_seed(0, "dmf"):
        judge = DmfJudge(config, FeatureConfig(words=0, ids=3), Content.of_vectors(torch.randn(ITEMS, WIDTH)))
        torch.nn.init.normal_(judge.amount.by_age.weight, std=0.1)
    return judge.eval()


def lived(judge: ContentJudge, lengths: list[int]) -> HistoryBatch:
    random, n = torch.Generator().manual_seed(0), sum(lengths)
    items = torch.randint(ITEMS, (n,), generator=random)
    return HistoryBatch(
        features_ND=judge.embed_items().detach()[items],
        age_days_N=100 * torch.rand(n, generator=random),
        weight_N=0.2 + torch.rand(n, generator=random),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
    )


def shown(judge: ContentJudge, users: int, count: int = 5) -> Tensor:
    return judge.embed_items().detach()[:count].expand(users, -1, -1)


def early_fusion(judge: DmfJudge, history: HistoryBatch, candidates_CD: Tensor) -> Tensor:
    """One user's pooled interest ``[C, E]``, every pair's likeness embedding projected beside its behaviour."""
    looks_CP, looks_TP = judge.looks(candidates_CD), judge.looks(history.features_ND)
    likeness_CTL = judge.likeness(bucket(looks_CP @ looks_TP.T, judge.config.buckets))
    both_CTX = torch.cat([history.features_ND.expand(len(looks_CP), -1, -1), likeness_CTL], dim=-1)
    keys_CTE, values_CTE = (
        torch.nn.functional.linear(both_CTX, torch.cat([own.weight, of.weight], dim=1), own.bias)
        for own, of in ((judge.key, judge.key_of), (judge.value, judge.value_of))
    )
    logit_CT = (judge.query(candidates_CD)[:, None] * keys_CTE).sum(-1) / judge.config.width**0.5
    weight_CT = logit_CT.exp() * judge.amount(history)
    return (weight_CT[..., None] * values_CTE).sum(1) / weight_CT.sum(1, keepdim=True)


def test_decoupled_is_early_fusion_to_a_millionth() -> None:
    judge = made().double()
    history = lived(judge, [9])
    history = replace(history, age_days_N=history.age_days_N.double(), weight_N=history.weight_N.double())
    state, candidates = judge._encode(history), shown(judge, 1)
    cosine = judge.looks(candidates) @ state.looks_UTP.transpose(1, 2)
    _, _, pooled = judge.attention(state, judge.query(candidates), bucket(cosine, 35))
    torch.testing.assert_close(pooled[0], early_fusion(judge, history, candidates[0]), rtol=1e-6, atol=1e-6)


def test_gradients_of_the_decoupled_form_are_those_of_the_plain_one() -> None:
    judge = made().double()
    history = lived(judge, [9])
    history = replace(history, age_days_N=history.age_days_N.double(), weight_N=history.weight_N.double())
    names = ("likeness.weight", "key_of.weight", "value_of.weight", "key.weight", "query.bias")
    values = [dict(judge.named_parameters())[name] for name in names]
    state, candidates = judge._encode(history), shown(judge, 1)
    cosine = judge.looks(candidates) @ state.looks_UTP.transpose(1, 2)
    _, _, pooled = judge.attention(state, judge.query(candidates), bucket(cosine, 35))
    ours = torch.autograd.grad(pooled.square().sum(), values)
    theirs = torch.autograd.grad(early_fusion(judge, history, candidates[0]).square().sum(), values)
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8, msg=name)


def flops(judge: DmfJudge, candidates: int) -> int:
    state, features = judge.encode(lived(judge, [40])), torch.randn(1, candidates, judge.width)
    with FlopCounterMode(display=False) as counter:
        judge.score(state, features)
    return counter.get_total_flops()


def test_what_a_candidate_costs_does_not_depend_on_the_width_of_likeness() -> None:
    """A wide likeness is projected once for all candidates: 35 rows a table, whatever there is to score."""
    narrow, wide = made(), made(replace(SMALL, likeness_width=256))
    once = 2 * 2 * 35 * (256 - 4) * SMALL.width
    assert flops(wide, 1200) - flops(narrow, 1200) == flops(wide, 1) - flops(narrow, 1) == once


@pytest.mark.parametrize(("alpha", "silent"), [(1.0, ("tiers", "centric")), (0.0, ("enriched", "key", "likeness"))])
def test_alpha_at_an_end_leaves_one_path(alpha: float, silent: tuple[str, ...]) -> None:
    judge = made(replace(SMALL, alpha=alpha))
    history = lived(judge, [7, 2])
    before = judge.score(judge.encode(history), shown(judge, 2))
    with torch.no_grad():
        for name, value in judge.named_parameters():
            if name.split(".")[0] in silent:
                value.add_(1.0)
    torch.testing.assert_close(judge.score(judge.encode(history), shown(judge, 2)), before)
    with torch.no_grad():
        for name, value in judge.named_parameters():
            if name.split(".")[0] in ("tiers", "centric", "enriched", "value"):
                value.add_(1.0)
    assert float((judge.score(judge.encode(history), shown(judge, 2)) - before).abs().max()) > 1e-3


def test_padded_places_fall_into_no_bucket() -> None:
    judge = made()
    state, candidates = judge.encode(lived(judge, [7, 2, 0])), shown(judge, 3)
    cosine = judge.looks(candidates) @ state.looks_UTP.transpose(1, 2)
    sums = tier_sums(bucket(cosine, 10), state.amount_UT[:, None], 10)
    torch.testing.assert_close(sums.sum(-1), state.amount_UT.sum(1, keepdim=True).expand(3, 5))
    weight, _, pooled = judge.attention(state, judge.query(candidates), bucket(cosine, 35))
    torch.testing.assert_close(weight.sum(-1), torch.tensor([[1.0], [1.0], [0.0]]).expand(3, 5))
    assert float(weight[1, :, 2:].abs().max()) == 0 and float(pooled[2].abs().max()) == 0


def test_a_weight_of_two_is_a_behaviour_that_happened_twice() -> None:
    judge = made()
    once = replace(lived(judge, [5]), weight_N=torch.ones(5))
    twice = replace(once, weight_N=torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]))
    repeated = once.rows(torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([0, 6]))
    one, other = (judge.score(judge.encode(each), shown(judge, 1)) for each in (twice, repeated))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharp", [1.0, 30.0], ids=["spread", "one item is nearly everything"])
def test_explain_is_the_score_with_minus_the_score_without(sharp: float) -> None:
    judge = made()
    with torch.no_grad():
        judge.query.weight.mul_(sharp)
    history = lived(judge, [12, 0, 1, 3])
    parts = judge.explain(history, shown(judge, 4))
    wanted = ContentJudge.explain(judge, history, shown(judge, 4))
    torch.testing.assert_close(parts, wanted, rtol=1e-3, atol=1e-4)
    assert float(parts.abs().max()) > 1e-3


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
    judge, windows = load_judge(stage_of("dmf").out / "judge"), Windows.load(world.folder, "test")
    batch = history_batch(windows, np.arange(len(windows)), judge.embed_items())
    newest_W = torch.from_numpy(windows.favourites_WK[:, 0].astype(np.int64))
    parts_WT = judge.explain(batch, judge.embed_items(words=False)[newest_W][:, None])[:, 0].numpy()
    kind_WT = category_of(windows.favourites_WK)
    same_WT = kind_WT == kind_WT[:, :1]
    assert parts_WT[same_WT].mean() > 0.1
    assert parts_WT[same_WT].mean() > 3 * abs(parts_WT[~same_WT].mean())


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="alpha"):
        DmfConfig(alpha=1.5)
    with pytest.raises(ConfigError, match="buckets"):
        DmfConfig(buckets=0)
