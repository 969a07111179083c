"""The diffusion family: its nats and samples against distributions that are known, the person, the interface."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import JanusVisionConfig, JanusVisionModel

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, LineageError
from couturier.components.files import write_json
from couturier.components.generator.codec import PatchVQ, PatchVQConfig
from couturier.components.generator.diffusion import DiffusionGenerator, code_vectors
from couturier.components.generator.janus import JanusGenerator
from couturier.components.generator.janus_codec import JanusCodec
from couturier.components.generator.types import DiffusionConfig, Generator, PreferenceConfig, load_generator
from couturier.components.runtime import global_seed

from .conftest import CODEBOOK, CODES, small_catalogue

CONFIG = DiffusionConfig(width=32, layers=2, heads=2, history=5, steps=12)


def made(catalogue: Catalogue, config: DiffusionConfig = CONFIG, *, codebook: int = CODEBOOK) -> DiffusionGenerator:
    """Random codes for every item, behind an untrained codec and untrained eyes."""
    with global_seed(0, "parts"):
        codec = PatchVQ(PatchVQConfig(size=16, codebook=codebook, width=8, code_width=8, blocks=1))
        vision = JanusVisionConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=16,
            num_image_tokens=1,
            mlp_ratio=2.0,
        )
        eyes = JanusVisionModel(vision)
    return DiffusionGenerator.fresh(
        config, catalogue, eyes=eyes, codec=codec, codes_IL=codes_of(len(catalogue), codebook), seed=0
    ).eval()


def codes_of(items: int, codebook: int = CODEBOOK) -> torch.Tensor:
    return torch.randint(0, codebook, (items, CODES), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def diffusion(catalogue: Catalogue) -> DiffusionGenerator:
    return made(catalogue)


@pytest.fixture(scope="module")
def copier() -> DiffusionGenerator:
    """Taught for a moment, on eight items, to draw the item that the history shows."""
    generator = made(small_catalogue(items=8)).train()
    codes_IL, random = codes_of(8), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(generator.parameters_to_train(), lr=5e-3)
    for _ in range(120):
        items = torch.randint(0, 8, (96,), generator=random)
        keep = torch.rand(96, generator=random) > 0.1
        loss, _ = generator.loss(items[:, None], codes_IL[items][:, None], keep_U=keep, random=random)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return generator.eval()


def nobody(users: int) -> np.ndarray:
    return np.full((users, 5), -1)


def test_a_new_model_knows_how_often_each_code_stands_at_each_place(catalogue: Catalogue) -> None:
    """Before anything is learned it is the best denoiser of independent places, so its nats are theirs."""
    diffusion = made(catalogue, dataclasses.replace(CONFIG, known=0, nats_levels=64))
    random = torch.Generator().manual_seed(0)
    chance_LK = diffusion.prior_LK.detach().softmax(-1)
    codes_NL = torch.multinomial(chance_LK, 400, replacement=True, generator=random).T
    true_N = (
        -diffusion.prior_LK.detach().log_softmax(-1).expand(400, -1, -1).gather(-1, codes_NL[..., None]).sum((1, 2))
    )
    found_N = diffusion.nats(nobody(400), codes_NL[:, None])[:, 0]
    assert float(found_N.mean()) == pytest.approx(float(true_N.mean()), rel=0.06)
    assert float(torch.corrcoef(torch.stack([found_N, true_N]))[0, 1]) > 0.3


def test_samples_follow_the_models_distribution(catalogue: Catalogue) -> None:
    n, diffusion = 500, made(catalogue, dataclasses.replace(CONFIG, known=0, steps=60))
    chance_LK = diffusion.prior_LK.detach().softmax(-1)
    codes = diffusion.sample(nobody(1), n, seeds=[3], spread=False)[0]
    for place in range(CODES):
        share_K = torch.bincount(codes[:, place], minlength=CODEBOOK) / n
        assert float((share_K - chance_LK[place]).abs().sum()) < 0.45


def test_a_new_model_knows_the_pictures_of_the_catalogue_and_draws_by_what_sells(catalogue: Catalogue) -> None:
    """Before anything is learned its nats are those of the table of what sells, and so are its samples."""
    diffusion = made(catalogue, dataclasses.replace(CONFIG, steps=40, nats_levels=64))
    codes_IL, items = codes_of(len(catalogue)), len(catalogue)
    share_I = torch.from_numpy(catalogue.items["purchases"].to_numpy() + 1.0)
    share_I = 0.998 * share_I / share_I.sum()
    # Noise of a picture is always the same, so each item is met once, and weighed.
    found_I = diffusion.nats(nobody(items), codes_IL[:, None])[:, 0].double()
    table = -float((share_I * share_I.log()).sum())
    assert float((share_I * found_I).sum()) == pytest.approx(table, rel=0.1)
    drawn = diffusion.sample(nobody(1), 600, seeds=[3], spread=False)[0]
    same = (drawn[:, None] == codes_IL).all(-1)
    assert float(same.any(1).float().mean()) > 0.9
    assert float((same.float().mean(0) - share_I).abs().sum()) < 0.35


def test_before_anything_is_drawn_items_are_as_likely_as_they_sell_and_favourites_more(
    diffusion: DiffusionGenerator, catalogue: Catalogue
) -> None:
    share_I = torch.from_numpy(catalogue.items["purchases"].to_numpy() + 1.0)
    share_I = share_I / share_I.sum()
    found_UI = diffusion.expected_items(np.array([[-1] * 5, [7, -1, -1, -1, -1]])).double()
    torch.testing.assert_close(found_UI[0], share_I, atol=1e-6, rtol=1e-4)
    odds = found_UI[1, 7] / (1 - found_UI[1, 7]) / (share_I[7] / (1 - share_I[7]))
    assert float(odds) == pytest.approx(np.e, rel=0.05)
    # Where there is nothing but noise, that is how surprised it is by a picture, but for the share of what is new.
    noise = torch.randn(3, *diffusion.shape_LD, generator=torch.Generator().manual_seed(0))
    condition = diffusion.condition(nobody(3))
    error_N = diffusion.error_of(codes_of(len(catalogue))[:3], noise, torch.full((3,), 0.999999), condition)
    torch.testing.assert_close(error_N.double(), -(0.998 * share_I[:3]).log(), atol=0.05, rtol=0.01)


def test_it_learns_to_draw_what_the_history_shows(copier: DiffusionGenerator) -> None:
    codes_IL, items = codes_of(8), np.arange(8)[:, None]
    drawn = copier.sample(items, 4, seeds=list(range(8)))
    assert float((drawn == codes_IL[:, None]).all(-1).float().mean()) > 0.6
    own, other = copier.nll(items, codes_IL), copier.nll(np.roll(items, 1, 0), codes_IL)
    assert float((other - own).min()) > 0
    assert float(own.mean()) < float(copier.nll(items, codes_IL, unconditional=True).mean())


def test_guidance_leans_on_the_history_and_nought_forgets_it(copier: DiffusionGenerator) -> None:
    items, other = np.array([[0], [1]]), np.array([[5], [6]])
    assert torch.equal(
        copier.sample(items, 3, seeds=[1, 2], guidance=0), copier.sample(other, 3, seeds=[1, 2], guidance=0)
    )
    plain = copier.sample(items, 3, seeds=[1, 2])
    assert torch.equal(plain, copier.sample(items, 3, seeds=[1, 2], guidance=1 + 1e-9))
    right = (copier.sample(items, 16, seeds=[1, 2], guidance=3.0) == codes_of(8)[:2, None]).float().mean()
    assert right >= (copier.sample(items, 16, seeds=[1, 2]) == codes_of(8)[:2, None]).float().mean()


def test_a_users_pictures_depend_on_their_own_seed_alone(copier: DiffusionGenerator) -> None:
    items = np.array([[0, 1, -1], [2, -1, -1], [-1, -1, -1]])
    together = copier.sample(items, 3, seeds=[11, 12, 13], guidance=2.0)
    for u, seed in enumerate((11, 12, 13)):
        assert torch.equal(copier.sample(items[u : u + 1], 3, seeds=[seed], guidance=2.0)[0], together[u])
    assert not torch.equal(copier.sample(items, 3, seeds=[11, 12, 23], guidance=2.0)[2], together[2])


def test_only_the_first_items_of_a_longer_history_are_seen_and_their_order_counts(
    diffusion: DiffusionGenerator,
) -> None:
    long = np.arange(12)[None]
    seen, short = diffusion.condition(long), diffusion.condition(long[:, :5])
    assert torch.equal(seen.tokens_NSW, short.tokens_NSW)
    assert not torch.equal(
        diffusion.condition(long[:, [1, 0, 2, 3, 4]]).tokens_NSW[:, 1:3].flip(1), seen.tokens_NSW[:, 1:3]
    )


def test_noises_of_one_user_repel_each_other_and_stay_normal(diffusion: DiffusionGenerator) -> None:
    noise = torch.stack([diffusion._start(seed, 4, spread=True) for seed in range(200)])
    assert float(noise.mean(1).abs().max()) < 1e-5
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    assert float((noise[:, 0] * noise[:, 1]).mean()) == pytest.approx(-1 / 3, abs=0.03)


def test_keeping_one_code_is_greedy(copier: DiffusionGenerator) -> None:
    greedy = copier.sample(np.array([[3]]), 2, seeds=[5], temperature=0)
    assert torch.equal(copier.sample(np.array([[3]]), 2, seeds=[5], top_k=1), greedy)
    assert torch.equal(copier.sample(np.array([[3]]), 2, seeds=[5], top_p=1e-6), greedy)


def test_code_vectors_are_their_own_nearest(diffusion: DiffusionGenerator) -> None:
    codes = codes_of(40)
    assert torch.equal(diffusion.quantise(diffusion.codebook_KD[codes]), codes)


def test_a_folder_says_which_family_it_holds(
    copier: DiffusionGenerator, generator: JanusGenerator, tmp_path: Path
) -> None:
    families: dict[str, Generator] = {"diffusion": copier, "janus": generator}
    for name, one in families.items():
        one.save(tmp_path / name)
        again = load_generator(tmp_path / name)
        assert type(again) is type(one)
        items = np.array([[0, 1, -1]])
        assert torch.equal(again.sample(items, 2, seeds=[4]), one.sample(items, 2, seeds=[4]))
        assert (again.codes_per_picture, again.codebook_size) == (CODES, CODEBOOK)
        drawn = one.sample(items, 2, seeds=[4])
        assert torch.equal(again.nats(items, drawn), one.nats(items, drawn))


def test_one_that_knows_preferences_keeps_them_when_saved(diffusion: DiffusionGenerator, tmp_path: Path) -> None:
    diffusion.personalise(PreferenceConfig(tokens=2, width=16, heads=2), seed=0)
    with torch.no_grad():
        for parameter in diffusion.parameters_to_train():
            parameter.add_(0.3)
    diffusion.save(tmp_path)
    items = np.array([[3, 1, 2, -1, -1]])
    again = load_generator(tmp_path)
    assert torch.equal(again.sample(items, 4, seeds=[4]), diffusion.sample(items, 4, seeds=[4]))


def test_the_codec_of_a_published_model_has_vectors_too(generator: JanusGenerator) -> None:
    from transformers import JanusVQVAE, JanusVQVAEConfig

    facts = generator.model.config.to_dict()["vq_config"]
    codec = JanusCodec(JanusVQVAE(JanusVQVAEConfig(**facts)))
    assert code_vectors(codec).shape == (CODEBOOK, facts["embed_dim"])
    assert torch.allclose(code_vectors(codec).norm(dim=1), torch.ones(CODEBOOK))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "seeds": [1]}, "at least one picture"),
        ({"n": 2, "seeds": [1, 2]}, "give one a user"),
        ({"n": 2, "seeds": [1], "temperature": -1.0}, "out of range"),
    ],
)
def test_settings_out_of_range_are_refused(diffusion: DiffusionGenerator, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        diffusion.sample(nobody(1), **arguments)


def test_there_is_no_search_for_the_likeliest(diffusion: DiffusionGenerator) -> None:
    with pytest.raises(ConfigError, match="evaluate.beams=0"):
        diffusion.likeliest(nobody(1), 2)


def test_errors_name_what_is_wrong(diffusion: DiffusionGenerator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="outside the catalogue of 40"):
        diffusion.condition(np.array([[99]]))
    with pytest.raises(ConfigError, match="width a multiple of heads"):
        DiffusionConfig(width=30, heads=4)
    with pytest.raises(ConfigError, match="reads no preference pairs"):
        diffusion.embed_users(torch.tensor([[1]]), torch.tensor([[2]]))
    with pytest.raises(LineageError, match=r"no generator\.json"):
        load_generator(tmp_path)
    write_json(tmp_path / "generator.json", {"kind": "clay"})
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(LineageError, match="'clay'.* unknown"):
        load_generator(tmp_path)
    with pytest.raises(LineageError, match="no diffusion generator"):
        DiffusionGenerator.load(tmp_path)
