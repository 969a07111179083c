"""SDIM: the table is the attention it stands for, of one size for any history, and grows without reading it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.sdim import SdimConfig, SdimJudge
from couturier.components.interest.log_fit import fit_log
from couturier.components.interest.types import HistoryBatch
from couturier.components.runtime import global_seed, seeded
from couturier.kernels.hash_sampling import lookup, random_planes

from ..worlds import din as habits_world
from ..worlds import sdim as world
from ..worlds.base import planted_log

ITEMS = 30
SMALL = SdimConfig(width=8, groups=5, bits=2, short=3, heads=2)


def made(config: SdimConfig = SMALL) -> SdimJudge:
    with global_seed(0, "test"):
        judge = SdimJudge(config, FeatureConfig(words=0), Content.of_vectors(torch.randn(ITEMS, 5)))
    return judge.eval().requires_grad_(False)


def lived(judge: SdimJudge, lengths: list[int], *, seed: int = 0) -> HistoryBatch:
    random, n = seeded(seed), sum(lengths)
    ages = [float(length - place) for length in lengths for place in range(length)]
    return HistoryBatch(
        features_ND=judge.embed_items()[torch.randint(ITEMS, (n,), generator=random)],
        age_days_N=torch.tensor(ages),
        weight_N=3 * torch.rand(n, generator=random),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        in_time_order=True,
    )


def long_of(judge: SdimJudge, history: HistoryBatch, query_CW: torch.Tensor) -> torch.Tensor:
    """What the table of the first user holds for each candidate."""
    rows = torch.zeros(len(query_CW), dtype=torch.int64)
    return lookup(judge.encode(history).table, query_CW, judge.planes, row_user=rows)


def test_the_table_answers_as_comparing_every_pair_does() -> None:
    judge = made()
    history, query_CW = lived(judge, [40]), judge.embedding(judge.embed_items())
    keys_TW = judge.embedding(history.features_ND)
    wanted = torch.zeros_like(query_CW)
    for group in range(SMALL.groups):
        plane = judge.planes[:, group]
        meets_CT = ((query_CW @ plane > 0)[:, None] == (keys_TW @ plane > 0)[None]).all(-1)
        wanted += F.normalize(meets_CT.float() @ (keys_TW * history.weight_N[:, None]), dim=-1) / SMALL.groups
    torch.testing.assert_close(long_of(judge, history, query_CW), wanted, rtol=1e-4, atol=1e-6)


def test_collisions_follow_the_angle() -> None:
    """``(1 - theta / pi)^b`` within three standard errors of 20,000 draws."""
    bits, draws = 3, 20_000
    planes = random_planes(2, groups=draws, bits=bits, seed=1)
    for degrees in (10.0, 45.0, 90.0, 150.0):
        theta = torch.tensor(degrees).deg2rad()
        both = torch.tensor([[1.0, 0.0], [float(theta.cos()), float(theta.sin())]])
        sides = torch.einsum("nd,dgb->ngb", both, planes) > 0
        share = float((sides[0] == sides[1]).all(-1).float().mean())
        chance = (1 - degrees / 180) ** bits
        assert abs(share - chance) < 3 * (chance * (1 - chance) / draws) ** 0.5


def test_with_many_groups_it_is_attention_with_the_kernel_of_the_angle() -> None:
    """Of opposite, nearly opposite and near behaviours each alone: the mean over groups is its chance to collide."""
    judge = made(SdimConfig(width=8, groups=4000, bits=2, short=1, heads=1))
    for seed in range(3):
        history = lived(judge, [1], seed=seed)
        key_W, query_CW = judge.embedding(history.features_ND)[0], judge.embedding(judge.embed_items()[:6])
        theta_C = F.cosine_similarity(query_CW, key_W[None], dim=-1).clamp(-1, 1).acos()
        wanted_C = (1 - theta_C / torch.pi) ** 2
        found_CW = long_of(judge, history, query_CW)
        torch.testing.assert_close(found_CW.norm(dim=-1), wanted_C, rtol=0, atol=3 * 0.5 / 4000**0.5)
        same_C = wanted_C > 0.1
        assert float(F.cosine_similarity(found_CW, key_W[None], dim=-1)[same_C].min()) > 0.999


def test_a_state_is_of_one_size_and_grows_without_reading_again() -> None:
    judge = made()
    sizes = {
        tuple(value.shape for value in vars(judge.encode(lived(judge, [length]))).values()) for length in (0, 2, 500)
    }
    assert len(sizes) == 1
    whole = lived(judge, [9, 4, 0, 2])
    cut = torch.tensor([5, 4, 0, 0])  # so many of each came before
    place = torch.arange(len(whole.features_ND)) - whole.offsets[whole.users_N]
    old = place < cut[whole.users_N]
    parts = []
    for kept in (old, ~old):
        counts = torch.bincount(whole.users_N[kept], minlength=4)
        parts.append(whole.rows(kept.nonzero()[:, 0], torch.cat([counts.new_zeros(1), counts.cumsum(0)])))
    grown, anew = judge.update(judge.encode(parts[0]), parts[1]), judge.encode(whole)
    for name, value in vars(anew).items():
        torch.testing.assert_close(vars(grown)[name], value, msg=name)
    with pytest.raises(DataError, match="4 users"):
        judge.update(grown, lived(judge, [1]))


def test_the_newest_are_read_in_any_order_and_older_ones_only_through_the_table() -> None:
    judge = made()
    history = lived(judge, [7, 2])
    order = torch.tensor([3, 0, 6, 2, 1, 5, 4, 8, 7])
    mixed = replace(history.rows(order, history.offsets), in_time_order=False)
    one, two = judge.encode(history), judge.encode(mixed)
    torch.testing.assert_close(one.short_USW, two.short_USW)
    assert one.real_US.tolist() == [[True] * 3, [False, True, True]]
    torch.testing.assert_close(one.short_USW[0], judge.embedding(history.features_ND[4:7]))


def test_nothing_in_the_bucket_is_nothing_and_the_length_of_a_vector_plays_no_part() -> None:
    judge = made()
    history, query = lived(judge, [1]), judge.embedding(judge.embed_items())
    key_1W = judge.embedding(history.features_ND)
    assert bool((long_of(judge, history, -key_1W) == 0).all()), "the opposite of a vector shares no signature with it"
    assert bool((long_of(judge, lived(judge, [0]), query) == 0).all())
    torch.testing.assert_close(long_of(judge, history, 7 * query), long_of(judge, history, query))
    heavy = replace(history, weight_N=5 * history.weight_N)
    torch.testing.assert_close(long_of(judge, heavy, query), long_of(judge, history, query))


def test_gradients_reach_behaviours_through_the_table() -> None:
    judge = made().requires_grad_(True)
    history = lived(judge, [30])
    state = judge.encode(replace(history, features_ND=history.features_ND.detach()))
    rows = torch.zeros(6, dtype=torch.int64)
    lookup(state.table, judge.embedding(judge.embed_items()[:6]).detach(), judge.planes, row_user=rows).sum().backward()
    assert judge.embedding.weight.grad is not None and float(judge.embedding.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("in_time_order", [True, False])
def test_explain_is_leaving_out(in_time_order: bool) -> None:
    """Also where an item had a bucket for itself, and where an older one takes its place among the newest."""
    judge = made()
    history = replace(lived(judge, [9, 0, 2, 3]), in_time_order=in_time_order)
    shown = judge.embed_items()[:4].expand(4, -1, -1)
    torch.testing.assert_close(
        judge.explain(history, shown), ContentJudge.explain(judge, history, shown), rtol=1e-4, atol=1e-5
    )


def test_scores_in_parts_are_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = made()
    state, shown = judge.encode(lived(judge, [20, 3])), judge.embed_items().expand(2, -1, -1)
    with torch.no_grad():
        whole = judge.score(state, shown)
        monkeypatch.setattr("couturier.components.interest.judges.sdim._PAIRS", 30)
        torch.testing.assert_close(judge.score(state, shown), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"bits": 17}, {"groups": 0}])
def test_wrong_settings_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SdimConfig(**wrong)


def test_a_long_history_is_read_and_its_reasons_named(tmp_path: Path) -> None:
    habits = habits_world.habits(0, users=120, length=62, faithful=1.0)
    log = planted_log(tmp_path, habits.taken, habits_world.ITEMS)
    config = replace(habits_world.settings(0, history=60, steps=120, batch=32), model="sdim", eval_every=120)
    judge = fit_log(log, habits_world.content(), config).judge
    items_ID, each = judge.embed_items(), habits_world.EACH
    cells = torch.tensor([0, 5, 10, 15])  # one behaviour in each of four categories, each of another flavour
    history = HistoryBatch(
        features_ND=items_ID[cells * each],
        age_days_N=torch.ones(4),
        weight_N=torch.ones(4),
        offsets=torch.tensor([0, 4]),
    )
    parts_CT = judge.explain(history, items_ID[cells * each + 1][None])[0]
    assert parts_CT.argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_it_finds_what_reading_everything_finds(tmp_path: Path) -> None:
    mean, low, high = world.compare(0, tmp_path).difference()
    assert low > -0.03, f"{mean:.3f} [{low:.3f}, {high:.3f}]"
