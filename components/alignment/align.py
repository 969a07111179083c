"""Stage ``rl``: the generator is aligned with what people take, by one of several methods, over one loop.

    rl.method=grpo        imitation of a known optimum, then group-relative policy optimisation (the default)
    rl.method=dpo         imitation, then preferences between the policy's own pictures, over several rounds
    rl.method=rejection   imitation, then fine-tuning on the policy's own best pictures
    rl.method=imitation   imitation alone
    rl.method=pigeon      masked reconstruction after a reference picture, then preferences between such pictures
    rl.method=ppd         personalised preference fine-tuning, of a diffusion generator

``rl.distil.steps=0`` leaves the imitation out of any of them. Every method starts from the fine-tuned model, sees the
same windows and the same judge, and is watched by an encoder that no reward has seen. What differs is in each method's
own file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from couturier.components.alignment.distil import DistilConfig
from couturier.components.alignment.dpo import Dpo, DpoConfig
from couturier.components.alignment.grpo import Grpo, GrpoConfig
from couturier.components.alignment.guards import Guards, Watchman
from couturier.components.alignment.imitation import Imitation, Imitator
from couturier.components.alignment.loop import Loop, LoopConfig, Phase
from couturier.components.alignment.pigeon import PigeonConfig
from couturier.components.alignment.pigeon import phases as pigeon_phases
from couturier.components.alignment.ppd import Ppd, PpdConfig
from couturier.components.alignment.prospect import ProspectConfig
from couturier.components.alignment.rejection import Rejection, RejectionConfig
from couturier.components.alignment.rewards import Weights
from couturier.components.alignment.scene import Scene
from couturier.components.alignment.sharding import spread
from couturier.components.alignment.triplets import SocialConfig
from couturier.components.alignment.watch import Watch, WatchConfig
from couturier.components.errors import ConfigError
from couturier.components.lineage.stages import StageContext
from couturier.components.runtime import threads
from couturier.components.together import rank, told

DONE = "all steps done"
"""The fact ``stopped`` of a run that no guard ended."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which method, and what all of them share."""

    seed: int = 0
    threads: int = 2
    method: str = "grpo"
    prospect: ProspectConfig = field(default_factory=ProspectConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    """The imitation before every method."""
    weights: Weights = field(default_factory=Weights)
    """Of the reward's terms."""
    social: SocialConfig = field(default_factory=SocialConfig)
    """Of the term ``social``, fitted where its weight is not 0."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    pigeon: PigeonConfig = field(default_factory=PigeonConfig)
    ppd: PpdConfig = field(default_factory=PpdConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    guards: Guards = field(default_factory=Guards)
    clip: float = 1.0
    checkpoint_every: int = 25
    strategy: str = "ddp"
    """How several processes hold the model: "ddp", each a copy, or "fsdp", each a share of every layer."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"rl.method is {self.method!r}; choose one of {', '.join(METHODS)}.")


def _imitation(scene: Scene, config: Config, watch: Watch) -> list[Phase]:
    return [Imitation(Imitator(scene, config.distil), watch)]


def _grpo(scene: Scene, config: Config, watch: Watch) -> list[Phase]:
    return [*_imitation(scene, config, watch), Grpo(scene, config.grpo, watch, look_every=config.watch.every)]


def _dpo(scene: Scene, config: Config, watch: Watch) -> list[Phase]:
    dpo = Dpo(scene, config.dpo, Imitator(scene, config.distil), watch, look_every=config.watch.every)
    return [*_imitation(scene, config, watch), dpo]


def _rejection(scene: Scene, config: Config, watch: Watch) -> list[Phase]:
    return [*_imitation(scene, config, watch), Rejection(scene, config.rejection, watch, look_every=config.watch.every)]


def _pigeon(scene: Scene, config: Config, watch: Watch) -> list[Phase]:
    return pigeon_phases(scene, config.pigeon, watch, look_every=config.watch.every)


def _ppd(scene: Scene, config: Config, watch: Watch) -> list[Phase]:
    return [Ppd(scene, config.ppd, watch, look_every=config.watch.every)]


METHODS: dict[str, Callable[[Scene, Config, Watch], list[Phase]]] = {
    "grpo": _grpo,
    "dpo": _dpo,
    "rejection": _rejection,
    "imitation": _imitation,
    "pigeon": _pigeon,
    "ppd": _ppd,
}
"""The phases of each method, by name."""


def run(ctx: StageContext) -> None:
    """``sequences``, ``tokenise``, ``judge``, ``sft`` → ``model/``, ``curves.parquet``; facts: the last figures."""
    config: Config = ctx.config
    with threads(config.threads):
        loop, scene = prepare(ctx, config)
        loop.run()
        scene.policy.eval().save(ctx.out / "model")
    if rank() == 0:
        loop.save_curves(ctx.out)
    ctx.facts.update(loop.last())
    ctx.facts["parameters"] = sum(p.numel() for p in loop.parameters)
    if scene.social is not None:
        ctx.facts["social_accuracy"] = scene.social.facts
    ctx.facts.update(method=config.method, steps=loop.step, stopped=loop.stopped or DONE)


def prepare(ctx: StageContext, config: Config) -> tuple[Loop, Scene]:
    """The loop of the configured method, at its first step or where its newest checkpoint left it."""
    scene = scene_of(ctx, config)
    return loop_of(ctx, config, scene, Watch(ctx, scene.catalogue, scene.codec, config.watch)), scene


def scene_of(ctx: StageContext, config: Config) -> Scene:
    """What every method works with, read from the stage's inputs."""
    return Scene(
        ctx,
        seed=config.seed,
        weights=config.weights,
        distil=config.distil,
        prospect=config.prospect,
        social=config.social,
    )


def loop_of(ctx: StageContext, config: Config, scene: Scene, watch: Watch) -> Loop:
    """:func:`prepare` once everything is read."""
    spread(scene.policy, config.strategy)
    watchman = Watchman(config.guards)
    # First the phases: a method may add to the policy what will learn.
    phases = METHODS[config.method](scene, config, watch)
    parameters = scene.policy.parameters_to_train()
    loop = Loop(
        ctx,
        "rl",
        scene.policy,
        parameters,
        phases,
        scene.random,
        LoopConfig(clip=config.clip, checkpoint_every=config.checkpoint_every),
        keepers={"prospect": scene, "guards": watchman},
        guard=watchman,
    )
    if loop.step == 0:
        before = told(lambda: watch.look(scene.policy.eval()))
        loop.log(before)
        watchman.reason_to_stop(0, before)
    return loop
