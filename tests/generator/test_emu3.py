"""A tiny Emu3 in the published layout: read as transformers reads it, drawn from by our sampler, tuned and saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import Emu3Config, Emu3ForConditionalGeneration, PreTrainedTokenizerFast

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.generator.codec import load_codec
from couturier.components.generator.emu3 import (
    END,
    END_OF_FRAME,
    END_OF_ROW,
    FOLLOWS,
    PLACEHOLDER,
    START,
    Emu3Codec,
    Emu3Generator,
)
from couturier.components.generator.janus import GeneratorConfig
from couturier.components.generator.memory import Work, estimate, shape_of
from couturier.components.generator.prompt import SPECIAL, describe
from couturier.components.generator.published import check_settings
from couturier.components.generator.tokenise import pictures, published_codec
from couturier.components.generator.types import load_generator

CODEBOOK, EDGE, PIXELS = 24, 3, 12
HISTORY = np.array([[1, 2], [3, -1]])


def emu3_tokenizer(catalogue: Catalogue) -> PreTrainedTokenizerFast:
    """Word level, with the marks of the published tokenizer."""
    phrases = sorted({phrase for line in describe(catalogue) for phrase in line.split(", ")})
    visual = [f"<|visual token {i:06d}|>" for i in range(CODEBOOK)]
    marks = [START, FOLLOWS, END_OF_FRAME, END, PLACEHOLDER, END_OF_ROW]
    sizes = [f"{edge}*{edge}" for edge in range(1, 9)]
    names = [*SPECIAL.values(), *marks, "User", "Assistant", *sizes, *visual, *phrases]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = Split(Regex(", "), behavior="removed")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
    fast.add_special_tokens({"additional_special_tokens": marks})
    return fast


def publish(catalogue: Catalogue, folder: Path) -> str:
    """Write an untrained Emu3 as a hub holds it: config, tokenizer, weights, codec included."""
    tokenizer = emu3_tokenizer(catalogue)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_dropout": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vq = {
        "codebook_size": CODEBOOK,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 64,
        "temporal_downsample_factor": 2,
    }
    torch.manual_seed(0)
    config = Emu3Config(text_config=text, vq_config=vq, vocabulary_map=tokenizer.get_vocab())
    model = Emu3ForConditionalGeneration(config)
    with torch.no_grad():  # fresh weights of the published scale are too small for a tiny model to tell anything apart
        for value in model.model.text_model.parameters():
            if value.ndim == 2:
                value.normal_(std=value.shape[1] ** -0.5)
        model.lm_head.weight.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish(catalogue, tmp_path_factory.mktemp("emu3"))


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
