"""Interests that move: what is asked, what fades, and that places of a trace agree however they are asked for."""

from __future__ import annotations

import torch

from couturier.components.interest.evolution import Behaviours, Evolution
from couturier.components.interest.types import HistoryBatch
from couturier.components.runtime import global_seed

WIDTH, RECENT = 8, 4


def made() -> Evolution:
    with global_seed(0, "evolution"):
        evolution = Evolution(width=WIDTH, heads=2, kinds=3, recent=RECENT, fade_days=20.0)
        torch.nn.init.normal_(evolution.since.weight, std=0.3)
    return evolution.requires_grad_(False)


def lived(evolution: Evolution, lengths: list[int]) -> tuple[HistoryBatch, Behaviours]:
    random, n = torch.Generator().manual_seed(1), sum(lengths)
    history = HistoryBatch(
        features_ND=torch.zeros(n, 1),
        age_days_N=torch.cat([torch.arange(length, 0, -1) * 3.0 for length in lengths]),
        weight_N=torch.ones(n),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        kind_N=torch.randint(3, (n,), generator=random),
        value_N=torch.rand(n, generator=random),
        in_time_order=True,
    )
    return history, evolution.behaviours(history, torch.randn(n, WIDTH, generator=random))


def test_newest_are_the_last_real_places() -> None:
    _, behaviours = lived(made(), [6, 2, 0])
    newest = behaviours.newest(3)
    assert newest.real_UT.tolist() == [[True, True, True], [True, True, False], [False, False, False]]
    torch.testing.assert_close(newest.vectors_UTE[0], behaviours.vectors_UTE[0, 3:6])
    torch.testing.assert_close(newest.vectors_UTE[1, :2], behaviours.vectors_UTE[1, :2])
    assert newest.age_UT[0].tolist() == [9.0, 6.0, 3.0]


def test_the_short_term_reads_the_newest_and_the_long_term_all() -> None:
    evolution = made()
    _, behaviours = lived(evolution, [9])
    before = evolution.now(behaviours)
    behaviours.vectors_UTE[0, 9 - RECENT - 1] += 5.0
    after = evolution.now(behaviours)
    torch.testing.assert_close(after.short_XE, before.short_XE)
    assert float((after.long_XE - before.long_XE).norm()) > 0.1
    behaviours.vectors_UTE[0, 9 - RECENT] += 5.0
    assert float((evolution.now(behaviours).short_XE - before.short_XE).norm()) > 0.1


def test_chosen_places_are_those_of_the_whole_trace_and_the_last_is_now() -> None:
    evolution = made()
    _, behaviours = lived(evolution, [9, 5])
    whole = evolution.trace(behaviours)
    place_Q = torch.tensor([1, 4, 8])
    chosen = evolution.after(behaviours, place_Q)
    real_UQ = behaviours.real_UT[:, place_Q]
    torch.testing.assert_close(chosen.user_XE[real_UQ], whole.user_XE[:, place_Q][real_UQ])
    just_now = Behaviours(**{**vars(behaviours), "age_UT": behaviours.age_UT - 3.0})
    torch.testing.assert_close(whole.user_XE[0, 8], evolution.now(just_now).user_XE[0])


def test_the_first_behaviour_has_no_gap_and_users_do_not_touch() -> None:
    evolution = made()
    history, both = lived(evolution, [4, 3])
    items = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(2))
    both = evolution.behaviours(history, items)
    second = history.rows(torch.arange(4, 7), torch.tensor([0, 3]))
    alone = evolution.behaviours(second, items[4:])
    torch.testing.assert_close(both.vectors_UTE[1, :3], alone.vectors_UTE[0])


def test_a_stronger_behaviour_counts_for_more() -> None:
    evolution = made()
    evolution.strength.weight.copy_(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    history, behaviours = lived(evolution, [6])
    assert history.kind_N is not None
    plain = behaviours.strength_UT[0][history.kind_N == 0]
    torch.testing.assert_close(plain, torch.full_like(plain, 0.6931472))
    assert bool((behaviours.strength_UT[0][history.kind_N > 0] > 0.6931472).all())
