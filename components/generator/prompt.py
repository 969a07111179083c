"""The prompt: a person's items as pictures and words, closed by the begin-of-image token.

    <bos> User  [picture] words  [picture] words  …  Assistant <boi>   →  codes of the next picture

One form for every size of model; a tiny model gets a word-level tokenizer made from the catalogue, a published one
brings its own. Picture positions hold the placeholder id and are overwritten with understanding features: history
pictures never enter as codes. The unconditional row replaces everything between the first and the last token by pad
and keeps the length (generation.md 1.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError
from couturier.components.files import read_json, write_json

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
PICTURE, BEGIN_OF_IMAGE, USER, ASSISTANT = "<image_placeholder>", "<begin_of_image>", "User", "Assistant"


def describe(catalogue: Catalogue) -> list[str]:
    """The words of every item, phrases parted by ``, ``: first attribute, then the short ones together; else the title.

    Example: ``"SOFT DRINKS, National low"``.
    """
    names = [name for name in catalogue.attributes if name != "department"]
    if not names:
        return catalogue.items["title"].fill_null("").to_list()
    head, rest = names[0], names[1:]
    lines = []
    for row in catalogue.items.select(names).iter_rows(named=True):
        tail = " ".join(str(row[name]) for name in rest if row[name] is not None)
        phrases = [str(row[head] or "unknown").replace(",", " "), tail.replace(",", " ")]
        lines.append(", ".join(phrase for phrase in phrases if phrase))
    return lines


def word_tokenizer(lines: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over phrases parted by commas; one phrase is one token."""
    phrases = sorted({phrase.strip() for line in lines for phrase in line.split(", ")})
    names = [*SPECIAL.values(), PICTURE, BEGIN_OF_IMAGE, USER, ASSISTANT]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*names, *phrases]))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = Split(Regex(", "), behavior="removed")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
    fast.add_special_tokens({"additional_special_tokens": [PICTURE, BEGIN_OF_IMAGE]})
    return fast


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of prompts. ids_UP int64, left-padded; item_UP: catalogue index at picture positions, else -1;
    mask_UP True where a token counts; position_UP int64 counts from each row's first token. reference_UR int64 has two
    columns where prompts show a reference picture (:mod:`couturier.components.generator.pigeon`), none elsewhere: its
    catalogue index, -1 for none, and which share of it is hidden, in thousandths."""

    ids_UP: Tensor
    item_UP: Tensor
    mask_UP: Tensor
    position_UP: Tensor
    reference_UR: Tensor

    def unconditional(self, pad_id: int) -> Prompts:
        """The same lengths with nothing but pad between the first and the last token; pads count as tokens here."""
        last = self.ids_UP.shape[1] - 1
        first_U = self.mask_UP.long().argmax(1)
        column = torch.arange(last + 1)[None]
        middle_UP = (column > first_U[:, None]) & (column < last)
        return Prompts(
            ids_UP=self.ids_UP.masked_fill(middle_UP, pad_id),
            item_UP=torch.full_like(self.item_UP, -1),
            mask_UP=self.mask_UP,
            position_UP=self.position_UP,
            reference_UR=torch.full_like(self.reference_UR, -1),
        )

    def to(self, device: torch.device) -> Prompts:
        """The same on another device."""
        return Prompts(**{name: value.to(device) for name, value in vars(self).items()})

    def rows(self, some: slice | Tensor) -> Prompts:
        """Some of the prompts."""
        return Prompts(**{name: value[some] for name, value in vars(self).items()})

    def where(self, keep_U: Tensor, other: Prompts) -> Prompts:
        """Row by row: this one where ``keep_U``, else ``other`` (same shapes)."""
        k = keep_U[:, None]
        return Prompts(
            ids_UP=torch.where(k, self.ids_UP, other.ids_UP),
            item_UP=torch.where(k, self.item_UP, other.item_UP),
            mask_UP=torch.where(k, self.mask_UP, other.mask_UP),
            position_UP=torch.where(k, self.position_UP, other.position_UP),
            reference_UR=torch.where(k, self.reference_UR, other.reference_UR),
        )


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What stands around pictures in a family's prompts, as text that its tokenizer knows."""

    placeholder: str = PICTURE
    """Stands where a history picture's tokens go."""
    before: str = ""
    """A history picture's tokens."""
    after: str = ""
    end: str = BEGIN_OF_IMAGE
    """Of the prompt: what follows is a picture."""


class PromptBuilder:
    """Turns histories (item indices) into :class:`Prompts`.

    Args:
        tokenizer: of the model.
        lines: the words of each catalogue item, from :func:`describe`.
        picture_tokens: placeholder tokens a history picture takes.
        history: items of a history that are shown, the first ones given.
        max_words: tokens an item's words may take; the rest is cut.
        marks: what stands around pictures; Janus' own if none are given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        lines: Sequence[str],
        *,
        picture_tokens: int,
        history: int,
        max_words: int,
        marks: Marks | None = None,
    ) -> None:
        self.tokenizer, self.lines, self.marks = tokenizer, list(lines), marks or Marks()
        self.picture_tokens, self.history, self.max_words = picture_tokens, history, max_words
        self.picture_id = id_of(tokenizer, self.marks.placeholder)
        self.pad_id = int(tokenizer.pad_token_id)
        words = tokenizer(self.lines, add_special_tokens=False)["input_ids"] if lines else []
        before, after = (_ids_of(tokenizer, text) if text else [] for text in (self.marks.before, self.marks.after))
        slots = [[*before, *[self.picture_id] * picture_tokens, *after, *ids[:max_words]] for ids in words]
        self._length_I = np.array([len(slot) for slot in slots], np.int64)
        width = max(self._length_I, default=1)
        self._slot_IT = np.full((len(slots), width), self.pad_id, np.int64)
        for row, slot in zip(self._slot_IT, slots, strict=True):
            row[: len(slot)] = slot
        self._head = [int(tokenizer.bos_token_id), *_ids_of(tokenizer, USER)]
        end = _ids_of(tokenizer, self.marks.end) if self.marks.before else [id_of(tokenizer, self.marks.end)]
        self._tail = [*_ids_of(tokenizer, ASSISTANT), *end]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that a history can make."""
        return len(self._head) + self.history * int(self._slot_IT.shape[1]) + len(self._tail)

    @property
    def reference_place(self) -> int:
        """Where a prompt shows its reference picture, counted from its end."""
        return -1 - len(self._tail)

    def build(
        self, favourites_UK: np.ndarray | Tensor, *, references_U: Tensor | None = None, hidden: float = 0.0
    ) -> Prompts:
        """Histories int ``[U, K]`` (-1: nothing; the first ``history`` items are shown) → prompts.

        Args:
            references_U: catalogue index of a reference picture each, shown as one more token after the history; None:
                no such token.
            hidden: which share of the references is hidden.

        Raises:
            ConfigError: an item index outside the catalogue.
        """
        favourites = np.asarray(favourites_UK)[:, : self.history]
        if favourites.size and int(favourites.max()) >= len(self.lines):
            raise ConfigError(
                f"item index {int(favourites.max())} is outside the catalogue of {len(self.lines)} items."
            )
        shown = [] if references_U is None else [self.picture_id]
        tail = [*shown, *self._tail]
        rows, items = [], []
        column = np.arange(self._slot_IT.shape[1])
        for history in favourites:
            known = history[history >= 0]
            keep = column[None] < self._length_I[known][:, None]
            tokens = self._slot_IT[known]
            owner = np.where(tokens == self.picture_id, known[:, None], -1)
            rows.append(np.concatenate([self._head, tokens[keep], tail]))
            items.append(np.concatenate([np.full(len(self._head), -1), owner[keep], np.full(len(tail), -1)]))
        width = max(len(row) for row in rows)
        ids = np.full((len(rows), width), self.pad_id, np.int64)
        owners = np.full((len(rows), width), -1, np.int64)
        mask = np.zeros((len(rows), width), bool)
        for i, (row, owner_row) in enumerate(zip(rows, items, strict=True)):
            ids[i, width - len(row) :] = row
            owners[i, width - len(row) :] = owner_row
            mask[i, width - len(row) :] = True
        mask_UP = torch.from_numpy(mask)
        reference_UR = torch.zeros(len(rows), 0, dtype=torch.long)
        if references_U is not None:
            reference_UR = torch.stack([references_U, torch.full_like(references_U, round(1000 * hidden))], 1)
        return Prompts(
            ids_UP=torch.from_numpy(ids),
            item_UP=torch.from_numpy(owners),
            mask_UP=mask_UP,
            position_UP=(mask_UP.long().cumsum(1) - 1).clamp_min(0),
            reference_UR=reference_UR,
        )

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        facts = {"picture_tokens": self.picture_tokens, "history": self.history, "max_words": self.max_words}
        write_json(folder / "prompt.json", facts | {"lines": self.lines, "marks": vars(self.marks)})

    @classmethod
    def load(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PromptBuilder:
        facts = read_json(folder / "prompt.json")
        marks = Marks(**facts.pop("marks", {}))
        return cls(tokenizer, facts.pop("lines"), marks=marks, **facts)


def id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a special token.

    Raises:
        ConfigError: the tokenizer does not know it.
    """
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int) or found == tokenizer.unk_token_id:
        raise ConfigError(f"the tokenizer has no token {token!r}; the folder must hold the tokenizer of that model.")
    return found


def _ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
