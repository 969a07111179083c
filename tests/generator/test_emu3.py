"""A tiny Emu3 in the published layout: read as transformers reads it, drawn from by our sampler, tuned and saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Emu3ForConditionalGeneration

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.generator.codec import load_codec, pictures
from couturier.components.generator.emu3 import (
    END,
    END_OF_FRAME,
    END_OF_ROW,
    FOLLOWS,
    START,
    Emu3Codec,
    Emu3Generator,
)
from couturier.components.generator.janus import GeneratorConfig
from couturier.components.generator.memory import Work, estimate, shape_of
from couturier.components.generator.prompt import SPECIAL
from couturier.components.generator.published import check_settings
from couturier.components.generator.tokenise import published_codec
from couturier.components.generator.types import load_generator

from .published import CODEBOOK, publish_emu3
from .test_beams import searched

EDGE, PIXELS = 3, 12
HISTORY = np.array([[1, 2], [3, -1]])


@pytest.fixture(scope="module")
def base(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_emu3(catalogue, tmp_path_factory.mktemp("emu3"))


@pytest.fixture(scope="module")
def codes_IL(base: str, catalogue: Catalogue) -> torch.Tensor:
    codec = published_codec(base, pixels=PIXELS)
    return codec.encode(pictures(catalogue, codec.picture_size))


def config_of(base: str, **changes: object) -> GeneratorConfig:
    config = GeneratorConfig(family="emu3", base=base, history=2, max_words=2)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture
def generator(base: str, catalogue: Catalogue, codes_IL: torch.Tensor) -> Emu3Generator:
    return Emu3Generator.published(config_of(base), catalogue, codes_IL).eval()


def test_the_codec_is_the_models_own(base: str, codes_IL: torch.Tensor, catalogue: Catalogue, tmp_path: Path) -> None:
    codec = Emu3Codec.published(base, pixels=PIXELS)
    assert codec.codes_per_picture == EDGE**2 and codec.codebook_size == CODEBOOK and codec.grain == 4
    codec.save(tmp_path)
    again = load_codec(tmp_path)
    assert again.picture_size == PIXELS
    rgb = pictures(catalogue, PIXELS)[:4]
    assert torch.equal(again.encode(rgb), codes_IL[:4])
    torch.testing.assert_close(again.decode(codes_IL[:4]), codec.decode(codes_IL[:4]))
    assert again.decode(codes_IL[:4]).shape == rgb.shape
    vq = codec.vq
    assert torch.equal(
        codes_IL[0].view(EDGE, EDGE), vq.encode(rgb[:1] * 2 - 1, torch.tensor([[12, 12]])).image_tokens[0]
    )
    with pytest.raises(ConfigError, match="choose a multiple of 4"):
        Emu3Codec(vq, pixels=13)


def written_out(generator: Emu3Generator, history: list[int], codes: torch.Tensor) -> torch.Tensor:
    """The whole sequence as words, put together by hand after Emu3's processor: ids ``[S]``."""
    words = generator.prompts.tokenizer
    size = [START, f"{EDGE}*{EDGE}", FOLLOWS]

    def picture(row: torch.Tensor) -> list[str]:
        lines = [[f"<|visual token {int(code):06d}|>" for code in line] + [END_OF_ROW] for line in row.view(EDGE, EDGE)]
        return [token for line in lines for token in line]

    tokens = [SPECIAL["bos_token"], "User"]
    for item in history:
        tokens += [*size, *picture(generator.codes_IL[item]), END_OF_FRAME, END]
        tokens += generator.prompts.lines[item].split(", ")[:2]
    tokens += ["Assistant", *size, *picture(codes)]
    return torch.tensor(words.convert_tokens_to_ids(tokens))


def test_probabilities_are_those_of_transformers_own_forward(generator: Emu3Generator) -> None:
    codes = torch.randint(CODEBOOK, (2, 2, EDGE**2), generator=torch.Generator().manual_seed(0))
    lp = generator.log_prob(generator.prompts.build(HISTORY), codes).detach()
    full = Emu3ForConditionalGeneration.from_pretrained(generator.source.base).eval()
    visual = generator.token_K
    for user, history in enumerate(([1, 2], [3])):
        for n in range(2):
            ids = written_out(generator, history, codes[user, n])
            with torch.no_grad():
                logits = full(input_ids=ids[None]).logits[0, :-1]
            expected = logits[:, visual].log_softmax(-1)
            at = torch.tensor(
                [i for i in range(len(ids) - EDGE * (EDGE + 1), len(ids)) if int(ids[i]) in visual.tolist()]
            )
            torch.testing.assert_close(lp[user, n], expected[at - 1, codes[user, n]], atol=1e-4, rtol=1e-4)


def test_the_sampler_draws_what_the_model_finds_likely(generator: Emu3Generator) -> None:
    """Greedy codes are the likeliest one by one under the teacher-forced pass, guided too; marks are read between."""
    prompts = generator.prompts.build(HISTORY)
    drawn = generator.sample(HISTORY, 2, seeds=[1, 2], temperature=0)
    with torch.no_grad():
        logits = generator.logits(prompts, drawn)
    assert torch.equal(drawn, logits.argmax(-1))
    guided = generator.sample(HISTORY, 1, seeds=[1, 2], temperature=0, guidance=2.0)
    with torch.no_grad():
        own = generator.logits(prompts, guided)
        free = generator.logits(prompts.unconditional(generator.prompts.pad_id), guided)
    assert torch.equal(guided, (free + 2 * (own - free)).argmax(-1))
    alone = generator.sample(HISTORY[1:], 3, seeds=[2])
    assert torch.equal(alone[0], generator.sample(HISTORY, 3, seeds=[1, 2])[1])


def test_the_likeliest_pictures_are_found_past_the_marks_between_rows(generator: Emu3Generator) -> None:
    found = generator.likeliest(HISTORY, 3, beams=12)
    for codes_nL, history_K in zip(found, HISTORY, strict=True):
        assert torch.equal(codes_nL, searched(generator, history_K, 12)[:3])


def test_the_history_is_read(generator: Emu3Generator) -> None:
    codes = torch.zeros(1, 1, EDGE**2, dtype=torch.long)
    own, other, none = (
        generator.nll(np.array([history]), codes[0], unconditional=free)
        for history, free in (([1, 2], False), ([1, 7], False), ([1, 2], True))
    )
    assert abs(float(own - other)) > 1e-3 and abs(float(own - none)) > 1e-3


@pytest.mark.parametrize("rank", [0, 2])
def test_it_learns_and_comes_back(
    base: str, catalogue: Catalogue, codes_IL: torch.Tensor, rank: int, tmp_path: Path
) -> None:
    config = config_of(base, lora_rank=rank, lora_targets=("q_proj", "up_proj"), checkpointing=bool(rank))
    tuned = Emu3Generator.published(config, catalogue, codes_IL).train()
    targets = codes_IL[torch.tensor([[4, 5], [6, 7]])]
    optimiser = torch.optim.AdamW(tuned.parameters_to_train(), lr=0.02)
    losses = []
    for _ in range(8):
        loss, tokens = tuned.loss(HISTORY, targets, keep_U=torch.ones(2, dtype=torch.bool), random=torch.Generator())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1 and tokens > 0
    tuned.eval().save(tmp_path)
    again = load_generator(tmp_path)
    assert isinstance(again, Emu3Generator) and again.codebook_size == CODEBOOK
    torch.testing.assert_close(again.nats(HISTORY, targets), tuned.nats(HISTORY, targets), atol=1e-4, rtol=1e-4)
    assert torch.equal(again.sample(HISTORY, 2, seeds=[3, 4]), tuned.sample(HISTORY, 2, seeds=[3, 4]))
    weights = sum(p.numel() * p.element_size() for p in tuned.parameters())
    work = Work(lora_rank=rank, lora_targets=("q_proj", "up_proj"))
    assert estimate(shape_of(base, edge=EDGE), work).weights == weights


def test_what_does_not_fit_is_told(base: str, catalogue: Catalogue, codes_IL: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"take \d+ tokens, and .* reads 128"):
        Emu3Generator.published(config_of(base, history=9), catalogue, codes_IL)
    with pytest.raises(ConfigError, match="family 'emu3', and sft.generator.family is 'janus'; set it to emu3"):
        check_settings(config_of(base, family="janus"))
    with pytest.raises(ConfigError, match="always a published model"):
        check_settings(GeneratorConfig(family="emu3"))
