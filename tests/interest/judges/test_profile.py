"""The profile judge: a history read in pieces leaves the same profile, of one size, and says why."""

from __future__ import annotations

import pytest
import torch

from couturier.components.errors import ConfigError
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.profile import ProfileConfig, ProfileJudge
from couturier.components.interest.layers import keep_all
from couturier.components.interest.types import HistoryBatch

ITEMS, WIDTH = 12, 6


@pytest.fixture(scope="module")
def judge() -> ProfileJudge:
    torch.manual_seed(0)
    content = Content.of_vectors(torch.randn(ITEMS, WIDTH))
    judge = ProfileJudge(ProfileConfig(width=16, heads=4), FeatureConfig(words=0), content)
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return judge.eval().requires_grad_(False)


def lived(judge: ProfileJudge, *histories: list[int]) -> HistoryBatch:
    items = torch.tensor([item for history in histories for item in history], dtype=torch.int64)
    ages = [float(len(history) - place) for history in histories for place in range(len(history))]
    return HistoryBatch(
        features_ND=judge.embed_items()[items],
        age_days_N=torch.tensor(ages),
        weight_N=torch.ones(len(items)),
        offsets=torch.tensor([0, *(len(history) for history in histories)]).cumsum(0),
        items_N=items,
    )


@pytest.mark.parametrize("cut", [0, 1, 33, 64, 70])
def test_a_history_in_two_pieces_leaves_the_same_profile(judge: ProfileJudge, cut: int) -> None:
    random = torch.Generator().manual_seed(1)
    whole = [torch.randint(ITEMS, (70,), generator=random).tolist() for _ in range(3)]
    at_once = judge.encode(lived(judge, *whole))
    first = judge.encode(lived(judge, *(history[:cut] for history in whole)))
    then = judge.extend(first, lived(judge, *(history[cut:] for history in whole)))
    torch.testing.assert_close(then.memory_UHEE, at_once.memory_UHEE, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(then.state_UW, at_once.state_UW, rtol=1e-4, atol=1e-5)


def test_a_profile_is_as_large_for_ten_thousand_as_for_ten(judge: ProfileJudge) -> None:
    few, many = judge.encode(lived(judge, [1] * 10)), judge.encode(lived(judge, list(range(ITEMS)) * 850))
    assert few.memory_UHEE.shape == many.memory_UHEE.shape and torch.isfinite(many.state_UW).all()


def test_what_came_later_changes_no_earlier_state(judge: ProfileJudge) -> None:
    one, other = [1, 2, 3, 4], [1, 2, 9, 0]
    states = [
        judge._states(lived(judge, history), judge.tower(judge.embed_items()[history]), keep_all)
        for history in (one, other)
    ]
    assert torch.equal(states[0][:2], states[1][:2]) and not torch.equal(states[0][2:], states[1][2:])


def test_old_behaviours_fade_at_the_pace_of_their_head(judge: ProfileJudge) -> None:
    base, more = judge.encode(lived(judge, [5])), judge.encode(lived(judge, [5] + [5] * 3))
    own_HEE = base.memory_UHEE[0]
    lam_H = (-judge.slopes_H).exp()
    wanted_HEE = own_HEE * (1 + lam_H + lam_H**2 + lam_H**3)[:, None, None]
    torch.testing.assert_close(more.memory_UHEE[0], wanted_HEE, rtol=1e-4, atol=1e-5)
    assert lam_H[0] == pytest.approx(0.5) and lam_H[-1] > 0.999


def test_explain_is_the_logit_less_the_logit_without(judge: ProfileJudge) -> None:
    history = lived(judge, [3, 1, 4, 1, 5], [])
    shown = judge.embed_items()[:4].expand(2, -1, -1)
    parts, whole = judge.explain(history, shown), judge.score(judge.encode(history), shown)
    without = judge.score(judge.encode(lived(judge, [3, 1, 1, 5], [])), shown)
    torch.testing.assert_close(parts[0, :, 2], whole[0] - without[0], rtol=1e-4, atol=1e-5)
    assert not parts[1].any()


def test_a_half_life_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="longest_half_life"):
        ProfileConfig(longest_half_life=0.5)
