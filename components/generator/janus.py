"""The any-to-any model: transformers' Janus classes at any size, reading a person's history and drawing what is next.

One code path serves a tiny model built from a config and a published one (``deepseek-community/Janus-Pro-1B``) from a
hub name or a folder. History pictures enter through the understanding encoder, words as text tokens; the target is the
code sequence of the next picture, predicted by the generation head (generation.md 1.3, 1.4).

Legend: U users (prompts), n pictures a user, L codes a picture, K codebook entries, P prompt tokens, D width, I items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionModel,
    PreTrainedTokenizerFast,
)

from couturier.components.data.formats import Catalogue
from couturier.components.errors import LineageError
from couturier.components.files import read_json, write_json
from couturier.components.generator.language import LanguageGenerator
from couturier.components.generator.prompt import (
    PICTURE,
    PromptBuilder,
    Prompts,
    describe,
    id_of,
    word_tokenizer,
)
from couturier.components.generator.published import given, load_adapter, open_published, prepare, save_weights
from couturier.components.runtime import global_seed
from couturier.components.together import rank, whole


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Which any-to-any model learns."""

    family: str = "janus"
    """"janus", "emu3" (always published), or "diffusion": then ``sft.diffusion`` beside these says what is built."""
    base: str = ""
    """A hub name or folder of a published Janus or Emu3 in transformers' layout; empty: a tiny Janus from the fields
    ``width`` to ``ffn``."""
    dtype: str = "float32"
    """Of a published model: "bfloat16" holds frozen weights, and makes products, in that type."""
    lora_rank: int = 0
    """Of a published model: 0 learns every weight; else adapters of that rank learn, beside frozen weights."""
    lora_alpha: int = 32
    """Adapters count alpha / rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Projections of the language model that get adapters."""
    lora_save: str = "adapter"
    """"adapter" saves the adapters and the base's name (small; alignment goes on with them); "merged" a whole model."""
    checkpointing: bool = False
    """Work layers out again for the gradient instead of keeping them: a third more time, far less memory."""
    width: int = 128
    layers: int = 4
    heads: int = 4
    ffn: int = 384
    history: int = 12
    """Favourites a prompt shows. More make every step dearer; the first ones say most."""
    max_words: int = 2
    """Text tokens an item may take (phrases with the tiny tokenizer)."""


class JanusGenerator(LanguageGenerator):
    """A Janus model, its prompt builder and the understanding features of the catalogue.

    Build one with :meth:`tiny`, :meth:`published` or :meth:`load`.
    """

    features_ITF: Tensor

    def __init__(
        self,
        model: JanusForConditionalGeneration,
        prompts: PromptBuilder,
        features_ITF: Tensor,
        *,
        codes: int,
        source: GeneratorConfig | None = None,
    ) -> None:
        super().__init__()
        self.model, self.prompts, self.codes_per_picture = model, prompts, codes
        self.source = source or GeneratorConfig()
        self.product_dtype = self.source.dtype
        self.register_buffer("features_ITF", features_ITF.to(model.device), persistent=False)

    @classmethod
    def tiny(
        cls,
        config: GeneratorConfig,
        catalogue: Catalogue,
        *,
        eyes: JanusVisionModel,
        codebook: int,
        codes: int,
        seed: int,
    ) -> JanusGenerator:
        """A small Janus with fresh language weights around a trained understanding tower.

        Args:
            eyes: a ``JanusVisionModel``; its features of the catalogue are computed once and kept.
            codebook: K of the codec.
            codes: L of the codec.
        """
        lines = describe(catalogue)
        tokenizer = word_tokenizer(lines)
        vision = eyes.config.to_dict() | {"projection_dim": config.width, "depth": 2}
        janus = JanusConfig(
            text_config={
                "model_type": "llama",
                "vocab_size": len(tokenizer),
                "hidden_size": config.width,
                "intermediate_size": config.ffn,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                "num_key_value_heads": config.heads,
                "max_position_embeddings": 2048,
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config=vision,
            vq_config={
                "embed_dim": 32,
                "num_embeddings": codebook,
                "projection_dim": config.width,
                "image_token_embed_dim": config.width,
                "num_patches": int(codes**0.5),
                # The codec is trained beside the model (tokenise); this stand-in's weights are dropped at once.
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 0,
                "latent_channels": 32,
            },
            image_token_id=id_of(tokenizer, PICTURE),
        )
        with global_seed(seed, "janus"):
            model = JanusForConditionalGeneration(janus)
            _drop_codec(model)
            _spread(model)
        model.model.vision_model.load_state_dict(eyes.state_dict())
        prompts = PromptBuilder(
            tokenizer,
            lines,
            picture_tokens=eyes.config.num_image_tokens,
            history=config.history,
            max_words=config.max_words,
        )
        return cls(model, prompts, _understand(model, catalogue), codes=codes).freeze_eyes()

    @classmethod
    def published(cls, config: GeneratorConfig, catalogue: Catalogue, *, seed: int = 0) -> JanusGenerator:
        """A published Janus from a hub name or a folder in the published layout; its codec is loaded apart
        (:class:`~couturier.components.generator.janus_codec.JanusCodec`)."""
        model, tokenizer = open_published(JanusForConditionalGeneration, config, seed=seed)
        vision, vq = model.model.vision_model.config, model.model.vqmodel.config
        _drop_codec(model)
        prompts = PromptBuilder(
            tokenizer,
            describe(catalogue),
            picture_tokens=vision.num_image_tokens,
            history=config.history,
            max_words=config.max_words,
        )
        generator = cls(model, prompts, _understand(model, catalogue), codes=vq.num_patches**2, source=config)
        return generator.freeze_eyes()

    def freeze_eyes(self) -> JanusGenerator:
        self.model.model.vision_model.requires_grad_(False)
        return self

    @property
    def codebook_size(self) -> int:
        return self.model.model.generation_embeddings.num_embeddings

    @property
    def lm(self) -> nn.Module:
        """The language model."""
        return self.model.model.language_model

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[..., D]`` → logits of the next code ``[..., K]``."""
        return self.model.model.generation_head(hidden)

    def given(self) -> frozenset[str]:
        """All but the adapters, where only they learn."""
        return given(self, "model.") if self.source.lora_rank else frozenset()

    def blank(self) -> JanusGenerator:
        """A generator of the same shape; its weights are to be loaded."""
        model = JanusForConditionalGeneration(self.model.config)
        _drop_codec(model)
        prepare(model, self.source)
        features, codes = self.features_ITF, self.codes_per_picture
        return JanusGenerator(model, self.prompts, features, codes=codes, source=self.source)

    def parameters_to_train(self) -> list[nn.Parameter]:
        """Language model, aligners, generation embedding and head; the tower, the text head and the codec stay."""
        unused = {id(p) for p in self.model.lm_head.parameters()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in unused]

    def embed_prompt(self, prompts: Prompts, keep_UP: Tensor | None = None) -> Tensor:
        """``[U, P, D]``: text embeddings with aligned picture features written over the placeholders, each multiplied
        by ``keep_UP`` where that is given."""
        janus = self.model.model
        x_UPD = janus.get_input_embeddings()(prompts.ids_UP)
        places = prompts.item_UP >= 0
        if bool(places.any()):
            items, where = prompts.item_UP[places].unique(return_inverse=True)
            aligned = janus.aligner(self.features_ITF[items])
            # Placeholders of one picture follow one another: the i-th of a run takes the i-th feature token.
            nth = (places.long().cumsum(1) - 1)[places] % self.prompts.picture_tokens
            x_UPD = x_UPD.clone()
            # A look-up, not advanced indexing: the gradient of the latter adds up in no fixed order on several threads.
            picked = F.embedding(where * aligned.shape[1] + nth, aligned.flatten(0, 1))
            if keep_UP is not None:
                picked = picked * keep_UP[places][:, None]
            x_UPD[places] = picked.to(x_UPD.dtype)
        return x_UPD

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes ``[...]`` → generation embeddings ``[..., D]``."""
        return self.model.prepare_embeddings_for_image_generation(codes)

    def weights(self) -> dict[str, Tensor]:
        """What is saved of the model, by the published names."""
        return self.model.state_dict()

    def save(self, folder: Path) -> None:
        """Config, weights or adapters (safetensors, codec not included), tokenizer, prompt facts, catalogue features.

        Of several processes all call it, and the first writes."""
        # The text head shares the text embedding: saved once, tied again on loading.
        state = {k: whole(v).contiguous() for k, v in self.weights().items() if k != "lm_head.weight"}
        if rank() > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        kept = save_weights(state, self.source, folder)
        save_file({"features_ITF": self.features_ITF.cpu()}, folder / "features.safetensors")
        self.prompts.save(folder)
        facts = {"kind": "janus", "codes_per_picture": self.codes_per_picture, "source": asdict(kept)}
        write_json(folder / "generator.json", facts)

    @classmethod
    def load(cls, folder: Path) -> JanusGenerator:
        """The generator saved in ``folder``, in evaluation mode; one that draws after a reference picture
        (:class:`~couturier.components.generator.pigeon.PigeonGenerator`) where that is what was saved.

        Raises:
            LineageError: the folder holds none.
            ConfigError: it holds adapters, and the base that they belong to is not where it was.
        """
        if not (folder / "generator.json").exists():
            raise LineageError(f"{folder} holds no generator.json. Run `couturier retrain` to train a generator.")
        facts = read_json(folder / "generator.json")
        source = source_of(facts)
        if source.lora_rank:
            model, _ = open_published(JanusForConditionalGeneration, source)
            _drop_codec(model)
            load_adapter(model, folder)
        else:
            model = JanusForConditionalGeneration(JanusConfig.from_pretrained(folder))
            _drop_codec(model)
            state = load_file(folder / "model.safetensors")
            model.load_state_dict(state | {"lm_head.weight": state["model.language_model.embed_tokens.weight"]})
            prepare(model, source)
        prompts = PromptBuilder.load(folder, PreTrainedTokenizerFast.from_pretrained(folder))
        features = load_file(folder / "features.safetensors")["features_ITF"]
        made = JanusGenerator(model, prompts, features, codes=facts["codes_per_picture"], source=source)
        made.freeze_eyes().eval()
        if (folder / "pigeon.json").exists():
            from couturier.components.generator.pigeon import PigeonGenerator

            return PigeonGenerator.read(folder, made)
        return made


def source_of(facts: Mapping[str, Any]) -> GeneratorConfig:
    """The settings kept in ``generator.json``; those of a folder from before they were kept are the defaults."""
    kept = dict(facts.get("source", {}))
    return GeneratorConfig(**kept | {"lora_targets": tuple(kept["lora_targets"])} if kept else {})


def _drop_codec(model: JanusForConditionalGeneration) -> None:
    """The codec is a part of its own (tokenise); the model keeps only the embedding and head of its codes."""
    model.model.vqmodel = nn.Identity()


@torch.no_grad()
def _spread(model: JanusForConditionalGeneration) -> None:
    """Fresh weights at unit scale. The published initial spread of 0.02 suits width 2,048; at width 128 two such layers
    in a row leave the code embeddings below the norm's epsilon and nothing is learned for hundreds of steps."""
    janus = model.model
    nn.init.normal_(janus.generation_embeddings.weight)
    nn.init.normal_(janus.language_model.embed_tokens.weight)
    for part in (janus.aligner, janus.generation_aligner, janus.generation_head, janus.language_model.layers):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for layer in janus.language_model.layers:
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            out.weight.mul_((2 * len(janus.language_model.layers)) ** -0.5)


@torch.no_grad()
def _understand(model: JanusForConditionalGeneration, catalogue: Catalogue, batch: int = 256) -> Tensor:
    """Understanding features of every catalogue picture before the aligner, ``[I, tokens, F]``."""
    tower = model.model.vision_model.eval()
    parts = [
        tower(
            to_tower(catalogue.rgb_IHWC[i : i + batch], tower.config.image_size).to(tower.device, tower.dtype)
        ).last_hidden_state
        for i in range(0, len(catalogue), batch)
    ]
    return torch.cat(parts)


def to_tower(rgb_NHWC: np.ndarray, size: int) -> Tensor:
    """uint8 pictures → what the understanding tower reads: float ``[N, 3, size, size]`` in [-1, 1]."""
    x = torch.from_numpy(np.array(rgb_NHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
    return x
