"""Emu3: pictures are words of one vocabulary, in a person's history as in the answer (arXiv 2409.18869).

    <bos> User  [marks, 16*16, codes row by row, marks] words  …  Assistant  <image start> 16*16 <image token>  →  codes

A picture is read as the tokens of its codes, a mark at the end of each row. Codes alone are drawn: of the head's
columns only those of picture tokens are looked at, and the marks between rows are read, never drawn. Classes, weights
and tokenizer are transformers' (``Emu3ForConditionalGeneration``); what stands around a history picture is laid out as
its processor does it, the order of history and words is ours.

Legend: U users (prompts), n pictures a user, L codes a picture, K codebook entries, P prompt tokens, D width, I items,
T tokens of a history picture.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Emu3Config, Emu3ForConditionalGeneration, Emu3VQVAE, Emu3VQVAEConfig

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, LineageError
from couturier.components.files import read_json, write_json
from couturier.components.generator.janus import GeneratorConfig, source_of
from couturier.components.generator.language import LanguageGenerator
from couturier.components.generator.prompt import Marks, PromptBuilder, Prompts, describe
from couturier.components.generator.published import given, load_adapter, open_published, prepare, save_weights
from couturier.components.together import rank, whole

# As Emu3's processor writes a picture: start, size in codes, what follows is codes, … end of frame, end.
START, FOLLOWS, END_OF_FRAME, END = "<|image start|>", "<|image token|>", "<|extra_201|>", "<|image end|>"
PLACEHOLDER, END_OF_ROW = "<image>", "<|extra_200|>"


class Emu3Codec:
    """The codec of a published Emu3: its own VQ model, frozen. It takes pictures of any size that its grid divides.

    Args:
        pixels: an edge of the pictures it is used for.
    """

    def __init__(self, vq: Emu3VQVAE, *, pixels: int) -> None:
        self.vq, self.picture_size = vq.eval().requires_grad_(False), pixels
        if pixels < 1 or pixels % self.grain:
            raise ConfigError(
                f"tokenise.base_pixels is {pixels}; Emu3's codes stand for {self.grain} pixels an edge, so choose a "
                f"multiple of {self.grain}, for example {16 * self.grain}."
            )

    @classmethod
    def published(cls, base: str, *, pixels: int) -> Emu3Codec:
        """From a hub name or folder of an Emu3 model."""
        return cls(Emu3ForConditionalGeneration.from_pretrained(base).model.vqmodel, pixels=pixels)

    @property
    def grain(self) -> int:
        """Pixels an edge that one code stands for."""
        return int(self.vq.vision_spatial_factor)

    @property
    def codebook_size(self) -> int:
        return int(self.vq.config.codebook_size)

    @property
    def codes_per_picture(self) -> int:
        return (self.picture_size // self.grain) ** 2

    @torch.no_grad()
    def encode(self, rgb_N3HW: Tensor) -> Tensor:
        """Pictures in [0, 1] → codes int64 ``[N, L]``, row by row."""
        size = self.picture_size
        if rgb_N3HW.shape[-1] != size:
            rgb_N3HW = F.interpolate(rgb_N3HW, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
        sizes = torch.full((len(rgb_N3HW), 2), size)
        tokens = self.vq.encode(rgb_N3HW * 2 - 1, sizes).image_tokens
        return torch.stack(list(tokens)).flatten(1)

    @torch.no_grad()
    def decode(self, codes_NL: Tensor) -> Tensor:
        """Codes → pictures in [0, 1], ``[N, 3, H, W]``."""
        edge = self.picture_size // self.grain
        video = self.vq.decode(codes_NL.view(-1, edge, edge))
        return ((video + 1) / 2).clamp(0, 1)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.vq.state_dict().items()}, folder / "codec.safetensors")
        facts = {"kind": "emu3_vq", "pixels": self.picture_size, "config": self.vq.config.to_dict()}
        write_json(folder / "codec.json", facts)

    @classmethod
    def load(cls, folder: Path) -> Emu3Codec:
        """What :meth:`save` wrote."""
        facts = read_json(folder / "codec.json")
        vq = Emu3VQVAE(Emu3VQVAEConfig(**facts["config"]))
        vq.load_state_dict(load_file(folder / "codec.safetensors"))
        return cls(vq, pixels=facts["pixels"])


class Emu3Generator(LanguageGenerator):
    """An Emu3, its prompt builder and the codes of the catalogue's pictures, which histories are made of.

    Build one with :meth:`published` or :meth:`load`.
    """

    codes_IL: Tensor
    token_K: Tensor

    def __init__(
        self, model: Emu3ForConditionalGeneration, prompts: PromptBuilder, codes_IL: Tensor, *, source: GeneratorConfig
    ) -> None:
        super().__init__()
        self.model, self.prompts, self.source = model, prompts, source
        self.product_dtype, self.codes_per_picture = source.dtype, codes_IL.shape[1]
        self.edge = round(self.codes_per_picture**0.5)
        words = model.config.vocabulary_map
        if not words or END_OF_ROW not in words:
            raise ConfigError(
                f"the config of {source.base!r} has no vocabulary_map with picture tokens; give an Emu3 in the layout "
                "of transformers (its name ends in -hf)."
            )
        self.end_of_row = int(words[END_OF_ROW])
        tokens = sorted((name, token) for name, token in words.items() if name.startswith("<|visual token"))
        self.register_buffer("codes_IL", codes_IL.to(model.device), persistent=False)
        token_K = torch.tensor([token for _, token in tokens], device=model.device)
        self.register_buffer("token_K", token_K, persistent=False)

    @classmethod
    def published(
        cls, config: GeneratorConfig, catalogue: Catalogue, codes_IL: Tensor, *, seed: int = 0
    ) -> Emu3Generator:
        """A published Emu3 from a hub name or a folder in the published layout; its codec is loaded apart.

        Args:
            codes_IL: of the catalogue's pictures, from :class:`Emu3Codec`.
            seed: of fresh adapters.

        Raises:
            ConfigError: no such model, or a prompt that its window does not hold.
        """
        model, tokenizer = open_published(Emu3ForConditionalGeneration, config, seed=seed)
        _drop_codec(model)
        edge = round(codes_IL.shape[1] ** 0.5)
        size = f"{START}{edge}*{edge}{FOLLOWS}"
        marks = Marks(placeholder=PLACEHOLDER, before=size, after=f"{END_OF_FRAME}{END}", end=size)
        prompts = PromptBuilder(
            tokenizer,
            describe(catalogue),
            picture_tokens=edge * (edge + 1),
            history=config.history,
            max_words=config.max_words,
            marks=marks,
        )
        needed, window = prompts.longest + edge * (edge + 1), model.config.text_config.max_position_embeddings
        if needed > window:
            raise ConfigError(
                f"sft.generator.history is {config.history}: with pictures of {edge} by {edge} codes a prompt and its "
                f"answer take {needed} tokens, and {config.base} reads {window}. Show fewer pictures, or make them "
                "smaller with tokenise.base_pixels."
            )
        return cls(model, prompts, codes_IL, source=config)

    @property
    def lm(self) -> nn.Module:
        """The language model."""
        return self.model.model.text_model

    @property
    def codebook_size(self) -> int:
        return len(self.token_K)

    def given(self) -> frozenset[str]:
        """All but the adapters, where only they learn."""
        return given(self, "model.") if self.source.lora_rank else frozenset()

    def blank(self) -> Emu3Generator:
        """A generator of the same shape; its weights are to be loaded."""
        model = Emu3ForConditionalGeneration(self.model.config)
        _drop_codec(model)
        prepare(model, self.source)
        return Emu3Generator(model, self.prompts, self.codes_IL, source=self.source)

    def parameters_to_train(self) -> list[nn.Parameter]:
        """The language model with its embedding and head, or its adapters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[..., D]`` → logits of the next code ``[..., K]``: the columns of picture tokens only."""
        return F.linear(hidden, self.model.lm_head.weight[self.token_K])

    def embed_prompt(self, prompts: Prompts) -> Tensor:
        """``[U, P, D]``: placeholders become the tokens of their picture's codes, rows ended by their mark."""
        ids_UP, item_UP = prompts.ids_UP, prompts.item_UP
        places = item_UP >= 0
        if bool(places.any()):
            # Placeholders of one picture follow one another: the i-th of a run takes the i-th token.
            nth = (places.long().cumsum(1) - 1)[places] % self.prompts.picture_tokens
            ids_UP = ids_UP.masked_scatter(places, self._tokens_IT()[item_UP[places], nth])
        return self.model.get_input_embeddings()(ids_UP)

    def _tokens_IT(self) -> Tensor:
        """Tokens of every catalogue picture, int64 ``[I, T]``."""
        rows_IHW = self.token_K[self.codes_IL].unflatten(1, (self.edge, self.edge))
        return F.pad(rows_IHW, (0, 1), value=self.end_of_row).flatten(1)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes ``[...]`` → embeddings of their tokens ``[..., D]``."""
        return self.model.get_input_embeddings()(self.token_K[codes])

    def embed_mark(self, at: int) -> Tensor | None:
        """The end of a row is read after its last code."""
        if (at + 1) % self.edge:
            return None
        return self.model.get_input_embeddings()(torch.tensor(self.end_of_row, device=self.device))

    def save(self, folder: Path) -> None:
        """Config, weights or adapters (safetensors, codec not included), tokenizer, prompt facts, catalogue codes.

        Of several processes all call it, and the first writes."""
        state = {name: whole(value).contiguous() for name, value in self.model.state_dict().items()}
        if rank() > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        kept = save_weights(state, self.source, folder)
        save_file({"codes_IL": self.codes_IL.cpu().contiguous()}, folder / "features.safetensors")
        self.prompts.save(folder)
        facts = {"kind": "emu3", "codes_per_picture": self.codes_per_picture, "source": asdict(kept)}
        write_json(folder / "generator.json", facts)

    @classmethod
    def load(cls, folder: Path) -> Emu3Generator:
        """The generator saved in ``folder``, in evaluation mode.

        Raises:
            LineageError: the folder holds none.
            ConfigError: it holds adapters, and the base that they belong to is not where it was.
        """
        if not (folder / "generator.json").exists():
            raise LineageError(f"{folder} holds no generator.json. Run `couturier retrain` to train a generator.")
        source = source_of(read_json(folder / "generator.json"))
        model: Any
        if source.lora_rank:
            model, _ = open_published(Emu3ForConditionalGeneration, source)
            _drop_codec(model)
            load_adapter(model, folder)
        else:
            model = Emu3ForConditionalGeneration(Emu3Config.from_pretrained(folder))
            _drop_codec(model)
            model.load_state_dict(load_file(folder / "model.safetensors"))
            prepare(model, source)
        prompts = PromptBuilder.load(folder, AutoTokenizer.from_pretrained(folder))
        codes_IL = load_file(folder / "features.safetensors")["codes_IL"]
        return cls(model, prompts, codes_IL, source=source).eval()


def _drop_codec(model: Emu3ForConditionalGeneration) -> None:
    """The codec is a part of its own (tokenise)."""
    model.model.vqmodel = nn.Identity()
