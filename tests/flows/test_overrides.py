from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from couturier.components.errors import ConfigError
from couturier.flows.overrides import names, override


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 5
    lr: float = 0.1
    on: bool = False
    name: str = "x"
    limit: int | None = None
    sizes: tuple[int, ...] = (1, 2)
    kind: Literal["a", "b"] = "a"
    weights: dict[str, float] = field(default_factory=lambda: {"cover": 2.0})


@dataclass(frozen=True, kw_only=True)
class Outer:
    seed: int = 0
    sft: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("sft.steps=10", Inner(steps=10)),
        ("sft.lr=3e-3", Inner(lr=3e-3)),
        ("sft.on=yes", Inner(on=True)),
        ("sft.name=a=b", Inner(name="a=b")),
        ("sft.limit=7", Inner(limit=7)),
        ("sft.limit=none", Inner()),
        ("sft.sizes=3,4", Inner(sizes=(3, 4))),
        ("sft.sizes=[3, 4]", Inner(sizes=(3, 4))),
        ("sft.kind=b", Inner(kind="b")),
        ("sft.weights.cover=1.5", Inner(weights={"cover": 1.5})),
    ],
)
def test_a_value_is_read_by_its_type(setting: str, wanted: Inner) -> None:
    assert override(Outer(), [setting]) == Outer(sft=wanted)


def test_later_settings_win_and_the_first_recipe_stays() -> None:
    before = Outer()
    assert override(before, ["seed=1", "seed=2"]).seed == 2
    assert before.seed == 0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("sft.steps", "has no '='"),
        ("sft.stepz=1", "Did you mean 'steps'"),
        ("steps=1", "Did you mean 'sft.steps'"),
        ("zzz=1", "Valid here: seed, sft"),
        ("sft=1", "name one of sft.steps"),
        ("seed.x=1", "one value"),
        ("sft.steps=1.5", "not a whole number"),
        ("sft.lr=fast", "not a number"),
        ("sft.on=maybe", "true or false"),
        ("sft.kind=c", "choose one of a, b"),
        ("sft.weights.uncover=1", "no setting 'uncover'. Did you mean 'cover'"),
    ],
)
def test_a_wrong_setting_is_told_with_the_way_out(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as told:
        override(Outer(), [setting])
    assert setting.split("=")[0].split(".")[0] in str(told.value)


def test_names_lists_every_leaf() -> None:
    assert {"seed", "sft.steps", "sft.weights.cover"} <= set(names(Outer()))
