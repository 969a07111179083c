"""The attention judge: what may change a score, what may not, and explanations that add nothing of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from couturier.components.data.formats import Windows
from couturier.components.errors import ConfigError
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judge import history_batch, load_judge
from couturier.components.interest.judges.attention import AttentionConfig, AttentionJudge
from couturier.components.interest.types import HistoryBatch

from .conftest import StageOf
from .planted import CATEGORIES, PER_CATEGORY, World, category_of

HALF = 4  # the first half of a planted history is new and liked, the second old and no longer liked


@pytest.fixture(scope="module")
def attention(stage_of: StageOf) -> AttentionJudge:
    judge = load_judge(stage_of("attention").out / "judge")
    assert isinstance(judge, AttentionJudge)
    return judge


@pytest.fixture(scope="module")
def test_windows(world: World) -> Windows:
    return Windows.load(world.folder, "test")


def _batch(judge: AttentionJudge, windows: Windows, count: int = 30) -> HistoryBatch:
    return history_batch(windows, np.arange(count), judge.embed_items())


def _everything(judge: AttentionJudge, users: int) -> torch.Tensor:
    return judge.embed_items(words=False).expand(users, -1, -1)


def test_the_order_of_a_history_does_not_matter(attention: AttentionJudge, test_windows: Windows) -> None:
    batch = _batch(attention, test_windows)
    length = int(batch.lengths[0])
    order = torch.cat([start + torch.randperm(length) for start in batch.offsets[:-1].tolist()])
    shuffled = HistoryBatch(
        features_ND=batch.features_ND[order],
        age_days_N=batch.age_days_N[order],
        weight_N=batch.weight_N[order],
        offsets=batch.offsets,
    )
    shown = _everything(attention, len(batch))
    one, two = (attention.score(attention.encode(each), shown) for each in (batch, shuffled))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_candidates_do_not_see_each_other(attention: AttentionJudge, test_windows: Windows) -> None:
    batch = _batch(attention, test_windows)
    state, shown = attention.encode(batch), _everything(attention, len(batch))
    together = attention.score(state, shown)
    torch.testing.assert_close(attention.score(state, shown[:, 5:6]), together[:, 5:6], rtol=1e-4, atol=1e-4)


def test_what_was_liked_lately_counts_and_what_was_liked_long_ago_does_not(
    attention: AttentionJudge, test_windows: Windows
) -> None:
    """Planted: the kinds of the last days are taken next, the kind of half a year ago is not."""
    count = len(test_windows)
    logits = attention.score(attention.encode(_batch(attention, test_windows, count)), _everything(attention, count))
    kind_WK = category_of(test_windows.favourites_WK)
    kind_logit_WC = logits.view(count, CATEGORIES, PER_CATEGORY).mean(-1).numpy()
    rows = np.arange(count)
    new, old = kind_logit_WC[rows, kind_WK[:, 0]], kind_logit_WC[rows, kind_WK[:, HALF]]
    assert (new > old).mean() > 0.85
    aged = _batch(attention, test_windows, count)
    swapped = replace(aged, age_days_N=aged.age_days_N.view(count, -1).flip(1).flatten())
    again = attention.score(attention.encode(swapped), _everything(attention, count))
    flipped = again.view(count, CATEGORIES, PER_CATEGORY).mean(-1).numpy()
    assert (flipped[rows, kind_WK[:, HALF]] > kind_logit_WC[rows, kind_WK[:, HALF]]).mean() > 0.85


def test_explain_points_at_the_planted_reason(attention: AttentionJudge, test_windows: Windows) -> None:
    """For a candidate of a liked kind the history items of that kind say most; the sum over others is small."""
    count = len(test_windows)
    batch = _batch(attention, test_windows, count)
    new_W = torch.from_numpy(test_windows.favourites_WK[:, 0].astype(np.int64))
    shown = attention.embed_items(words=False)[new_W][:, None]
    parts_WT = attention.explain(batch, shown)[:, 0].numpy()
    kind_WT = category_of(test_windows.favourites_WK)
    same_WT = kind_WT == kind_WT[:, :1]
    assert parts_WT[same_WT].mean() > 0.1
    assert parts_WT[same_WT].mean() > 4 * abs(parts_WT[~same_WT].mean())


def test_explain_is_the_score_with_minus_the_score_without(attention: AttentionJudge, test_windows: Windows) -> None:
    batch = _batch(attention, test_windows, 3)
    # Without weights there are no shares of the weight, which an explanation leaves as they were.
    batch = replace(batch, weight_N=torch.zeros_like(batch.weight_N))
    shown = _everything(attention, 3)
    parts = attention.explain(batch, shown)
    whole, length = attention.score(attention.encode(batch), shown), int(batch.lengths[0])
    for left_out in range(length):
        kept = (torch.arange(3 * length) % length) != left_out
        without = HistoryBatch(
            features_ND=batch.features_ND[kept],
            age_days_N=batch.age_days_N[kept],
            weight_N=batch.weight_N[kept],
            offsets=torch.arange(4) * (length - 1),
        )
        wanted = whole - attention.score(attention.encode(without), shown)
        torch.testing.assert_close(parts[:, :, left_out], wanted, rtol=1e-3, atol=2e-4)


def test_the_only_item_explains_all_that_is_not_the_default(attention: AttentionJudge) -> None:
    items, shown = attention.embed_items(), _everything(attention, 1)
    batch = HistoryBatch(
        features_ND=items[:1], age_days_N=torch.ones(1), weight_N=torch.zeros(1), offsets=torch.tensor([0, 1])
    )
    nothing = attention.score(attention.encode(HistoryBatch.empty(users=1, width=attention.width)), shown)
    whole = attention.score(attention.encode(batch), shown)
    torch.testing.assert_close(attention.explain(batch, shown)[..., 0], whole - nothing, rtol=1e-3, atol=2e-4)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="heads"):
        AttentionConfig(heads=0)


@pytest.mark.parametrize("ids", [0, 16])
def test_with_identities_what_was_taken_is_told_from_what_looks_the_same(ids: int) -> None:
    torch.manual_seed(0)
    content = Content.of_vectors(torch.ones(3, 4))
    judge = AttentionJudge(AttentionConfig(), FeatureConfig(words=0, ids=ids), content).eval()
    items_ID = judge.embed_items().detach()
    history = HistoryBatch(
        features_ND=items_ID[:1], age_days_N=torch.ones(1), weight_N=torch.ones(1), offsets=torch.tensor([0, 1])
    )
    state = judge.encode(history)
    seen_CL = judge._likeness(state, items_ID[None])[0]
    assert seen_CL.shape[1] == (9 if ids else 7)
    assert torch.allclose(seen_CL[1, :7], seen_CL[0, :7]), "alike by their pictures"
    if ids:
        assert bool((seen_CL[0, 7:] > 1000 * seen_CL[1:, 7:]).all())
        drawn = judge._likeness(state, judge.embed_items(words=False)[None])[0]
        assert bool((drawn[:, 7:] < 1e-6).all()), "what never existed has no identity to share"
    explained = judge.explain(history, items_ID[None])
    without = judge.score(judge.encode(HistoryBatch.empty(users=1, width=judge.width)), items_ID[None])
    assert torch.allclose(explained[0, :, 0], (judge.score(state, items_ID[None]) - without)[0], atol=1e-5)
