"""Card 3 on a planted world of people with opposite tastes, the loss by hand, and the stage killed and resumed."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from couturier.components.alignment import align, sft
from couturier.components.alignment.guards import Guards
from couturier.components.alignment.ppd import PpdConfig, Preferences, ppd_loss
from couturier.components.alignment.prospect import ProspectConfig
from couturier.components.alignment.watch import WatchConfig
from couturier.components.errors import ConfigError
from couturier.components.generator.diffusion import DiffusionGenerator
from couturier.components.generator.janus import GeneratorConfig
from couturier.components.generator.tokenise import one_cycle
from couturier.components.generator.types import DiffusionConfig, PreferenceConfig, load_generator
from couturier.components.interest import fit
from couturier.components.interest.encoder import EncoderConfig
from couturier.components.runtime import global_seed

from .conftest import context
from .test_sft import KillAt, Killed

ITEMS, CODES, CODEBOOK, WIDTH = 16, 4, 12, 6
SMALL = PreferenceConfig(tokens=2, width=16, heads=2)


@dataclass(frozen=True)
class Tastes:
    """Items with one quality that a person may like (+1) or dislike (-1), and a generator that knows no person."""

    generator: DiffusionGenerator
    codes_IL: Tensor
    quality_I: Tensor

    def people(self, count: int, seed: int) -> Tensor:
        """Every second person likes what the others dislike, ``[U]``."""
        return torch.where(torch.arange(count) % 2 == seed % 2, 1.0, -1.0)

    def pairs(self, taste_U: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """What each person prefers of two items, and the other, ``[U, count]``."""
        random = torch.Generator().manual_seed(seed)
        first = torch.randint(0, ITEMS, (len(taste_U), count), generator=random)
        second = (first + torch.randint(1, ITEMS, first.shape, generator=random)) % ITEMS
        likes_first = (self.quality_I[first] - self.quality_I[second]) * taste_U[:, None] > 0
        return torch.where(likes_first, first, second), torch.where(likes_first, second, first)

    def quality(self, users_UEW: Tensor, *, n: int = 16) -> Tensor:
        """Mean quality of the pictures drawn for each embedding, the same noise for all, ``[U, n]``."""
        u = len(users_UEW)
        knows = self.generator.preference is not None
        codes = self.generator.sample(nobody(u), n, seeds=list(range(u)), users_UEW=users_UEW if knows else None)
        same = (codes[:, :, None] == self.codes_IL).float().mean(-1)
        return self.quality_I[same.argmax(-1)]


def nobody(users: int) -> np.ndarray:
    return np.full((users, 4), -1)


@pytest.fixture(scope="module")
def plain() -> Tastes:
    """A generator that draws every item about as often."""
    random = torch.Generator().manual_seed(0)
    quality_I = torch.linspace(-1.5, 1.5, ITEMS)
    features_IF = torch.cat([quality_I[:, None], torch.randn(ITEMS, 5, generator=random) * 0.5], 1)
    codes_IL = torch.randint(0, CODEBOOK, (ITEMS, CODES), generator=random)
    codebook_KD = torch.randn(CODEBOOK, WIDTH, generator=random)
    config = DiffusionConfig(width=32, layers=2, heads=2, history=4, steps=12, stagger=3.0)
    with global_seed(0, "plain"):
        generator = DiffusionGenerator(config, features_IF, codebook_KD, torch.arange(ITEMS), codes=CODES)
    generator.set_prior(codes_IL, torch.ones(ITEMS))
    optimiser = torch.optim.AdamW(generator.parameters_to_train(), lr=5e-3)
    for _ in range(150):
        codes = codes_IL[torch.randint(0, ITEMS, (96, 1), generator=random)]
        loss, _ = generator.loss(nobody(96), codes, keep_U=torch.ones(96, dtype=torch.bool), random=random)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return Tastes(generator.eval(), codes_IL, quality_I)


@pytest.fixture(scope="module")
def fitted(plain: Tastes) -> Tastes:
    """One model aligned with many people of either taste; none of them is met again."""
    made = Tastes(
        copy.deepcopy(plain.generator).personalise(SMALL, seed=0, whole=True), plain.codes_IL, plain.quality_I
    )
    generator, random = made.generator.train(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(generator.parameters_to_train(), lr=5e-3)
    for step in range(260):
        optimiser.param_groups[0]["lr"] = 5e-3 * one_cycle(step, 260)
        taste_U = made.people(48, step)
        users_UEW = generator.embed_users(*made.pairs(taste_U, 4, 1000 + step))
        better, worse = made.pairs(taste_U, 2, 5000 + step)
        given = Preferences(favourites_UK=nobody(48), better_UnL=made.codes_IL[better], worse_UnL=made.codes_IL[worse])
        loss = ppd_loss(generator, plain.generator, given, users_UEW, beta=0.1, random=random)[0].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    generator.eval()
    return made


def strangers(made: Tastes, count: int = 40) -> tuple[Tensor, Tensor]:
    """Tastes and embeddings, from four pairs each, of people that training never saw."""
    taste_U = made.people(count, 0)
    with torch.no_grad():
        return taste_U, made.generator.embed_users(*made.pairs(taste_U, 4, 77))


def test_the_first_output_is_the_base_models(plain: Tastes) -> None:
    made = copy.deepcopy(plain.generator).personalise(SMALL, seed=0)
    users_UEW = made.embed_users(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 8]]))
    before = plain.generator.sample(nobody(2), 4, seeds=[1, 2])
    assert torch.equal(made.sample(nobody(2), 4, seeds=[1, 2], users_UEW=users_UEW), before)
    x, time = torch.randn(2, CODES, WIDTH), torch.tensor([0.3, 0.8])
    told = made.logits(x, time, made.condition(nobody(2), users_UEW=users_UEW))
    assert torch.allclose(told, plain.generator.logits(x, time, plain.generator.condition(nobody(2))), atol=1e-4)


def test_the_base_stays_as_it_is_and_strangers_to_preference_get_it(plain: Tastes) -> None:
    made = copy.deepcopy(plain.generator).personalise(SMALL, seed=0)
    assert 0 < sum(p.numel() for p in made.parameters_to_train()) < 0.5 * sum(p.numel() for p in made.parameters())
    with torch.no_grad():
        for parameter in made.parameters_to_train():
            parameter.add_(0.5)
    none = torch.full((2, 4), -1)
    users_UEW = made.embed_users(none, none)
    assert not users_UEW.any()
    before = plain.generator.sample(nobody(2), 4, seeds=[1, 2])
    assert torch.equal(made.sample(nobody(2), 4, seeds=[1, 2], users_UEW=users_UEW), before)
    known = made.embed_users(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 8]]))
    assert not torch.equal(made.sample(nobody(2), 4, seeds=[1, 2], users_UEW=known), before)


def test_the_order_of_pairs_is_of_no_account_but_who_wins_is(plain: Tastes) -> None:
    made = copy.deepcopy(plain.generator).personalise(SMALL, seed=0)
    good, bad = torch.tensor([[1, 2, 3]]), torch.tensor([[5, 6, 7]])
    there = made.embed_users(good, bad)
    assert torch.allclose(there, made.embed_users(good.flip(1), bad.flip(1)), atol=1e-6)
    assert not torch.allclose(there, made.embed_users(bad, good), atol=1e-2)


def test_the_loss_is_that_of_diffusion_dpo(plain: Tastes) -> None:
    made = copy.deepcopy(plain.generator).personalise(SMALL, seed=0)
    better, worse = plain.codes_IL[:3, None], plain.codes_IL[3:6, None]
    given = Preferences(favourites_UK=nobody(3), better_UnL=better, worse_UnL=worse)
    users_UEW = made.embed_users(torch.tensor([[1], [2], [3]]), torch.tensor([[4], [5], [6]]))
    loss, margin, _ = ppd_loss(
        made, plain.generator, given, users_UEW, beta=0.5, random=torch.Generator().manual_seed(0)
    )
    assert torch.allclose(loss, torch.full((3, 1), np.log(2.0))) and margin.abs().max() < 1e-4
    with torch.no_grad():
        for parameter in made.parameters_to_train():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    users_UEW = made.embed_users(torch.tensor([[1], [2], [3]]), torch.tensor([[4], [5], [6]])).detach()
    loss, margin, error = ppd_loss(
        made, plain.generator, given, users_UEW, beta=0.5, random=torch.Generator().manual_seed(0)
    )
    noise, time = made.noise_for(better[:, 0], torch.Generator().manual_seed(0))
    told, untold = made.condition(nobody(3), users_UEW=users_UEW), made.condition(nobody(3))
    e = [[made.error_nats(codes[:, 0], noise, time, c) for c in (told, untold)] for codes in (better, worse)]
    by_hand = -((e[0][0] - e[1][0]) - (e[0][1] - e[1][1]))
    assert margin.abs().max() > 1e-2
    torch.testing.assert_close(margin[:, 0], by_hand, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, -F.logsigmoid(0.5 * margin))
    torch.testing.assert_close(error[:, 0], e[0][0], atol=1e-4, rtol=1e-4)


def test_pairs_of_a_history_are_favourites_against_what_was_passed_over(plain: Tastes) -> None:
    made = copy.deepcopy(plain.generator).personalise(PreferenceConfig(pairs=3, tokens=2, width=16, heads=2), seed=0)
    good, bad = made.pairs_of(np.array([[0, 2, 9, 4], [5, -1, -1, -1], [-1, -1, -1, -1]]))
    assert good.tolist() == [[0, 2, 9], [5, -1, -1], [-1, -1, -1]]
    # Item 0 sells best, then item 1 and so on; what is in the history was not passed over.
    assert bad.tolist() == [[1, 3, 5], [0, -1, -1], [-1, -1, -1]]


@pytest.mark.slow
def test_opposite_tastes_shift_one_model_in_opposite_ways(plain: Tastes, fitted: Tastes) -> None:
    taste_U, users_UEW = strangers(fitted)
    shift_U = fitted.quality(users_UEW).mean(1) - plain.quality(users_UEW).mean(1)
    likes, dislikes = shift_U[taste_U > 0], shift_U[taste_U < 0]
    assert float(likes.mean()) > 0.05
    assert float(dislikes.mean()) < -0.05
    assert float(likes.mean() - dislikes.mean()) > 0.3


@pytest.mark.slow
def test_between_two_people_lies_a_monotone_curve(fitted: Tastes) -> None:
    taste_U, users_UEW = strangers(fitted)
    no, yes = users_UEW[taste_U < 0], users_UEW[taste_U > 0]
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    curve = [float(fitted.quality(torch.lerp(no, yes, share)).mean()) for share in shares]
    assert all(b > a - 0.02 for a, b in zip(curve[:-1], curve[1:], strict=True)), curve
    assert curve[-1] - curve[0] > 0.3


@pytest.mark.slow
def test_four_pairs_of_a_stranger_beat_the_base_and_a_wrong_persons_lose(plain: Tastes, fitted: Tastes) -> None:
    """Wins over the base with the same noise, draws left out; the neighbour is of the opposite taste."""
    taste_U, users_UEW = strangers(fitted)
    base = plain.quality(users_UEW)

    def win_rate(embeddings: Tensor) -> float:
        gain = (fitted.quality(embeddings) - base) * taste_U[:, None]
        return float((gain > 0).sum() / (gain != 0).sum())

    right, wrong = win_rate(users_UEW), win_rate(users_UEW.roll(1, 0))
    assert right > 0.6, (right, wrong)
    assert wrong < 0.5


CONFIG = align.Config(
    threads=1,
    method="ppd",
    prospect=ProspectConfig(windows=40, others_share=0.5),
    ppd=PpdConfig(preference=SMALL, whole=False, steps=6, prompts=6, pairs=2, group=3),
    watch=WatchConfig(every=3, windows=4, pictures=2),
    guards=Guards(watch_tolerance=0),
    checkpoint_every=2,
)
INPUTS = {"sequences": "sequences", "tokenise": "tokenise", "judge": "ppd-judge", "sft": "ppd-sft"}


@pytest.fixture(scope="module")
def started(world: Path) -> Path:
    """A judge and a diffusion generator, both hardly trained; fine-tuning, too, survives a kill."""
    judge = fit.Config(threads=1, steps=10, encoder=EncoderConfig(steps=10))
    fit.run(context(world, "ppd-judge", judge, {"sequences": "sequences"}))
    config = sft.Config(
        threads=1,
        generator=GeneratorConfig(family="diffusion"),
        diffusion=DiffusionConfig(width=16, layers=1, heads=2, history=4, steps=4, nats_levels=4),
        grounding_steps=8,
        steps=6,
        batch=8,
        targets=2,
        valid_every=100,
        checkpoint_every=3,
    )
    inputs = {"sequences": "sequences", "tokenise": "tokenise"}
    ctx = context(world, "ppd-sft", config, inputs)
    sft.run(ctx)
    assert set(ctx.facts) >= {"valid_nats", "valid_gap"}
    with pytest.raises(Killed):
        sft.run(context(world, "ppd-sft-killed", config, inputs, progress=KillAt(11)))
    again = context(world, "ppd-sft-killed", config, inputs)
    sft.run(again)
    assert same(ctx.out, again.out)
    return world


def same(a: Path, b: Path) -> bool:
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    curves = [pl.read_parquet(folder / "curves.parquet") for folder in (a, b)]
    return all(torch.equal(one[key], other[key]) for key in one) and curves[0].equals(curves[1])


@pytest.mark.parametrize("source", ["wanted", "taken", "judged"])
def test_the_stage_ends_on_the_same_bits_when_it_was_killed(started: Path, source: str) -> None:
    own = dataclasses.replace(CONFIG.ppd, source=source, whole=source == "judged")
    config = dataclasses.replace(CONFIG, ppd=own)
    whole = context(started, f"ppd-{source}", config, INPUTS)
    align.run(whole)
    with pytest.raises(Killed):
        align.run(context(started, f"ppd-{source}-killed", config, INPUTS, progress=KillAt(3)))
    again = context(started, f"ppd-{source}-killed", config, INPUTS)
    align.run(again)
    assert same(whole.out, again.out)
    assert whole.facts["method"] == "ppd"
    before, after = load_generator(started / "ppd-sft" / "model"), load_generator(whole.out / "model")
    assert isinstance(after, DiffusionGenerator) and after.preference == SMALL
    kept, now = before.state_dict(), after.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in kept.items()) != own.whole


def test_settings_that_do_not_fit_are_refused(started: Path) -> None:
    with pytest.raises(ConfigError, match="'guessed'; choose one of wanted, taken, judged"):
        PpdConfig(source="guessed")
    with pytest.raises(ConfigError, match=r"choose rl\.method=ppd|Choose rl\.method=ppd"):
        align.run(context(started, "ppd-wrong-method", align.Config(threads=1, method="imitation"), INPUTS))
