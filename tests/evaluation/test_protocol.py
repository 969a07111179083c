"""What each row shows, worked out by hand; and a generator that reads histories is told from strangers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from couturier.components.data.formats import Windows
from couturier.components.errors import DataError
from couturier.components.evaluation import protocol
from couturier.components.evaluation.protocol import Plan, World
from couturier.components.generator.janus import JanusGenerator
from couturier.components.runtime import seeded

from .conftest import ITEMS, Made, small_catalogue, small_windows

N = 4


class Planted:
    """Draws items of the history it is given, at random by the user's seed; without one, items 0 to 3."""

    def __init__(self, codes_IL: Tensor) -> None:
        self.codes_IL, self.calls = codes_IL, 0

    def sample(
        self, favourites_UK: np.ndarray, n: int, *, seeds: list[int], guidance: float = 1.0, temperature: float = 1.0
    ) -> Tensor:
        self.calls += 1
        picked = []
        for row, seed in zip(favourites_UK, seeds, strict=True):
            known = row[row >= 0] if guidance else np.arange(4)
            picked.append(known[torch.randint(len(known), (n,), generator=seeded(seed, "planted")).numpy()])
        return self.codes_IL[torch.from_numpy(np.stack(picked).astype(np.int64))]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.of(small_windows("test", 9), seed=0, windows_per_user=2)


def _world(made: Made, plan: Plan, drawn: Path | None = None, *, batch: int = 8) -> World:
    return World(
        small_catalogue(),
        plan,
        tokenise=made.inputs["tokenise"],
        judge=made.inputs["judge"],
        pictures=N,
        batch=batch,
        drawn=drawn,
        advance=lambda done: None,
    )


@pytest.fixture(scope="module")
def world(made: Made, plan: Plan) -> World:
    return _world(made, plan)


@pytest.fixture(scope="module")
def planted(world: World) -> JanusGenerator:
    return _planted(world)[1]


def _planted(world: World) -> tuple[Planted, JanusGenerator]:
    """A planted generator, once as itself and once as what a world draws from."""
    generator = Planted(world.codes_IL)
    return generator, cast(JanusGenerator, generator)


def _copied(world: World, rows_Vn: Tensor) -> Tensor:
    """Share of pictures whose own item is in the window's true history, ``[V]``."""
    return world.truth.history_VI.gather(1, world.finder.nearest_R[rows_Vn]).double().mean(1)


def test_seeds_belong_to_the_window_whoever_else_is_asked() -> None:
    windows = small_windows("test", 9)
    whole = Plan.of(windows, seed=0, windows_per_user=2)
    few = Plan.of(windows, seed=0, windows_per_user=1, max_users=4)
    assert few.rows_V.tolist() == [0, 2, 4, 6]
    assert few.seeds == [whole.seeds[row] for row in few.rows_V]
    assert len(set(whole.seeds)) == len(whole)
    assert set(whole.seeds).isdisjoint(Plan.of(windows, seed=1, windows_per_user=2).seeds)


def test_the_wrong_user_is_always_somebody_else(plan: Plan) -> None:
    assert (plan.windows.user_W[plan.wrong_V] != plan.user_V).all()
    assert len(set(plan.wrong_V.tolist())) == len(plan)  # everybody is somebody's wrong user


def test_nobody_to_evaluate_is_an_error_in_words() -> None:
    empty = small_windows("test", 9)
    nobody = Windows(**{**vars(empty), "users": [], "user_W": empty.user_W[:0]})
    with pytest.raises(DataError, match="no test window"):
        Plan.of(nobody, seed=0, windows_per_user=2)


def test_rules_show_what_they_say(world: World, plan: Plan) -> None:
    favourites, last = protocol.copy_favourites(world), protocol.copy_last(world)
    for v, row in enumerate(plan.rows_V):
        history = plan.windows.favourites_WK[row]
        history = history[history >= 0]
        assert favourites[v].tolist() == np.resize(history, N).tolist()
        assert last[v].tolist() == np.resize(history[::-1], N).tolist()
    assert protocol.popularity(world).tolist() == [[0, 1, 2, 3]] * len(plan)
    random = protocol.random_item(world)
    assert torch.equal(random, protocol.random_item(world))
    assert random.min() >= 0 and random.max() < ITEMS and len(random.unique()) > ITEMS / 2


def test_the_nearest_item_to_a_history_of_one_item_is_that_item(made: Made, plan: Plan) -> None:
    windows = small_windows("test", 9)
    windows.favourites_WK[:, 1:] = -1
    alone = _world(made, Plan.of(windows, seed=0, windows_per_user=2))
    assert protocol.nearest_item(alone)[:, 0].tolist() == windows.favourites_WK[:, 0].tolist()


def test_equal_novelty_and_equal_repeats_with_the_best_items_shown_most(world: World, plan: Plan) -> None:
    random = np.random.default_rng(0)
    shown = torch.from_numpy(random.choice(ITEMS // 2, (len(plan), N)))  # few items: many repeats
    selling = world.popular_I.tolist()
    near_VI = protocol.likeness(world).argsort(dim=1, descending=True, stable=True).tolist()
    for rule in protocol.AT_EQUAL_NOVELTY:
        control = protocol.at_equal_novelty(world, shown, rule)
        assert control.shape == shown.shape
        for v, history_I in enumerate(world.truth.history_VI.tolist()):
            favourites = [i for i in plan.favourites_VK[v].tolist() if i >= 0]
            order = near_VI[v] if rule == "nearest_item_eq" else selling
            old = favourites if rule == "copy_favourites_eq" else sorted(favourites, key=order.index)
            new = [i for i in order if not history_I[i]]
            for group, ranked in ((True, old), (False, new)):
                wanted = sorted(Counter(i for i in shown[v].tolist() if history_I[i] == group).values(), reverse=True)
                given = Counter(i for i in control[v].tolist() if history_I[i] == group)
                assert given == dict(zip(ranked, wanted, strict=False))


def test_a_generator_that_reads_histories_is_told_from_strangers(
    world: World, plan: Plan, planted: JanusGenerator
) -> None:
    own = _copied(world, world.look(world.draw("own", planted)))
    strangers = plan.windows.favourites_WK[plan.wrong_V]
    wrong = _copied(world, world.look(world.draw("wrong", planted, favourites_VK=strangers)))
    assert own.mean() > 0.9  # a tile that the codec blurs into another is the only way to miss
    assert wrong.mean() < own.mean() - 0.4


def test_a_window_gets_the_same_pictures_in_any_batch(made: Made, plan: Plan, planted: JanusGenerator) -> None:
    together, apart = (_world(made, plan, batch=size).draw("x", planted) for size in (64, 1))
    assert torch.equal(together, apart)
    some = torch.tensor([11, 3])
    assert torch.equal(_world(made, plan).draw("x", planted, windows_V=some), together[some])
    assert not torch.equal(_world(made, plan).draw("x", planted, stream="more"), together)


def test_a_finished_draw_is_found_again(made: Made, plan: Plan, tmp_path: Path, world: World) -> None:
    (first, drawing), (second, idle) = _planted(world), _planted(world)
    drawn = _world(made, plan, tmp_path).draw("row", drawing)
    assert torch.equal(_world(made, plan, tmp_path).draw("row", idle), drawn)
    assert first.calls and not second.calls


def test_best_of_keeps_what_the_judge_likes_most(world: World, plan: Plan, planted: JanusGenerator) -> None:
    some = torch.tensor([0, 5, 9])
    own = world.draw("own", planted, windows_V=some)
    more = world.draw("more", planted, n=3 * N, windows_V=some, stream="more")
    kept = protocol.best_of(world, own, more, some)
    assert kept.shape == own.shape
    everything = world.liking.of(world.look(torch.cat([own, more], 1)), some)
    assert torch.allclose(
        world.liking.of(world.look(kept), some), everything.sort(1, descending=True).values[:, :N], atol=1e-3
    )
