"""AW-MoE: its sums against plain loops, its reductions, and what the contrast does to its gates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from couturier.components.errors import ConfigError
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges import aw_moe
from couturier.components.interest.judges.aw_moe import AwMoeConfig, AwMoeJudge, gate_contrast
from couturier.components.interest.masking import thinned, with_strangers
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed, seeded
from couturier.kernels.target_attention import mlp_attention

from ..worlds import aw_moe as world

ITEMS, WIDTH = 20, 6
SMALL = AwMoeConfig(experts=3, width=5, unit=4, hidden=6)


def judge_of(config: AwMoeConfig = SMALL) -> AwMoeJudge:
    with global_seed(0, "test"):
        return AwMoeJudge(config, FeatureConfig(words=0), Content.of_vectors(torch.randn(ITEMS, WIDTH))).eval()


def history_of(judge: AwMoeJudge, lengths: list[int], *, seed: int = 0) -> HistoryBatch:
    random = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    return HistoryBatch(
        features_ND=judge.embed_items()[torch.randint(ITEMS, (n,), generator=random)].detach(),
        age_days_N=50 * torch.rand(n, generator=random),
        weight_N=0.5 + torch.rand(n, generator=random),
        offsets=torch.tensor([0, *np.cumsum(lengths)]),
    )


def shown(judge: AwMoeJudge, users: int) -> torch.Tensor:
    return judge.embed_items()[:7].expand(users, -1, -1)


def by_hand(judge: AwMoeJudge, history: HistoryBatch, user: int, target_E: torch.Tensor) -> torch.Tensor:
    """The card's formulas for one user and one target, a behaviour at a time."""
    state, f = judge.encode(history), judge.config.unit
    length = int(history.lengths[user])
    matches, gate, amounts = [], torch.zeros(judge.config.experts), state.amount_UT[user, :length]
    for b_E, amount in zip(state.behaviours_UTE[user, :length], amounts, strict=True):
        hidden = (judge.first.weight @ torch.cat([b_E, target_E, b_E * target_E]) + judge.first.bias).relu()
        matches.append(judge.attention(hidden[:f])[0] + amount.log())
        gate = gate + amount * judge.activation(hidden[f : 2 * f]) * judge.gate(hidden[2 * f :])
    pooled = torch.stack(matches).softmax(0) @ state.behaviours_UTE[user, :length]
    x = torch.cat([pooled, target_E, pooled * target_E])
    answers = (judge.experts(x).relu().view(judge.config.experts, -1) * judge.answers).sum(1) + judge.offset
    return (gate / amounts.sum() * answers).sum()


def test_it_is_the_formula_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = judge_of()
    history = history_of(judge, [4, 1, 9])
    logits = judge.score(judge.encode(history), shown(judge, 3))
    targets = judge.item(judge.embed_items()[:7])
    wanted = torch.stack(
        [torch.stack([by_hand(judge, history, user, target) for target in targets]) for user in range(3)]
    )
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(aw_moe, "_PIECE", 1)  # a candidate at a time
    torch.testing.assert_close(judge.score(judge.encode(history), shown(judge, 3)), logits)


def test_one_expert_is_din_times_a_scalar() -> None:
    """V is what DIN's operator finds with the same first layer, and the logit the expert's answer times the gate."""
    judge = judge_of(replace(SMALL, experts=1))
    history = replace(history_of(judge, [4, 6]), weight_N=torch.ones(10))
    e, f = 5, 4
    state, targets = judge.encode(history), judge.item(shown(judge, 2))
    own, target, both = judge.first.weight[:f].split(e, dim=1)
    first = torch.cat([target, own, torch.zeros(f, e), both], dim=1)
    layers = [(first, judge.first.bias[:f]), (judge.attention.weight * e**0.5, None)]
    keys = state.behaviours_UTE[history.real_UT()]
    pooled = mlp_attention(targets, keys, history.offsets, layers, activations=[torch.relu])
    x = torch.cat([pooled, targets, pooled * targets], dim=-1)
    din = (judge.experts(x).relu() * judge.answers[0]).sum(-1) + judge.offset
    gates = judge.gates(state, shown(judge, 2))[..., 0]
    torch.testing.assert_close(judge.score(state, shown(judge, 2)), din * gates, atol=1e-5, rtol=1e-4)


def test_a_weight_of_two_is_the_row_twice_and_order_is_nothing() -> None:
    judge = judge_of()
    history = replace(history_of(judge, [4]), weight_N=torch.tensor([1.0, 2.0, 1.0, 1.0]))
    twice = replace(history.rows(torch.tensor([3, 1, 0, 1, 2]), torch.tensor([0, 5])), weight_N=torch.ones(5))
    one, two = (judge.score(judge.encode(each), shown(judge, 1)) for each in (history, twice))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_an_empty_history_has_the_learned_gate() -> None:
    judge = judge_of()
    history = history_of(judge, [0, 3])
    gates = judge.gates(judge.encode(history), shown(judge, 2))
    torch.testing.assert_close(gates[0], judge.usual.expand(7, -1))
    assert not torch.allclose(gates[1], judge.usual.expand(7, -1))


def test_explain_is_the_score_with_minus_the_score_without() -> None:
    judge = judge_of()
    history = history_of(judge, [5, 1, 0])
    parts, whole = judge.explain(history, shown(judge, 3)), judge.score(judge.encode(history), shown(judge, 3))
    for left_out in range(6):
        user, place = (0, left_out) if left_out < 5 else (1, 0)
        rows = (torch.arange(6) != left_out).nonzero()[:, 0]
        offsets = torch.tensor([end - (end > left_out) for end in (0, 5, 6, 6)])
        without = judge.score(judge.encode(history.rows(rows, offsets)), shown(judge, 3))
        torch.testing.assert_close(parts[user, :, place], (whole - without)[user], atol=1e-5, rtol=1e-4)
    assert not parts[1, :, 1:].any() and not parts[2].any()


def test_the_contrast_is_info_nce_over_cosines() -> None:
    thin, whole = torch.randn(4, 3), torch.randn(4, 3)
    terms = []
    for user in range(4):
        likeness = torch.stack([F.cosine_similarity(thin[user], other, dim=0) for other in whole]) / 0.3
        terms.append(likeness.logsumexp(0) - likeness[user])
    torch.testing.assert_close(gate_contrast(thin, whole, 0.3), torch.stack(terms).mean())
    assert float(gate_contrast(thin[:1], whole[:1], 0.3)) == 0


def test_masks_leave_users_in_place_and_come_from_the_noise() -> None:
    judge = judge_of()
    history = history_of(judge, [2000, 0, 2000])
    thin = thinned(history, 0.3, seeded(0))
    assert len(thin) == 3 and int(thin.lengths[1]) == 0
    assert abs(float(thin.lengths.sum()) / 4000 - 0.7) < 0.05
    assert torch.equal(thin.features_ND, thinned(history, 0.3, seeded(0)).features_ND)
    strangers = with_strangers(history_of(judge, [3] * 1000), 0.2, seeded(1))
    assert set(strangers.lengths.tolist()) == {0, 3}
    assert abs(float((strangers.lengths == 0).float().mean()) - 0.2) < 0.05


def test_gates_of_thinned_histories_come_closer_with_the_contrast_and_not_without() -> None:
    """The same steps on the same histories, with and without it; whole and thinned gates compared afterwards."""
    closeness = {}
    for contrast in (0.0, 1.0):
        judge = judge_of(replace(SMALL, contrast=contrast, mask=0.5, strangers=0.0)).train()
        history = history_of(judge, [6] * 64)
        items = torch.randint(ITEMS, (64, 5), generator=torch.Generator().manual_seed(1))
        batch = TrainBatch(history=history, items_UC=items, candidates_UCD=judge.embed_items()[items], positives=1)
        optimiser = torch.optim.Adam(judge.parameters(), lr=1e-2)
        for step in range(40):
            optimiser.zero_grad()
            judge.loss(batch, seeded(0, str(step)))[0].backward()
            optimiser.step()
        with torch.no_grad():
            asked = batch.candidates_UCD[:1, :1].expand(64, -1, -1)
            whole, thin = (
                judge.gates(judge.encode(each), asked)[:, 0] for each in (history, thinned(history, 0.5, seeded(9)))
            )
        some = (thin != judge.usual).any(1)
        own = F.cosine_similarity(thin, whole)[some]
        others = F.cosine_similarity(thin, whole.roll(1, 0))[some]
        closeness[contrast] = float((own - others).mean())
    assert closeness[1.0] > closeness[0.0] + 0.1


def test_wrong_settings_are_named() -> None:
    for wrong in ({"mask": 1.0}, {"temperature": 0.0}, {"experts": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            AwMoeConfig(**wrong)


@pytest.mark.slow
def test_short_histories_are_judged_no_worse_than_by_din_and_gates_know_who_somebody_is() -> None:
    """Better is not proven at every seed; see the world."""
    found = world.run(0)
    difference, low, _ = found.comparison.difference()
    assert difference > 0 and low > -0.005
    assert found.comparison.best_U is not None and found.comparison.best_U.mean() > found.comparison.ours_U.mean()
    assert found.silhouette() > 0.3


@pytest.mark.slow
def test_the_contrast_helps_short_histories() -> None:
    assert world.run(0, other="aw_moe without contrast").comparison.difference()[1] > 0
