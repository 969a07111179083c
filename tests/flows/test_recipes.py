from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from couturier.components.errors import ConfigError
from couturier.flows import recipes
from couturier.flows.overrides import names


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_complete_and_carries_its_name(name: str) -> None:
    recipe = recipes.named(name)
    assert recipe.name == name
    assert len(names(recipe)) > 50


def leaves(recipe: recipes.Recipe, leaf: str) -> dict[str, Any]:
    """The values of every setting of that name inside the parts."""
    values = {}
    for part in dataclasses.fields(recipe):
        inner = getattr(recipe, part.name)
        if dataclasses.is_dataclass(inner) and leaf in vars(inner):
            values[part.name] = vars(inner)[leaf]
    return values


@pytest.mark.parametrize("leaf", recipes.SHARED)
def test_a_shared_setting_reaches_every_part_that_has_it(leaf: str) -> None:
    values = leaves(recipes.named("demo", [f"{leaf}=7"]), leaf)
    assert len(values) > 2
    assert set(values.values()) == {7}


def test_a_part_may_differ_from_the_rest_when_it_is_set_later() -> None:
    recipe = recipes.named("smoke", ["seed=3", "rl.seed=4"])
    assert recipe.sft.seed == 3
    assert recipe.rl.seed == 4


def test_smoke_repeats_bit_for_bit() -> None:
    assert set(leaves(recipes.named("smoke"), "threads").values()) == {1}


def test_an_unknown_recipe_is_told_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'demo'.*demo, smoke"):
        recipes.named("demos")
