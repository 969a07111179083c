from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from couturier.components.errors import DataError, LineageError
from couturier.components.lineage.gate import Config, Verdict, decide, holm

FAST = Config(draws=600)
USERS, WINDOWS = 300, 2


class World:
    """Two generators on the same people. Per-user luck is shared by both sides; the rest is their own noise."""

    def __init__(self, seed: int, *, users: int = USERS) -> None:
        self.rng = np.random.default_rng(seed)
        self.ids = [f"u{n:04}" for n in range(users)]
        self.taste = self.rng.gamma(2.0, 0.05, size=users)
        self.groups = [("young", "old", "middle")[n % 3] for n in range(users)]
        self.users = pl.DataFrame(
            {"user_id": self.ids, "age": self.groups, "history": self.rng.permutation(users).astype(float)}
        )

    def rows(self, row: str, metric: str, mean: np.ndarray, spread: float) -> pl.DataFrame:
        values = np.repeat(mean, WINDOWS) + self.rng.normal(0, spread, size=len(mean) * WINDOWS)
        return pl.DataFrame(
            {
                "row": row,
                "user_id": np.repeat(self.ids, WINDOWS),
                "window": np.tile(np.arange(WINDOWS), len(mean)),
                "metric": metric,
                "value": values,
            }
        )

    def side(self, row: str, *, gain: np.ndarray | float = 0.0, **means: float) -> pl.DataFrame:
        flat = np.ones(len(self.ids))
        level = {"validity": 0.98, "diversity": 0.75, "novelty": 0.6, **means}
        frames = [self.rows(row, "basket_precision", self.taste + gain, 0.06)]
        frames += [self.rows(row, metric, flat * value, 0.02) for metric, value in level.items()]
        return pl.concat(frames)

    def candidate(self, *, gain: np.ndarray | float = 0.0, wrong: float = -0.05, **means: float) -> pl.DataFrame:
        lost = self.rows("wrong_user", "basket_precision", self.taste + wrong, 0.06)
        return pl.concat([self.side("grpo", gain=gain, **means), lost])


def verdict(world: World, candidate: pl.DataFrame, champion: pl.DataFrame | None, config: Config = FAST) -> Verdict:
    return decide(
        candidate,
        champion,
        config=config,
        candidate="rl-new",
        champion=None if champion is None else "rl-old",
        users=world.users,
    )


def test_equal_generators_promote_at_most_alpha() -> None:
    """A/A: the expected share is 0.025; of 120 fixed worlds at most alpha = 0.05 may pass."""
    runs = 120
    decisions = []
    for seed in range(runs):
        world = World(seed)
        decisions.append(verdict(world, world.candidate(), world.side("champion")).decision)
    assert decisions.count("promote") / runs <= 0.05
    assert decisions.count("hold") / runs >= 0.85, "and to reject needs proof as well"


def test_a_planted_gain_promotes() -> None:
    decisions = []
    for seed in range(20):
        world = World(seed)
        decisions.append(verdict(world, world.candidate(gain=0.02), world.side("champion")).decision)
    assert decisions.count("promote") >= 19


def test_a_planted_loss_is_rejected() -> None:
    world = World(1)
    found = verdict(world, world.candidate(gain=-0.03), world.side("champion"))
    assert found.decision == "reject" and found.reasons[0].startswith("broken: basket_precision differs")


def test_a_planted_slice_regression_blocks() -> None:
    """Better for everyone but one age group: better on the whole, and still blocked."""
    for seed in range(10):
        world = World(seed)
        gain = np.where(np.array(world.groups) == "old", -0.04, 0.06)
        found = verdict(world, world.candidate(gain=gain), world.side("champion"))
        overall = next(check for check in found.figures["checks"] if check["name"] == "basket_precision")
        assert overall["low"] > 0
        assert found.decision == "reject" and "age = old" in found.reasons[0]
        assert [piece["value"] for piece in found.figures["slices"] if piece["harmed"]] == ["old"]


def test_a_loss_for_people_of_whom_little_is_known_blocks() -> None:
    world = World(3)
    little = world.users["history"].to_numpy() < USERS / 3
    found = verdict(world, world.candidate(gain=np.where(little, -0.05, 0.06)), world.side("champion"))
    assert found.decision == "reject" and "history = low" in found.reasons[0]


@pytest.mark.parametrize(("metric", "value"), [("validity", 0.955), ("diversity", 0.5), ("novelty", 0.3)])
def test_a_guard_that_falls_blocks_a_better_model(metric: str, value: float) -> None:
    world = World(4)
    found = verdict(world, world.candidate(gain=0.05, **{metric: value}), world.side("champion"))
    assert found.decision == "reject" and f"{metric} differs" in found.reasons[0]


def test_a_first_version_stands_on_its_own() -> None:
    world = World(5)
    found = verdict(world, world.candidate(), None)
    assert found.decision == "promote" and found.champion is None and "no champion yet" in found.reasons[-1]
    deaf = verdict(world, world.candidate(wrong=0.0), None)
    assert deaf.decision == "hold" and "own history" in deaf.reasons[0]
    backwards = verdict(world, world.candidate(wrong=0.05), None)
    assert backwards.decision == "reject"
    mush = verdict(world, world.candidate(validity=0.9), None)
    assert mush.decision == "reject" and "validity is" in mush.reasons[0]


def test_few_users_are_not_enough() -> None:
    world = World(6, users=40)
    found = verdict(world, world.candidate(gain=0.2), world.side("champion"))
    assert found.decision == "hold" and "40 users were judged" in found.reasons[0]


def test_refuses_to_compare_a_model_with_itself() -> None:
    world = World(7)
    with pytest.raises(LineageError, match="with itself"):
        decide(world.candidate(), world.side("champion"), config=FAST, candidate="rl-1", champion="rl-1")


def test_one_model_under_two_names_is_held() -> None:
    """Another id, the same pictures: an edited comment, say. Nothing differs, and the verdict says so."""
    world = World(8)
    candidate = world.candidate()
    twin = candidate.filter(pl.col("row") == "grpo").with_columns(pl.lit("champion").alias("row"))
    found = verdict(world, candidate, twin)
    assert found.decision == "hold" and "one model twice" in found.reasons[0]


def test_pairs_must_fit() -> None:
    world = World(9)
    champion = world.side("champion")
    with pytest.raises(DataError, match="2 windows have only the candidate's"):
        verdict(world, world.candidate(), champion.filter(pl.col("user_id") != "u0000"))
    with pytest.raises(DataError, match="rows champion"):
        verdict(world, champion, champion)
    with pytest.raises(DataError, match="novelty"):
        verdict(world, world.candidate(), champion.filter(pl.col("metric") != "novelty"))
    with pytest.raises(DataError, match="lack the columns"):
        verdict(world, world.candidate().drop("window"), champion)
    with pytest.raises(LineageError, match="together"):
        decide(world.candidate(), champion, config=FAST, candidate="a", champion=None)


def test_the_order_of_lines_changes_nothing_and_json_takes_it() -> None:
    world = World(10)
    candidate, champion = world.candidate(gain=0.02), world.side("champion")
    one = verdict(world, candidate, champion)
    two = verdict(world, candidate.sample(fraction=1.0, shuffle=True, seed=1), champion.reverse())
    assert one == two
    assert Verdict.from_dict(json.loads(json.dumps(one.as_dict()))) == one


def test_a_margin_below_zero_is_non_inferiority() -> None:
    world = World(11)
    candidate, champion = world.candidate(), world.side("champion")
    assert verdict(world, candidate, champion).decision == "hold"
    assert verdict(world, candidate, champion, replace(FAST, margin=-0.02)).decision == "promote"


def test_holm_by_hand() -> None:
    assert holm([]) == []
    assert holm([0.01, 0.02, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])


def test_many_harmless_slices_raise_no_alarm() -> None:
    """56 slices of equal generators: without the correction most worlds would show a harmed one."""
    alarms, raw = 0, 0
    for seed in range(20):
        world = World(100 + seed)
        columns = {f"c{n}": world.rng.choice(["a", "b"], size=USERS) for n in range(25)}
        world.users = world.users.with_columns(**{name: pl.Series(value) for name, value in columns.items()})
        found = verdict(world, world.candidate(), world.side("champion"))
        alarms += any(piece["harmed"] for piece in found.figures["slices"])
        raw += any(piece["p_alone"] < 0.05 for piece in found.figures["slices"])
        assert len(found.figures["slices"]) == 56
    assert alarms <= 2 and raw >= 10
