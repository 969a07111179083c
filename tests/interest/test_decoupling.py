"""The two gradients on one table: they add up, and what is known about them is found."""

from __future__ import annotations

import pytest
import torch

from couturier.components.errors import ConfigError
from couturier.components.interest.decoupling import GradientPaths, gradient_paths, untied
from couturier.components.interest.items import Content, FeatureConfig
from couturier.components.interest.judges.dare import DareConfig, DareJudge
from couturier.components.interest.types import HistoryBatch, TrainBatch
from couturier.components.runtime import global_seed


@pytest.fixture
def tied() -> DareJudge:
    config = DareConfig(attention=8, representation=8, time_width=4, times=10, top=3, hidden=10, tied=True)
    with global_seed(0, "tied"):
        return DareJudge(config, FeatureConfig(words=0), Content.of_vectors(torch.eye(9)))


@pytest.fixture
def batch(tied: DareJudge) -> TrainBatch:
    items_N, items_UC = torch.tensor([0, 1, 2, 3, 4, 1, 1]), torch.tensor([[5, 1, 2], [1, 6, 7]])
    history = HistoryBatch(
        features_ND=tied.embed_items()[items_N],
        age_days_N=torch.arange(7.0),
        weight_N=torch.ones(7),
        offsets=torch.tensor([0, 5, 7]),
    )
    return TrainBatch(history=history, items_UC=items_UC, candidates_UCD=tied.embed_items()[items_UC], positives=1)


def test_the_two_paths_add_up_to_the_gradient_of_the_one_table(tied: DareJudge, batch: TrainBatch) -> None:
    paths = gradient_paths(tied, batch)
    loss, _ = tied.loss(batch, torch.Generator())
    loss.backward()
    both_HD = paths.attention_HD + paths.representation_HD
    torch.testing.assert_close(both_HD, tied.representation.weight.grad)
    assert paths.attention_HD.any() and paths.representation_HD.any()
    assert paths.touched_D.tolist() == [True] * 8 + [False], "item 8 is in no history and no candidate"


def test_untying_keeps_every_score(tied: DareJudge, batch: TrainBatch) -> None:
    apart = untied(tied)
    for judge in (tied, apart):
        judge.eval()
    one, other = (judge.score(judge.encode(batch.history), batch.candidates_UCD) for judge in (tied, apart))
    assert torch.equal(one, other)
    assert apart.attention.weight is not apart.representation.weight
    with pytest.raises(ConfigError, match="two tables already|fit with tied=True"):
        untied(apart)


def test_conflict_and_domination_are_what_they_say() -> None:
    pulls = GradientPaths(
        attention_HD=torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]),
        representation_HD=torch.tensor([[-3.0, 2.0, 5.0, 4.0], [0.0, 0.0, 0.0, 4.0]]),
    )
    assert pulls.touched_D.tolist() == [True, True, False, True]
    torch.testing.assert_close(pulls.cosine_D, torch.tensor([-1.0, 1.0, 0.0, 1.0]))
    assert pulls.conflict() == pytest.approx(1 / 3) and pulls.domination() == pytest.approx(3.0)
    still = GradientPaths(attention_HD=torch.zeros(2, 2), representation_HD=torch.ones(2, 2))
    assert still.conflict() == 0.0 and still.domination() == 1.0
