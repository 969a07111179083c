"""Fine-tuning learns the person, and a killed run ends on the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from couturier.components.alignment import sft
from couturier.components.errors import TrainingError
from couturier.components.generator.janus import GeneratorConfig

from .conftest import HISTORY, KillAt, Killed, context, weights

INPUTS = {"sequences": "sequences", "tokenise": "tokenise"}
CONFIG = sft.Config(
    threads=1,
    generator=GeneratorConfig(width=32, layers=2, heads=2, ffn=48, history=HISTORY),
    grounding_steps=60,
    steps=60,
    batch=16,
    targets=2,
    lr=3e-3,
    checkpoint_every=25,
    valid_every=40,
    valid_windows=36,
)


@pytest.fixture(scope="module")
def tuned(world: Path) -> tuple[Path, dict]:
    ctx = context(world, "sft", CONFIG, INPUTS)
    sft.run(ctx)
    return ctx.out, ctx.facts


def test_the_true_history_explains_what_came_next_better_than_another_users(tuned: tuple[Path, dict]) -> None:
    facts = tuned[1]
    assert facts["valid_gap"] > 0.5
    assert facts["valid_nats"] < facts["valid_nats_unconditional"]


@pytest.mark.parametrize("step", [30, 90, 118])
def test_kill_and_resume_gives_the_same_bits(world: Path, tuned: tuple[Path, dict], step: int) -> None:
    name = f"sft-killed-{step}"
    with pytest.raises(Killed):
        sft.run(context(world, name, CONFIG, INPUTS, progress=KillAt(step)))
    again = context(world, name, CONFIG, INPUTS)
    sft.run(again)
    expected, found = weights(tuned[0]), weights(again.out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert again.facts == tuned[1]


def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_do(world: Path) -> None:
    import dataclasses

    wild = dataclasses.replace(CONFIG, grounding_lr=1e30, lr=1e30, clip=1e30)
    with pytest.raises(TrainingError, match=r"lower sft\.grounding_lr"):
        sft.run(context(world, "sft-wild", wild, INPUTS))
