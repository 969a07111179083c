"""Each figure of the table against its definition, done the slow way or known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import linalg

from couturier.components.data.formats import Catalogue
from couturier.components.evaluation.encoder import AttributeReader, ItemFinder, load_encoder
from couturier.components.evaluation.metrics import (
    CUTS,
    Ruler,
    Truth,
    between_users,
    frechet,
    retrieval,
    within,
)

from . import planted

BASKETS, HISTORIES = [[0, 4, 9], [7], [12, 13]], [[0, 1, 2], [20, 21], [12, 5]]


def _members(rows: list[list[int]], items: int) -> torch.Tensor:
    found = torch.zeros(len(rows), items, dtype=torch.bool)
    for place, row in enumerate(rows):
        found[place, row] = True
    return found


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return planted.catalogue()


@pytest.fixture(scope="module")
def ruler(catalogue: Catalogue) -> Ruler:
    finder = ItemFinder(load_encoder(), catalogue)
    return Ruler(finder, AttributeReader(finder, catalogue), catalogue)


@pytest.fixture(scope="module")
def truth(catalogue: Catalogue) -> Truth:
    return Truth(
        basket_VI=_members(BASKETS, len(catalogue)),
        history_VI=_members(HISTORIES, len(catalogue)),
        target_V=torch.tensor([basket[0] for basket in BASKETS]),
        user_V=torch.tensor([0, 1, 2]),
    )


def _measured(ruler: Ruler, truth: Truth, items: list[list[int]]) -> dict[str, np.ndarray]:
    rows = torch.tensor(items)
    return ruler.measure(rows, truth, torch.ones(rows.shape))


def test_pictures_of_the_next_basket_are_perfect(ruler: Ruler, truth: Truth) -> None:
    found = _measured(ruler, truth, [[0, 4, 9, 0], [7, 7, 7, 7], [12, 13, 12, 13]])
    for name in ("basket_precision", "hr_target", "validity", "category", "department", "brand"):
        assert found[name].tolist() == [1, 1, 1], name
    for cut in CUTS:
        assert found[f"hit@{cut}"].tolist() == [1, 1, 1]
        assert found[f"ndcg@{cut}"].tolist() == pytest.approx([1, 1, 1])
    assert found["sim_next"].tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert found["judge"].tolist() == [1, 1, 1]


def test_shares_are_counted_by_hand(ruler: Ruler, truth: Truth) -> None:
    found = _measured(ruler, truth, [[0, 1, 9, 3], [20, 20, 7, 3], [12, 5, 5, 5]])
    assert found["basket_precision"].tolist() == [0.5, 0.25, 0.25]
    assert found["distinct_hits"].tolist() == [0.5, 0.25, 0.25]
    assert found["copied"].tolist() == [0.5, 0.5, 1.0]
    assert found["novelty"].tolist() == [0.5, 0.5, 0.0]
    assert found["basket_precision_new"][:2].tolist() == [0.5, 0.5]
    assert found["distinct"].tolist() == [1.0, 0.75, 0.5]
    assert found["hr_target"].tolist() == [1, 1, 1]


def test_a_hit_shown_again_is_found_once(ruler: Ruler, truth: Truth) -> None:
    found = _measured(ruler, truth, [[0, 0, 0, 0], [7, 7, 3, 3], [12, 13, 13, 5]])
    assert found["basket_precision"].tolist() == [1.0, 0.5, 0.75]
    assert found["distinct_hits"].tolist() == [0.25, 0.25, 0.5]


def test_likeness_to_the_history_is_highest_for_copies(ruler: Ruler, truth: Truth) -> None:
    copies = _measured(ruler, truth, [[0, 1], [20, 21], [12, 5]])
    others = _measured(ruler, truth, [[15, 16], [3, 4], [22, 23]])
    assert copies["sim_history"].tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert (others["sim_history"] < 0.999).all()


def test_mush_is_not_valid_however_it_looks_to_the_encoder(catalogue: Catalogue, truth: Truth) -> None:
    finder = ItemFinder(load_encoder(), catalogue)
    ruler = Ruler(finder, AttributeReader(finder, catalogue), catalogue)
    codec = planted.ListCodec(catalogue)
    rows = finder.look(torch.tensor([[0, 0], [1, 2], [7, 0], [7, 2], [12, 2], [13, 2]]), codec).view(3, 2)
    found = ruler.measure(rows, truth, torch.zeros(3, 2))
    assert found["validity"].tolist() == [0.5, 0.5, 0.0]
    assert found["mush"].tolist() == [0.5, 0.5, 1.0]


def test_ranking_the_catalogue_agrees_with_the_textbook() -> None:
    random = torch.Generator().manual_seed(0)
    score = torch.rand(5, 60, generator=random)
    relevant = torch.rand(5, 60, generator=random) < 0.08
    relevant[:, 3] = True
    found = retrieval(score, relevant)
    for v in range(5):
        order = sorted(range(60), key=lambda i: -float(score[v, i]))
        for cut in CUTS:
            gains = [float(relevant[v, i]) for i in order[:cut]]
            dcg = sum(gain / math.log2(place + 2) for place, gain in enumerate(gains))
            ideal = sum(1 / math.log2(place + 2) for place in range(min(cut, int(relevant[v].sum()))))
            assert found[f"hit@{cut}"][v] == float(any(gains))
            assert float(found[f"ndcg@{cut}"][v]) == pytest.approx(dcg / ideal, abs=1e-5)


def test_a_catalogue_smaller_than_the_cut_is_no_trouble() -> None:
    found = retrieval(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[True, False, False]]))
    assert found["hit@50"].item() == 1
    assert found["ndcg@10"].item() == pytest.approx(1 / math.log2(4))


def test_distances_within_and_between_people_agree_with_all_pairs() -> None:
    f = F.normalize(torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    user = torch.tensor([0, 0, 1, 2])
    for v in range(4):
        pairs = [1 - f[v, i] @ f[v, j] for i in range(3) for j in range(3) if i != j]
        assert within(f)[v].item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
        far = [1 - f[v, i] @ f[w, j] for w in range(4) if user[w] != user[v] for i in range(3) for j in range(3)]
        assert between_users(f, user)[v].item() == pytest.approx(torch.stack(far).mean().item(), abs=1e-5)
    assert within(f[:, :1]).tolist() == [0, 0, 0, 0]


def test_people_who_get_their_own_pictures_differ_more_between_than_within(ruler: Ruler, truth: Truth) -> None:
    found = _measured(ruler, truth, [[0, 0, 0], [7, 7, 7], [13, 13, 13]])
    assert (found["between_user"] > found["diversity"]).all()
    assert np.abs(found["diversity"]).max() < 1e-5


def test_frechet_is_the_textbook_distance() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4000, 6)), rng.normal(size=(4000, 6)) @ np.diag([1, 2, 1, 1, 0.5, 1]) + 0.3
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    one, two = np.cov(a.T), np.cov(b.T)
    textbook = mean + np.trace(one + two - 2 * linalg.sqrtm(one @ two).real)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    assert frechet(x, y) == pytest.approx(textbook, rel=0.05)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-6)
    assert frechet(x, x + 1) < frechet(x, x + 2)


def test_frechet_stands_fewer_pictures_than_axes() -> None:
    random = torch.Generator().manual_seed(1)
    few = frechet(torch.randn(5, 32, generator=random), torch.randn(7, 32, generator=random))
    assert math.isfinite(few) and few > 0


def test_figures_of_the_whole_row(ruler: Ruler, catalogue: Catalogue) -> None:
    everything = torch.arange(len(catalogue)).view(4, 6)
    real = np.arange(len(catalogue))
    same, narrow = ruler.whole_row(everything, real), ruler.whole_row(torch.zeros(4, 6, dtype=torch.long), real)
    assert same["coverage"] == 1.0
    assert same["frechet"] == pytest.approx(0, abs=1e-4)
    assert narrow["coverage"] == pytest.approx(1 / len(catalogue))
    assert narrow["frechet"] > same["frechet"]
