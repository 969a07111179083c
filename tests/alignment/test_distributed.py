"""Several processes train one generator: the same model within float tolerance, checkpoints that any number opens."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from couturier.components.alignment import align, distributed, sft
from couturier.components.alignment.distil import DistilConfig
from couturier.components.alignment.dpo import DpoConfig
from couturier.components.alignment.grpo import GrpoConfig
from couturier.components.alignment.guards import Guards
from couturier.components.alignment.loop import Loop, LoopConfig, Phase
from couturier.components.alignment.prospect import ProspectConfig
from couturier.components.alignment.sharding import clip, spread
from couturier.components.alignment.watch import Watch, WatchConfig
from couturier.components.errors import ConfigError, DataError
from couturier.components.files import read_json, write_json
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.generator.language import LanguageGenerator
from couturier.components.lineage.checkpoints import Checkpoints
from couturier.components.lineage.stages import StageContext
from couturier.components.settings import settings_of, with_lines
from couturier.components.together import average_gradients, everyones, in_shares, processes, rank, share
from couturier.components.together import world as processes_now

from .conftest import HISTORY, context
from .test_published import published, tokenised

TUNE = sft.Config(
    threads=1,
    generator=GeneratorConfig(width=32, layers=2, heads=2, ffn=48, history=HISTORY),
    grounding_steps=4,
    steps=8,
    batch=8,
    targets=2,
    checkpoint_every=5,
    valid_every=8,
    valid_windows=12,
)
OFF = Guards(kl_nats=0, entropy_nats=0, distinct=0, copied=0, zero_variance_groups=0, watch_tolerance=0)
ALIGN = align.Config(
    threads=1,
    prospect=ProspectConfig(windows=60, others_share=0.5),
    distil=DistilConfig(steps=2, prompts=8, targets=3),
    # Two updates a batch: the checkpoint of step 5 falls between them, and must hold the pictures of both processes.
    grpo=GrpoConfig(steps=6, prompts=8, group=4, lr=1e-3, kl=0.05, updates=2, drop_zero_variance=True),
    watch=WatchConfig(every=6, windows=8, pictures=2),
    guards=OFF,
    checkpoint_every=5,
)


def tuned(ctx: StageContext, config: sft.Config) -> Callable[[], None]:
    """Fine-tuning: everything is read now, and done when asked."""
    learner = sft._Learner(ctx, config)
    generator = learner.generator
    assert isinstance(generator, LanguageGenerator)

    def work() -> None:
        spread(generator, config.strategy)
        parameters = generator.parameters_to_train()
        phases: list[Phase] = [sft._Grounding(learner), sft._Tuning(learner)]
        loop = Loop(ctx, "sft", generator, parameters, phases, learner.random, LoopConfig(checkpoint_every=5))
        finish(ctx, loop, generator, config.strategy)

    return work


def aligned(ctx: StageContext, config: align.Config) -> Callable[[], None]:
    """Alignment likewise."""
    scene = align.scene_of(ctx, config)
    watch = Watch(ctx, scene.catalogue, scene.codec, config.watch)
    return lambda: finish(ctx, align.loop_of(ctx, config, scene, watch), scene.janus, config.strategy)


def finish(ctx: StageContext, loop: Loop, generator: LanguageGenerator, strategy: str) -> None:
    kept = [in_shares(value) for value in loop.parameters]
    assert any(kept) == (strategy == "fsdp" and processes_now() > 1)
    loop.run()
    generator.save(ctx.out / "model")
    drawn = generator.sample(np.array([[1, 2], [3, -1]]), 2, seeds=[1, 2])
    assert int(drawn.max()) < generator.codebook_size
    if rank() == 0:
        write_json(ctx.out / "curves.json", loop.curves)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    [file] = [path for path in (out / "model").glob("*.safetensors") if path.stem in ("model", "adapter")]
    return load_file(file)


def close(a: Path, b: Path) -> None:
    one, other = weights_of(a), weights_of(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-4, rtol=1e-3, msg=name)
    curves = [read_json(folder / "curves.json") for folder in (a, b)]
    for (step, name, value), (at, called, figure) in zip(*curves, strict=True):
        assert (step, name) == (at, called) and figure == pytest.approx(value, abs=5e-3)


def both_ways(
    world: Path, make: Callable[[StageContext], Callable[[], None]], inputs: dict[str, str], name: str
) -> None:
    """One process, two, one from where two stopped, two from where one did: all end alike."""

    def run(kind: str, *, two: bool, left: Path | None = None) -> StageContext:
        ctx = context(world, f"many-{name}-{kind}", None, inputs)
        if left is not None:
            shutil.copytree(left / "checkpoints", ctx.scratch / "checkpoints")
            assert Checkpoints(ctx.scratch / "checkpoints").newest() is not None
        work = make(ctx)
        forked(work) if two else work()
        return ctx

    alone, two = run("alone", two=False), run("two", two=True)
    close(alone.out, two.out)
    close(alone.out, run("one", two=False, left=two.scratch).out)
    close(alone.out, run("again", two=True, left=alone.scratch).out)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_tune_as_one_and_checkpoints_pass_between_them(world: Path, strategy: str) -> None:
    config = replace(TUNE, strategy=strategy)
    inputs = {"sequences": "sequences", "tokenise": "tokenise"}
    both_ways(world, lambda ctx: tuned(ctx, config), inputs, f"sft-{strategy}")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["janus", "emu3"])
def test_two_processes_share_out_an_adapted_model(started: Path, family: str, tmp_path: Path) -> None:
    """Frozen layers and adapters alike, tuned and then aligned; what is saved is the adapters alone."""
    base = published(started, family, tmp_path / "published")
    name = f"shared-{family}"
    tokenised(started, base, f"{name}-tokenise")
    adapters = GeneratorConfig(
        family=family, base=base, history=2, max_words=2, lora_rank=2, lora_targets=("q_proj", "up_proj")
    )
    config = replace(TUNE, generator=adapters, grounding_steps=0, strategy="fsdp")
    inputs = {"sequences": "sequences", "tokenise": f"{name}-tokenise", "judge": "rl-judge"}
    both_ways(started, lambda ctx: tuned(ctx, config), inputs, f"{name}-sft")
    rl = replace(METHODS["grpo"], strategy="fsdp")
    inputs["sft"] = f"many-{name}-sft-two"
    both_ways(started, lambda ctx: aligned(ctx, rl), inputs, f"{name}-rl")
    # Frozen weights in bfloat16 beside learned ones in float32 are shared out too.
    half = replace(config, generator=replace(adapters, dtype="bfloat16", checkpointing=True))
    ctx = context(started, f"{name}-half", None, inputs)
    forked(tuned(ctx, half))
    assert list(weights_of(ctx.out))


METHODS = {
    "grpo": ALIGN,
    "guided grpo": replace(ALIGN, grpo=replace(ALIGN.grpo, guidance=1.5, updates=1)),
    "dpo": replace(ALIGN, method="dpo", dpo=DpoConfig(rounds=2, steps=3, batch=8, share=0.5, candidates=4, margin=0.0)),
    "rejection": replace(ALIGN, method="rejection"),
}


@pytest.mark.parametrize(
    "method,strategy",
    [
        ("grpo", "fsdp"),
        ("dpo", "ddp"),
        pytest.param("guided grpo", "fsdp", marks=pytest.mark.slow),
        pytest.param("dpo", "fsdp", marks=pytest.mark.slow),
        pytest.param("rejection", "ddp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_align_as_one_and_checkpoints_pass_between_them(
    started: Path, method: str, strategy: str
) -> None:
    config = replace(METHODS[method], strategy=strategy)
    inputs = {"sequences": "sequences", "tokenise": "tokenise", "judge": "rl-judge", "sft": "rl-sft"}
    both_ways(started, lambda ctx: aligned(ctx, config), inputs, f"{method}-{strategy}")


@pytest.fixture(scope="module")
def given(started: Path) -> Path:
    """The planted world with settings in files."""
    write_json(started / "sft.json", asdict(TUNE))
    write_json(started / "rl.json", asdict(ALIGN))
    return started


def arguments(given: Path, stage: str, out: Path, *more: str) -> list[str]:
    folders = {"sequences": "sequences", "tokenise": "tokenise", "judge": "rl-judge", "sft": "rl-sft"}
    inputs = [word for name in distributed.STAGES[stage][2] for word in ("--input", f"{name}={given / folders[name]}")]
    return ["--stage", stage, *inputs, "--out", str(out), "--settings", str(given / f"{stage}.json"), *more]


def by_two(given: Path, stage: str, out: Path, *more: str) -> None:
    """What the documentation says to type, on this machine's own address."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command += ["-m", "couturier.components.alignment.distributed", *arguments(given, stage, out, *more)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the model is in") == 1
    assert read_json(out / "facts.json")["processes"] == 2


def forked(work: Callable[[], None]) -> None:
    """Two processes that torchrun might have started, forked from this one, which has imported everything already.

    For work that leaves polars alone: its threads do not outlive a fork.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=one_of, args=({**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, work)) for r in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=60)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]


def one_of(environment: dict[str, str], work: Callable[[], None]) -> None:
    os.environ.update(environment)
    with processes():
        work()


def same(a: Path, b: Path, *, atol: float = 2e-4) -> None:
    """Weights and every figure of every step agree."""
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=atol, rtol=1e-3, msg=name)
    curves = [pl.read_parquet(folder / "curves.parquet").sort("step", "name") for folder in (a, b)]
    assert curves[0].select("step", "name").equals(curves[1].select("step", "name"))
    torch.testing.assert_close(curves[0]["value"].to_torch(), curves[1]["value"].to_torch(), atol=5e-3, rtol=5e-3)


def goes_on(left: Path, out: Path, step: int) -> None:
    """Give ``out`` the checkpoints that a run left, and see that the newest is from ``step``."""
    shutil.copytree(left / "scratch" / "checkpoints", out / "scratch" / "checkpoints")
    newest = Checkpoints(out / "scratch" / "checkpoints").newest()
    assert newest is not None and newest.step == step


@pytest.fixture(scope="module")
def alone(given: Path) -> dict[str, Path]:
    """Both stages in one process, through the same command line."""
    found = {}
    for stage in ("sft", "rl"):
        found[stage] = given / f"alone-{stage}"
        distributed.main(arguments(given, stage, found[stage]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage,step", [("sft", 10), ("rl", 5)])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_as_one_and_checkpoints_pass_between_them(
    given: Path, alone: dict[str, Path], stage: str, step: int, strategy: str, tmp_path: Path
) -> None:
    by_two(given, stage, tmp_path / "two", "--strategy", strategy)
    same(alone[stage], tmp_path / "two")
    goes_on(tmp_path / "two", tmp_path / "one", step)
    distributed.main(arguments(given, stage, tmp_path / "one"))
    same(alone[stage], tmp_path / "one")
    goes_on(alone[stage], tmp_path / "again", step)
    by_two(given, stage, tmp_path / "again", "--strategy", strategy)
    same(alone[stage], tmp_path / "again")
    assert JanusGenerator.load(tmp_path / "two" / "model").codes_per_picture == 4


def test_gradients_are_averaged_only_where_somebody_has_one() -> None:
    """One process alone passes a weight without a gradient over; averaging must not give it a gradient of nought, with
    which weight decay and old moments would move it."""

    def work() -> None:
        used, idle = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        if rank() == 0:
            (used.sum() * 3).backward()
        average_gradients([used, idle])
        assert used.grad is not None and used.grad.tolist() == [1.5, 1.5]
        assert idle.grad is None
        assert clip([used, idle], 1.0) == pytest.approx(1.5 * 2**0.5)
        assert everyones(torch.arange(6)[share(6)]).tolist() == list(range(6))

    forked(work)


def test_settings_come_as_json_and_lines() -> None:
    assert settings_of(sft.Config, asdict(TUNE)) == TUNE
    assert settings_of(align.Config, with_lines(asdict(ALIGN), ["grpo.steps=9", "method=grpo"])).grpo.steps == 9
    with pytest.raises(ConfigError, match="has no '='"):
        with_lines({}, ["steps"])
    with pytest.raises(ConfigError, match="nothing inside"):
        with_lines({"steps": 3}, ["steps.more=4"])
    with pytest.raises(ConfigError, match="stpes"):
        settings_of(sft.Config, with_lines({}, ["stpes=3"]))


def test_what_is_missing_is_said(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[tuple[list[str], str]] = [
        (["--input", f"sequences={world / 'sequences'}"], "needs the input 'tokenise'"),
        (["--input", f"sequences={tmp_path / 'none'}"], "is no folder"),
        (["--settings", str(tmp_path / "none.json")], "is no file"),
        (["--set", "steps"], "has no '='"),
    ]
    for more, told in words:
        with pytest.raises(SystemExit):
            distributed.main(["--stage", "sft", "--out", str(tmp_path / "out"), *more])
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        distributed.main(["--help"])
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().out


def test_settings_of_a_finished_artifact_are_taken(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"stage": "sft", "config": asdict(TUNE), "inputs": {}})
    assert settings_of(sft.Config, distributed.read_settings(tmp_path / "manifest.json")) == TUNE


def test_an_unknown_strategy_is_named(world: Path) -> None:
    with pytest.raises(ConfigError, match="'zero'; choose one of ddp, fsdp"):
        spread(torch.nn.Linear(1, 1), "zero")
    with pytest.raises(DataError, match="needs the input 'sequences'"):
        distributed.run("sft", {}, {}, world / "never")
