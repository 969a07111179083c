"""The multimodal judge against its card: alignment, new items, drift, attribution, missing modalities, behaviours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from couturier.components.data.formats import Windows
from couturier.components.errors import ConfigError, DataError
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judge import history_batch, load_judge, save_judge
from couturier.components.interest.judges.multimodal import MultimodalConfig, MultimodalJudge
from couturier.components.interest.modalities import retrieval
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed

from ..conftest import StageOf
from ..planted import World, category_of
from ..worlds import multimodal as videos
from ..worlds import multimodal_kinds, multimodal_surfaces

ITEMS, VIEW = 30, 5
PIECES = (f"picture:{VIEW}", f"audio:{VIEW}")
SMALL = MultimodalConfig(width=8, heads=2, hidden=12, modalities=PIECES, recent=6)


def made(config: MultimodalConfig = SMALL) -> MultimodalJudge:
    with global_seed(0, "multimodal"):
        content = Content.of_vectors(torch.randn(ITEMS, 2 * VIEW))
        judge = MultimodalJudge(config, FeatureConfig(words=0, ids=3), content)
        torch.nn.init.normal_(judge.evolution.since.weight, std=0.3)
        torch.nn.init.normal_(judge.evolution.strength.weight, std=0.5)
    return judge.eval()


def lived(judge: ContentJudge, lengths: list[int]) -> HistoryBatch:
    """Random items, kinds and values, in no order."""
    random, n = torch.Generator().manual_seed(0), sum(lengths)
    items = torch.randint(ITEMS, (n,), generator=random)
    return HistoryBatch(
        features_ND=judge.embed_items().detach()[items],
        age_days_N=60 * torch.rand(n, generator=random),
        weight_N=0.2 + torch.rand(n, generator=random),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        kind_N=torch.randint(3, (n,), generator=random),
        value_N=torch.rand(n, generator=random),
        items_N=items,
    )


def shown(judge: ContentJudge, users: int, count: int = 4) -> Tensor:
    return judge.embed_items().detach()[:count].expand(users, -1, -1)


@pytest.mark.parametrize("lengths", [[4, 0, 1], [20, 6, 7, 0, 1]], ids=["short", "longer than is asked"])
def test_explain_is_the_score_with_minus_the_score_without(lengths: list[int]) -> None:
    """With gaps that say nothing, because an explanation leaves them as they were."""
    judge = made()
    torch.nn.init.zeros_(judge.evolution.gap.weight)
    history = lived(judge, lengths)
    parts = judge.explain(history, shown(judge, len(lengths)))
    wanted = ContentJudge.explain(judge, history, shown(judge, len(lengths)))
    torch.testing.assert_close(parts, wanted, rtol=1e-3, atol=1e-5)
    assert float(parts.abs().max()) > 1e-3


def test_shares_of_behaviours_and_the_prior_make_one() -> None:
    judge = made()
    history = lived(judge, [20, 3, 0, 1])
    reasons = judge.reasons(history, shown(judge, 4))
    total = reasons.behaviour_UT.sum(1)
    assert bool((reasons.behaviour_UT >= 0).all()) and bool((total <= 1 + 1e-5).all())
    assert float(total[2]) == 0 and float(total[3]) > 0.5
    assert bool((reasons.behaviour_UT[1, 3:] == 0).all())
    alone = judge.reasons(history.rows(torch.arange(20), torch.tensor([0, 20])), shown(judge, 1))
    torch.testing.assert_close(reasons.behaviour_UT[:1], alone.behaviour_UT, rtol=1e-4, atol=1e-6)


def test_shares_stand_in_the_order_of_the_history() -> None:
    judge = made()
    history = lived(judge, [9])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    moved = history.rows(order, history.offsets)
    before, after = (judge.reasons(each, shown(judge, 1)).behaviour_UT[0] for each in (history, moved))
    torch.testing.assert_close(after, before[order], rtol=1e-4, atol=1e-6)
    parts = [judge.explain(each, shown(judge, 1))[0] for each in (history, moved)]
    torch.testing.assert_close(parts[1], parts[0][:, order], rtol=1e-3, atol=1e-5)


def test_what_a_modality_adds_is_the_score_less_that_without_it() -> None:
    judge = made()
    history, candidates = lived(judge, [6, 2]), shown(judge, 2)
    reasons = judge.reasons(history, candidates)
    assert reasons.names == ("picture", "audio") and reasons.without_UCM.shape == (2, 4, 2)
    whole = judge.score(judge.encode(history), candidates)
    for place in range(2):
        piece = slice(place * VIEW, (place + 1) * VIEW)
        silent, silent_history = candidates.clone(), history.features_ND.clone()
        silent[..., piece], silent_history[:, piece] = 0, 0
        without = judge.score(judge.encode(replace(history, features_ND=silent_history)), silent)
        torch.testing.assert_close(reasons.without_UCM[..., place], whole - without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gone", [[0], [1], [0, 1]])
def test_missing_modalities_give_numbers(gone: list[int]) -> None:
    judge = made()
    history, candidates = lived(judge, [6, 0]), shown(judge, 2).clone()
    features = history.features_ND.clone()
    for place in gone:
        candidates[..., place * VIEW : (place + 1) * VIEW] = 0
        features[..., place * VIEW : (place + 1) * VIEW] = 0
    history = replace(history, features_ND=features)
    assert bool(torch.isfinite(judge.score(judge.encode(history), candidates)).all())
    assert bool(torch.isfinite(judge.reasons(history, candidates).without_UCM).all())


def test_a_trace_is_the_interest_after_each_behaviour() -> None:
    """Row t of a trace is what encoding the first t + 1 behaviours gives, seen at that moment."""
    judge = made()
    history = lived(judge, [9, 0, 3])
    trace = judge.interest_trace(history)
    ordered = history.oldest_first()
    for place in range(9):
        part = ordered.rows(torch.arange(place + 1), torch.tensor([0, place + 1]))
        seen = replace(part, age_days_N=part.age_days_N - part.age_days_N[-1])
        torch.testing.assert_close(trace.interest_UTE[0, place], judge.encode(seen).user_UE[0], rtol=1e-4, atol=1e-5)
    assert float(trace.drift_UT[:, 0].abs().max()) == 0 and float(trace.drift_UT[2, 3:].abs().max()) == 0
    ages = history.age_days_N[:9][trace.row_UT[0]]
    assert bool((ages.diff() <= 0).all()) and sorted(trace.row_UT[0].tolist()) == list(range(9))
    assert trace.row_UT[1].tolist() == [-1] * 9 and trace.label(0, 0) is None


def test_a_trace_of_years_has_numbers_and_of_nobody_none() -> None:
    judge = made()
    history = lived(judge, [600])
    old = replace(history, age_days_N=100_000 * torch.rand(600, generator=torch.Generator().manual_seed(1)))
    trace = judge.interest_trace(old)
    assert bool(torch.isfinite(trace.interest_UTE).all()) and trace.drift_UT.shape == (1, 600)
    nobody = judge.interest_trace(HistoryBatch.empty(users=2, width=judge.width), {"all": judge.embed_items()})
    assert nobody.drift_UT.shape == (2, 0) and nobody.labels == ("all",)


def test_a_faded_history_falls_back_on_the_prior() -> None:
    judge = made()
    with torch.no_grad():
        judge.evolution.gate.weight.zero_()
        judge.evolution.gate.bias.fill_(-50.0)
    history = lived(judge, [5])
    empty = judge.encode(HistoryBatch.empty(users=1, width=judge.width)).user_UE
    now, late = judge.encode(history), judge.encode(replace(history, age_days_N=history.age_days_N + 3000))
    torch.testing.assert_close(late.user_UE, empty, rtol=1e-4, atol=1e-5)
    assert float((now.user_UE - empty).detach().norm()) > 0.1


def test_kinds_and_values_change_what_a_behaviour_says() -> None:
    judge = made()
    history = lived(judge, [6])
    before = judge.encode(history).user_UE
    assert history.kind_N is not None and history.value_N is not None
    for changed in (
        replace(history, kind_N=(history.kind_N + 1) % 3),
        replace(history, value_N=1 - history.value_N),
    ):
        assert float((judge.encode(changed).user_UE - before).detach().norm()) > 1e-2
    beyond = replace(history, kind_N=history.kind_N * 0 + 99)
    last = replace(history, kind_N=history.kind_N * 0 + judge.config.kinds - 1)
    torch.testing.assert_close(judge.encode(beyond).user_UE, judge.encode(last).user_UE)


def test_every_loss_has_its_part_and_every_weight_its_gradient() -> None:
    judge = made().train()
    items_UC = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch = TrainBatch(
        history=lived(judge, [9, 4]), items_UC=items_UC, candidates_UCD=judge.embed_items()[items_UC], positives=1
    )
    loss, parts = judge.loss(batch, torch.Generator().manual_seed(0))
    loss.backward()
    assert set(parts) == {"ranking", "bce", "align", "kind", "value"}
    assert all(value.grad is not None for value in judge.parameters())
    plain = replace(batch, history=replace(batch.history, kind_N=None, value_N=None))
    assert set(judge.loss(plain, torch.Generator())[1]) == {"ranking", "bce", "align"}


def test_chances_of_kinds_are_chances() -> None:
    judge = made()
    kinds, values = judge.behaviour(judge.encode(lived(judge, [9, 0])), shown(judge, 2))
    assert kinds.shape == (2, 4, judge.config.kinds) and values.shape == (2, 4)
    torch.testing.assert_close(kinds.sum(-1), torch.ones(2, 4))


def test_a_saved_judge_keeps_its_modalities(tmp_path: Path) -> None:
    judge = made()
    save_judge(judge, tmp_path, vocabulary=[])
    again = load_judge(tmp_path)
    assert isinstance(again, MultimodalJudge) and again.modalities.names == ("picture", "audio")
    history = lived(judge, [5])
    torch.testing.assert_close(
        again.score(again.encode(history), shown(judge, 1)), judge.score(judge.encode(history), shown(judge, 1))
    )


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
    """An item of the candidate's kind speaks for it and others do not; a trace ends at a liked kind."""
    judge, windows = load_judge(stage_of("multimodal").out / "judge"), Windows.load(world.folder, "test")
    assert isinstance(judge, MultimodalJudge)
    batch = history_batch(windows, np.arange(len(windows)), judge.embed_items())
    pictures = judge.embed_items(words=False)
    newest_W = torch.from_numpy(windows.favourites_WK[:, 0].astype(np.int64))
    parts_WT = judge.explain(batch, pictures[newest_W][:, None])[:, 0].numpy()
    kind_WT = category_of(windows.favourites_WK)
    same_WT = kind_WT == kind_WT[:, :1]
    assert parts_WT[same_WT].mean() > 0.2 and parts_WT[~same_WT].mean() < 0
    assert same_WT[np.arange(len(parts_WT)), parts_WT.argmax(1)].mean() > 0.95
    kinds = category_of(np.arange(len(pictures)))
    trace = judge.interest_trace(batch, {str(kind): pictures[kinds == kind] for kind in range(8)})
    last = np.array([int(trace.label(row, 7) or -1) for row in range(len(batch))])
    assert (last[:, None] == world.likes["test"]).any(1).mean() > 0.8


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"fade_days": 0.0}, {"recent": 0}, {"modalities": ("audio",)}])
def test_wrong_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MultimodalConfig(**wrong)  # type: ignore[arg-type]


def test_a_trace_refuses_what_is_no_number() -> None:
    judge = made()
    history = lived(judge, [3])
    with pytest.raises(DataError, match="age_days_N"):
        judge.interest_trace(replace(history, age_days_N=history.age_days_N * torch.nan))


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A fitted judge in a world of videos."""

    world: videos.World
    judge: MultimodalJudge
    history: HistoryBatch


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    world = videos.plant(0)
    judge = videos.fitted(world, videos.logged(world, tmp_path_factory.mktemp("videos")), seed=0, steps=360)
    return Watched(world=world, judge=judge, history=videos.histories(world, judge.embed_items()))


@pytest.mark.slow
def test_views_of_items_nobody_met_find_each_other(watched: Watched) -> None:
    views = watched.judge.modalities(watched.judge.embed_items()[videos.WARM :]).views_XME
    assert retrieval(views, 0, 1) > 0.9


@pytest.mark.slow
def test_drift_peaks_where_tastes_switched(watched: Watched) -> None:
    """After the first few behaviours, from which an interest is still forming."""
    formed = 5
    drift_UT = watched.judge.interest_trace(watched.history).drift_UT[:, formed:]
    late = drift_UT.argmax(1) + formed - watched.world.switch
    assert 0 <= int(drift_UT.mean(0).argmax()) + formed - watched.world.switch <= 3
    assert float(((late >= 0) & (late <= 4)).float().mean()) > 0.7


@pytest.mark.slow
def test_a_masked_modality_costs_a_little(watched: Watched) -> None:
    judge, world = watched.judge, watched.world
    whole, best = (values.mean() for values in videos.new_item_aucs(world, judge, seed=0))
    assert whole > best - 0.1
    judge_of = {}
    for place, name in enumerate(videos.PIECES):
        piece = slice(place * videos.VIEW, (place + 1) * videos.VIEW)
        shown_all = judge.items.pictures_IP.clone()
        judge.items.pictures_IP[:, piece] = 0
        judge_of[name] = videos.new_item_aucs(world, judge, seed=0)[0].mean()
        judge.items.pictures_IP.copy_(shown_all)
    assert all(0.65 < value < whole + 0.01 for value in judge_of.values())


@pytest.mark.slow
def test_the_like_head_reads_the_behaviours(watched: Watched) -> None:
    """A person's liked topic against the one only watched; with likes and views shuffled that is a guess."""

    def like_auc(history: HistoryBatch) -> float:
        world, judge = watched.world, watched.judge
        items_ID, state = judge.embed_items(), judge.encode(history)
        kinds, _ = judge.behaviour(state, items_ID.expand(len(history), -1, -1))
        like_UI = kinds[..., videos.KINDS.index("like")].numpy()
        liked = np.stack([like_UI[u, world.topic_I == topic] for u, topic in enumerate(world.liked_U2[:, 1])])
        seen = np.stack([like_UI[u, world.topic_I == topic] for u, topic in enumerate(world.watched_U2[:, 1])])
        return float((liked[:, :, None] > seen[:, None]).mean())

    history = watched.history
    assert history.kind_N is not None and history.value_N is not None
    order = torch.randperm(len(history.kind_N), generator=torch.Generator().manual_seed(0))
    shuffled = replace(history, kind_N=history.kind_N[order], value_N=history.value_N[order])
    assert like_auc(history) > 0.6 and like_auc(history) > like_auc(shuffled) + 0.08


@pytest.mark.slow
def test_the_only_modality_that_says_anything_is_named(tmp_path: Path) -> None:
    world = videos.plant(1, heard=True)
    judge = videos.fitted(world, videos.logged(world, tmp_path), seed=1)
    items_ID = judge.embed_items()
    reasons = judge.reasons(videos.histories(world, items_ID), items_ID[videos.WARM :].expand(len(world.taken), -1, -1))
    picture, audio = reasons.without_UCM.abs().mean((0, 1)).tolist()
    assert reasons.names == ("picture", "audio") and audio > 3 * picture
    assert float((reasons.candidate_weight_UCM[..., 1] > 0.5).float().mean()) > 0.9


@pytest.mark.slow
def test_new_items_are_known_by_content_alone(tmp_path: Path) -> None:
    found = videos.compare(2, tmp_path)
    assert abs(found.other_U.mean() - 0.5) < 0.02 and found.difference()[1] > 0.15


@pytest.mark.slow
def test_pictures_find_sounds_by_the_alignment(tmp_path: Path) -> None:
    found = multimodal_surfaces.compare(0, tmp_path)
    assert found.difference()[1] > 0.03


@pytest.mark.slow
def test_kinds_are_read_as_what_they_are() -> None:
    """And without them the same judge is no better than one that never read any."""
    found, judge, people = multimodal_kinds.run(0)
    assert found.difference()[1] > 0.15 and found.ours_U.mean() > 0.93
    assert multimodal_kinds.aucs(people, judge, seed=0, blind=True).mean() < found.other_U.mean() + 0.05
