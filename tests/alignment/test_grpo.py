"""The update rule on two actions, its options, the reward going up on a planted world, a killed run's bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from couturier.components.alignment import align, rewards
from couturier.components.alignment.credit import CreditConfig
from couturier.components.alignment.distil import DistilConfig
from couturier.components.alignment.grpo import Grpo, policy_loss
from couturier.components.alignment.rewards import Weights, advantages
from couturier.components.alignment.watch import Watch, WatchConfig
from couturier.components.generator.janus import JanusGenerator
from couturier.components.lineage.checkpoints import Checkpoints

from .conftest import CONFIG, INPUTS, OFF, KillAt, Killed, context, weights

RL_ALONE = dataclasses.replace(CONFIG, distil=DistilConfig(steps=0))


def with_grpo(config: align.Config = CONFIG, **changes: Any) -> align.Config:
    return dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, **changes))


def test_the_update_moves_probability_towards_the_better_action() -> None:
    logits = torch.zeros(2, requires_grad=True)
    lp = logits.log_softmax(0)[torch.tensor([[[0], [1]]])]
    advantage = advantages(torch.tensor([[1.0, 0.0]]))
    loss, _ = policy_loss(lp, lp.detach(), lp.detach(), advantage, kl=0.0)
    loss.mean().backward()
    assert logits.grad is not None
    assert logits.grad[0] < 0 < logits.grad[1]


def test_equal_rewards_give_no_gradient_but_the_pull_to_the_reference() -> None:
    logits = torch.tensor([1.0, 0.0], requires_grad=True)
    lp = logits.log_softmax(0)[torch.tensor([[[0], [1]]])]
    equal = advantages(torch.tensor([[0.7, 0.7]]))
    loss, k3 = policy_loss(lp, lp.detach(), lp.detach(), equal, kl=1.0)
    loss.mean().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-7
    assert k3.abs().max() < 1e-7
    logits.grad = None
    reference = torch.zeros(2).log_softmax(0)[torch.tensor([[[0], [1]]])]
    lp = logits.log_softmax(0)[torch.tensor([[[0], [1]]])]
    policy_loss(lp, lp.detach(), reference, equal, kl=1.0)[0].mean().backward()
    assert logits.grad is not None and logits.grad[0] > 0  # back towards one half


def test_the_kl_estimate_is_never_negative() -> None:
    lp, reference = torch.randn(2, 50, 3), torch.randn(2, 50, 3)
    assert policy_loss(lp, lp, reference, torch.zeros(2, 50), kl=1.0)[1].min() >= 0


@pytest.fixture(scope="module")
def aligned(started: Path) -> tuple[Path, dict]:
    ctx = context(started, "rl", CONFIG, INPUTS)
    align.run(ctx)
    return ctx.out, ctx.facts


def test_a_planted_reward_is_learned(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of even index are worth one, the others nothing: half of the pictures at first, far more soon."""
    monkeypatch.setitem(
        rewards.TERMS,
        "coverage",
        lambda rollout, _: (rollout.nearest_Un % 2 == 0).float(),
    )
    only = Weights(coverage=1, slate=0, judge=0, future=0, copying=0, validity=0, dissimilarity=0)
    config = with_grpo(dataclasses.replace(RL_ALONE, weights=only), steps=30, group=8, lr=2e-3)
    ctx = context(started, "rl-planted", config, INPUTS)
    align.run(ctx)
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
    assert aligned[1]["steps"] == CONFIG.distil.steps + CONFIG.grpo.steps


def test_imitation_brings_the_policy_closer_to_what_is_wanted(started: Path) -> None:
    """Everybody wants one same item: soon most pictures show it, without a single step of RL."""
    distil = DistilConfig(steps=40, prompts=8, targets=3, lr=3e-3, copies=0.0, condition_dropout=0.0)
    ctx = context(
        started,
        "rl-imitation",
        with_grpo(dataclasses.replace(CONFIG, distil=distil), steps=0),
        INPUTS,
    )
    loop, scene = align.prepare(ctx, ctx.config)
    one = torch.nn.functional.one_hot(torch.tensor([7]), 30).float()
    scene.wanted = lambda rows: one.expand(len(rows), -1)  # type: ignore[method-assign]
    loop.run()
    codes = scene.policy.eval().sample(scene.history(np.arange(20)), 4, seeds=list(range(20)))
    seen = scene.book.look(codes.flatten(0, 1))
    shown = scene.book.nearest[seen]
    assert (shown == 7).float().mean() > 0.8
    nats = [value for _, name, value in loop.curves if name == "distil_nats"]
    assert nats[-1] < 0.5 * nats[0]
    assert [phase.name for phase in loop.phases] == ["imitation"]


@pytest.mark.parametrize("step", [4, 10, 13, 15, 29])
def test_kill_and_resume_gives_the_same_bits(started: Path, aligned: tuple[Path, dict], step: int) -> None:
    name = f"rl-killed-{step}"
    with pytest.raises(Killed):
        align.run(context(started, name, CONFIG, INPUTS, progress=KillAt(step)))
    again = context(started, name, CONFIG, INPUTS)
    align.run(again)
    expected = weights(aligned[0])
    found = weights(again.out)
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


def test_the_run_stops_when_the_independent_encoder_sees_pictures_drift(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter([0.4, 0.32, 0.26])
    monkeypatch.setattr(Watch, "look", lambda *_: {"watch_basket_precision": next(seen)})
    config = dataclasses.replace(
        RL_ALONE, watch=WatchConfig(every=3, windows=2), guards=dataclasses.replace(OFF, watch_tolerance=0.3)
    )
    ctx = context(started, "rl-stopped", config, INPUTS)
    align.run(ctx)
    # 0.40 at the start, 0.32 after three steps, 0.26 after six: below 0.7 of the best.
    assert ctx.facts["steps"] == 6
    assert ctx.facts["stopped"].startswith("stopped at step 6: under the independent encoder")


def test_a_broken_rule_stops_the_run_and_is_named(started: Path) -> None:
    config = dataclasses.replace(RL_ALONE, guards=dataclasses.replace(OFF, window=4, distinct=1.0))
    ctx = context(started, "rl-guarded", config, INPUTS)
    align.run(ctx)
    assert ctx.facts["steps"] == 4
    assert "distinct" in ctx.facts["stopped"] and "rl.guards.distinct=1" in ctx.facts["stopped"]


OPTIONS: dict[str, dict[str, Any]] = {
    "several updates, clipped": {"updates": 3, "lr": 3e-3},
    "guided rollouts, guided gradient": {"guidance": 1.5},
    "no standard deviation, no KL, groups that agree left out": {
        "advantage_by_std": False,
        "kl": 0.0,
        "drop_zero_variance": True,
    },
    "credit to codes that others follow": {"credit": CreditConfig(kind="coupled", gamma=3.0)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_learns_and_resumes_to_the_same_bits(started: Path, name: str) -> None:
    config = with_grpo(RL_ALONE, **OPTIONS[name], steps=8)
    config = dataclasses.replace(config, checkpoint_every=4 if config.grpo.updates == 1 else 5)
    whole = context(started, f"rl-{name}", config, INPUTS)
    align.run(whole)
    with pytest.raises(Killed):
        align.run(context(started, f"rl-{name}-killed", config, INPUTS, progress=KillAt(6)))
    again = context(started, f"rl-{name}-killed", config, INPUTS)
    align.run(again)
    a, b = (weights(ctx.out) for ctx in (whole, again))
    assert all(torch.equal(a[key], b[key]) for key in a)
    before = weights(started / "rl-sft")
    assert any(not torch.equal(a[key], before[key]) for key in a)
    assert whole.facts == again.facts
    assert (whole.facts["clipped"] > 0) == (config.grpo.updates > 1)


def test_credit_that_stresses_nothing_is_plain_to_the_bit(started: Path) -> None:
    """And credit that stresses anchors is not; how much it stresses is in the curves."""
    found = {}
    for name, credit in {
        "plain": CreditConfig(),
        "gamma 1": CreditConfig(kind="anchor", gamma=1.0),
        "anchor": CreditConfig(kind="anchor"),
    }.items():
        ctx = context(started, f"rl-credit-{name}", with_grpo(RL_ALONE, steps=4, credit=credit), INPUTS)
        align.run(ctx)
        found[name] = (weights(ctx.out), ctx.facts)
    (plain, facts), (ones, _), (anchor, stressed) = found.values()
    assert all(torch.equal(plain[key], ones[key]) for key in plain)
    assert any(not torch.equal(plain[key], anchor[key]) for key in plain)
    assert "credit_share" not in facts
    # Two of four codes, of pictures that earned more than their group.
    assert 0 < stressed["credit_share"] < 0.5
    assert stressed["credit_weight"] == pytest.approx(1.25)


def test_a_clipped_ratio_earns_nothing_more() -> None:
    lp = torch.tensor([[[0.5, -0.5, 0.0]]], requires_grad=True)
    advantage = torch.ones(1, 1)
    loss, _ = policy_loss(lp, torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), advantage, kl=0.0, clip=(0.2, 0.2))
    loss.sum().backward()
    assert lp.grad is not None
    # Ratios 1.65, 0.61 and 1: only the first is beyond what counts in its favour.
    assert lp.grad[0, 0, 0] == 0 and lp.grad[0, 0, 1] < 0 and lp.grad[0, 0, 2] < 0


def test_guided_rollouts_are_as_likely_as_the_gradient_says(started: Path) -> None:
    """Importance ratios to the guided sampler are 1 at the first update, and differ from the unguided ones."""
    config = with_grpo(RL_ALONE, guidance=2.0, steps=1, kl=0.0)
    loop, scene = align.prepare(context(started, "rl-guided-once", config, INPUTS), config)
    loop.run()
    phase = loop.phases[0]
    assert isinstance(phase, Grpo) and phase.batch is not None and phase.batch.old_UnL is not None
    scene.janus.load_state_dict(JanusGenerator.load(started / "rl-sft" / "model").state_dict())
    prompts = scene.janus.prompts.build(scene.history(phase.batch.rows))
    with torch.no_grad():
        plain = scene.janus.log_prob(prompts, phase.batch.codes_UnL)
    assert phase.batch.old_UnL.mean() > plain.mean() + 0.01
