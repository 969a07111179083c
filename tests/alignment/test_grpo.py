"""The update rule on two actions, the reward going up on a planted world, and a killed run ending on the same bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from couturier.components.alignment import grpo, rewards, sft
from couturier.components.alignment.distil import DistilConfig
from couturier.components.alignment.grpo import policy_loss
from couturier.components.alignment.prospect import ProspectConfig
from couturier.components.alignment.rewards import Weights, advantages
from couturier.components.generator.janus import GeneratorConfig
from couturier.components.interest import fit
from couturier.components.lineage.checkpoints import Checkpoints

from .conftest import HISTORY, context
from .test_sft import KillAt, Killed

INPUTS = {
    "sequences": "sequences",
    "tokenise": "tokenise",
    "judge": "rl-judge",
    "sft": "rl-sft",
}
CONFIG = grpo.Config(
    threads=1,
    prospect=ProspectConfig(windows=60, others_share=0.5),
    distil=DistilConfig(steps=12, prompts=8, targets=3, copies=0.3),
    steps=18,
    prompts=8,
    group=4,
    lr=1e-3,
    kl=0.01,
    warm_up_steps=2,
    checkpoint_every=6,
    watch_every=12,
    watch_windows=8,
    watch_pictures=2,
    watch_tolerance=0.0,
)


def test_the_update_moves_probability_towards_the_better_action() -> None:
    logits = torch.zeros(2, requires_grad=True)
    lp = logits.log_softmax(0)[torch.tensor([[[0], [1]]])]
    advantage = advantages(torch.tensor([[1.0, 0.0]]))
    loss, _ = policy_loss(lp, lp.detach(), advantage, kl=0.0)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0] < 0 < logits.grad[1]


def test_equal_rewards_give_no_gradient_but_the_pull_to_the_reference() -> None:
    logits = torch.tensor([1.0, 0.0], requires_grad=True)
    lp = logits.log_softmax(0)[torch.tensor([[[0], [1]]])]
    equal = advantages(torch.tensor([[0.7, 0.7]]))
    loss, k3 = policy_loss(lp, lp.detach(), equal, kl=1.0)
    loss.backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-7
    assert k3.abs().max() < 1e-7
    logits.grad = None
    reference = torch.zeros(2).log_softmax(0)[torch.tensor([[[0], [1]]])]
    lp = logits.log_softmax(0)[torch.tensor([[[0], [1]]])]
    policy_loss(lp, reference, equal, kl=1.0)[0].backward()
    assert logits.grad is not None and logits.grad[0] > 0  # back towards one half


def test_the_kl_estimate_is_never_negative() -> None:
    lp, reference = torch.randn(2, 50, 3), torch.randn(2, 50, 3)
    assert policy_loss(lp, reference, torch.zeros(2, 50), kl=1.0)[1].min() >= 0


@pytest.fixture(scope="module")
def started(world: Path) -> Path:
    """A judge and a lightly tuned generator to start from."""
    judge = fit.Config(threads=1)
    fit.run(context(world, "rl-judge", judge, {"sequences": "sequences"}))
    config = sft.Config(
        threads=1,
        generator=GeneratorConfig(width=32, layers=2, heads=2, ffn=48, history=HISTORY),
        grounding_steps=60,
        steps=30,
        batch=16,
        targets=2,
        lr=3e-3,
        valid_every=100,
    )
    sft.run(context(world, "rl-sft", config, {"sequences": "sequences", "tokenise": "tokenise"}))
    return world


@pytest.fixture(scope="module")
def aligned(started: Path) -> tuple[Path, dict]:
    ctx = context(started, "rl", CONFIG, INPUTS)
    grpo.run(ctx)
    return ctx.out, ctx.facts


def test_a_planted_reward_is_learned(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of even index are worth one, the others nothing: half of the pictures at first, far more soon."""
    monkeypatch.setitem(
        rewards.TERMS,
        "coverage",
        lambda rollout, _: (rollout.nearest_Un % 2 == 0).float(),
    )
    only = Weights(coverage=1, slate=0, judge=0, future=0, copying=0, validity=0, dissimilarity=0)
    rl_alone = dataclasses.replace(CONFIG, distil=DistilConfig(steps=0))
    config = dataclasses.replace(rl_alone, steps=30, group=8, lr=2e-3, watch_every=30, weights=only)
    ctx = context(started, "rl-planted", config, INPUTS)
    grpo.run(ctx)
    curves = pl.read_parquet(ctx.out / "curves.parquet")
    reward = curves.filter(pl.col("name") == "reward").sort("step")["value"].to_numpy()
    assert reward[:3].mean() < 0.65
    assert reward[-5:].mean() > 0.8


def test_every_term_is_logged(aligned: tuple[Path, dict]) -> None:
    curves = pl.read_parquet(aligned[0] / "curves.parquet")
    names = set(curves["name"].unique())
    assert {f"reward_{term}" for term in Weights().of()} <= names
    assert {
        "kl_nats",
        "distinct",
        "copied",
        "zero_variance_groups",
        "watch_basket_precision",
    } <= names
    assert aligned[1]["steps"] == CONFIG.distil.steps + CONFIG.steps


def test_imitation_brings_the_policy_closer_to_what_is_wanted(started: Path) -> None:
    """Everybody wants one same item: soon most pictures show it, without a single step of RL."""
    distil = DistilConfig(steps=40, prompts=8, targets=3, lr=3e-3, copies=0.0, condition_dropout=0.0)
    ctx = context(
        started,
        "rl-imitation",
        dataclasses.replace(CONFIG, distil=distil, steps=0),
        INPUTS,
    )
    trainer = grpo._Trainer(ctx, ctx.config)
    one = torch.nn.functional.one_hot(torch.tensor([7]), 30).float()
    trainer.wanted = lambda rows: one.expand(len(rows), -1)  # type: ignore[method-assign]
    trainer.fit()
    codes = trainer.policy.eval().sample(trainer.train.favourites_WK[:20], 4, seeds=list(range(20)))
    shown = trainer.book.nearest[trainer.book.look(codes.flatten(0, 1))]
    assert (shown == 7).float().mean() > 0.8
    nats = [value for _, name, value in trainer.curves if name == "distil_nats"]
    assert nats[-1] < 0.5 * nats[0]
    assert trainer.reference is None


@pytest.mark.parametrize("step", [4, 10, 13, 15, 29])
def test_kill_and_resume_gives_the_same_bits(started: Path, aligned: tuple[Path, dict], step: int) -> None:
    name = f"rl-killed-{step}"
    with pytest.raises(Killed):
        grpo.run(context(started, name, CONFIG, INPUTS, progress=KillAt(step)))
    again = context(started, name, CONFIG, INPUTS)
    grpo.run(again)
    expected = load_file(aligned[0] / "model" / "model.safetensors")
    found = load_file(again.out / "model" / "model.safetensors")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    a, b = (pl.read_parquet(folder / "curves.parquet") for folder in (aligned[0], again.out))
    assert a.equals(b)


def test_a_torn_checkpoint_is_skipped(started: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10):
        checkpoints.save(step, {"x": torch.full((3,), float(step))}, {"note": step})
    torn = tmp_path / "step-00000010" / "state.safetensors"
    torn.write_bytes(torn.read_bytes()[:-2])
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 5
    assert "skipped" in caplog.text


class FallingWatch:
    """An encoder that sees the pictures get worse from look to look."""

    def __init__(self, *_: object, **__: object) -> None:
        self.seen = 0.5

    def look(self, _: object) -> dict[str, float]:
        self.seen *= 0.8
        return {"watch_basket_precision": self.seen}


def test_the_run_stops_when_the_independent_encoder_sees_pictures_drift(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo, "Watch", FallingWatch)
    config = dataclasses.replace(CONFIG, distil=DistilConfig(steps=0), watch_every=3, watch_tolerance=0.3)
    ctx = context(started, "rl-stopped", config, INPUTS)
    grpo.run(ctx)
    # 0.40 at the start, 0.32 after three steps, 0.26 after six: below 0.7 of the best.
    assert ctx.facts["steps"] == 6
    assert ctx.facts["stopped"].startswith("stopped at step 6: under the independent encoder")
