"""The any-to-any model: transformers' Janus classes at any size, reading a person's history and drawing what is next.

One code path serves a tiny model built from a config and a published one (``deepseek-ai/Janus-Pro-1B``) from a hub
name or a folder. History pictures enter through the understanding encoder, words as text tokens; the target is the
code sequence of the next picture, predicted by the generation head (generation.md 1.3, 1.4).

Legend: U users (prompts), n pictures a user, L codes a picture, K codebook entries, P prompt tokens, D width, I items.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionModel,
    PreTrainedTokenizerFast,
)

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, LineageError
from couturier.components.files import read_json, write_json
from couturier.components.generator.prompt import (
    PICTURE,
    PromptBuilder,
    Prompts,
    describe,
    id_of,
    word_tokenizer,
)
from couturier.components.generator.sampler import SamplerSettings, sample_codes
from couturier.components.runtime import global_seed
from couturier.components.together import gathered, rank, whole


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Which any-to-any model learns."""

    family: str = "janus"
    """"janus", or "diffusion": then the settings beside these, ``sft.diffusion``, say what is built."""
    base: str = ""
    """A hub name or folder of a Janus model; empty: a tiny one from the fields below."""
    width: int = 128
    layers: int = 4
    heads: int = 4
    ffn: int = 384
    history: int = 12
    """Favourites a prompt shows. More make every step dearer; the first ones say most."""
    max_words: int = 2
    """Text tokens an item may take (phrases with the tiny tokenizer)."""


class JanusGenerator(nn.Module):
    """A Janus model, its prompt builder and the understanding features of the catalogue.

    Build one with :meth:`tiny`, :meth:`published` or :meth:`load`.
    """

    features_ITF: Tensor

    def __init__(
        self, model: JanusForConditionalGeneration, prompts: PromptBuilder, features_ITF: Tensor, *, codes: int
    ) -> None:
        super().__init__()
        self.model, self.prompts, self.codes_per_picture = model, prompts, codes
        self.register_buffer("features_ITF", features_ITF, persistent=False)

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
    def published(cls, config: GeneratorConfig, catalogue: Catalogue) -> JanusGenerator:
        """A published Janus from a hub name or a folder in the published layout; its codec is loaded apart
        (:class:`~couturier.components.generator.janus_codec.JanusCodec`)."""
        try:
            model = JanusForConditionalGeneration.from_pretrained(config.base)
            tokenizer = AutoTokenizer.from_pretrained(config.base)
        except OSError as error:
            raise ConfigError(
                f"sft.generator.base is {config.base!r}, which is neither a folder with a Janus model nor a reachable "
                f"hub name ({str(error).splitlines()[0]}). Give a folder, or leave it empty for the tiny model."
            ) from error
        vision, vq = model.model.vision_model.config, model.model.vqmodel.config
        _drop_codec(model)
        prompts = PromptBuilder(
            tokenizer,
            describe(catalogue),
            picture_tokens=vision.num_image_tokens,
            history=config.history,
            max_words=config.max_words,
        )
        return cls(model, prompts, _understand(model, catalogue), codes=vq.num_patches**2).freeze_eyes()

    def freeze_eyes(self) -> JanusGenerator:
        self.model.model.vision_model.requires_grad_(False)
        return self

    @property
    def codebook_size(self) -> int:
        return self.model.model.generation_embeddings.num_embeddings

    @property
    def layers(self) -> nn.ModuleList:
        """Of the language model."""
        return self.model.model.language_model.layers

    def blank(self) -> JanusGenerator:
        """A generator of the same shape; its weights are to be loaded."""
        model = JanusForConditionalGeneration(self.model.config)
        _drop_codec(model)
        return JanusGenerator(model, self.prompts, self.features_ITF, codes=self.codes_per_picture)

    def parameters_to_train(self) -> list[nn.Parameter]:
        """Language model, aligners, generation embedding and head; the tower, the text head and the codec stay."""
        unused = {id(p) for p in self.model.lm_head.parameters()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in unused]

    def embed_prompt(self, prompts: Prompts) -> Tensor:
        """``[U, P, D]``: text embeddings with aligned picture features written over the placeholders."""
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
            x_UPD[places] = picked.to(x_UPD.dtype)
        return x_UPD

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes ``[...]`` → generation embeddings ``[..., D]``."""
        return self.model.prepare_embeddings_for_image_generation(codes)

    def logits(self, prompts: Prompts, codes_UnL: Tensor) -> Tensor:
        """Teacher-forced logits ``[U, n, L, K]`` of ``n`` pictures a user in one packed pass.

        The prompt is computed once; each picture's codes attend to it and to themselves, never to another picture.
        """
        u, n, length = codes_UnL.shape
        prefix_UPD = self.embed_prompt(prompts)
        p, own = prefix_UPD.shape[1], length - 1
        codes_UND = self.embed_codes(codes_UnL[:, :, :-1]).flatten(1, 2)
        x = torch.cat([prefix_UPD, codes_UND], 1)
        keep = _packed_mask(prompts.mask_UP, n, own)
        last_U1 = prompts.position_UP[:, -1:]
        positions = torch.cat([prompts.position_UP, last_U1 + 1 + torch.arange(own).repeat(n)], 1)
        bias = torch.zeros(keep.shape, dtype=x.dtype).masked_fill(~keep, torch.finfo(x.dtype).min)
        hidden = self.model.model.language_model(
            inputs_embeds=x, attention_mask=bias[:, None], position_ids=positions, use_cache=False
        ).last_hidden_state
        first_UnD = hidden[:, p - 1, None].expand(-1, n, -1)
        rest_UnLD = hidden[:, p:].unflatten(1, (n, own))
        out = torch.cat([first_UnD[:, :, None], rest_UnLD], 2)
        return self.model.model.generation_head(out)

    def log_prob(self, prompts: Prompts, codes_UnL: Tensor) -> Tensor:
        """Log-probability of every code, float32 ``[U, n, L]``."""
        logits = self.logits(prompts, codes_UnL).float()
        return -F.cross_entropy(logits.flatten(0, -2), codes_UnL.flatten(), reduction="none").view(codes_UnL.shape)

    def loss(
        self, favourites_UK: np.ndarray | Tensor, codes_UnL: Tensor, *, keep_U: Tensor, random: torch.Generator
    ) -> tuple[Tensor, int]:
        """Nats a code, mean over all, and how many tokens were read. Where ``keep_U`` is False the prompt has no
        condition. Nothing is random here: ``random`` is what a diffusion generator draws its noise from."""
        prompts = self.prompts.build(favourites_UK)
        prompts = prompts.where(keep_U, prompts.unconditional(self.prompts.pad_id))
        u, n, length = codes_UnL.shape
        return -self.log_prob(prompts, codes_UnL).mean(), prompts.ids_UP.numel() + u * n * (length - 1)

    @torch.no_grad()
    def nats(self, favourites_UK: np.ndarray | Tensor, codes_UnL: Tensor, *, unconditional: bool = False) -> Tensor:
        """Nats a picture ``[U, n]`` of codes ``[U, n, L]`` after each history (or with no condition)."""
        prompts = self.prompts.build(favourites_UK)
        if unconditional:
            prompts = prompts.unconditional(self.prompts.pad_id)
        return -self.log_prob(prompts, codes_UnL).sum(-1)

    def nll(self, favourites_UK: np.ndarray | Tensor, codes_UL: Tensor, *, unconditional: bool = False) -> Tensor:
        """Nats a picture ``[U]``; see :meth:`nats`."""
        return self.nats(favourites_UK, codes_UL[:, None], unconditional=unconditional)[:, 0]

    @torch.no_grad()
    def sample(
        self,
        favourites_UK: np.ndarray | Tensor,
        n: int,
        *,
        seeds: list[int],
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        spread: bool = True,
        compile: bool = False,
    ) -> Tensor:
        """Draw ``n`` pictures a user: codes int64 ``[U, n, L]``.

        Args:
            favourites_UK: item indices of each history, -1 for none.
            seeds: one a user; a user's random numbers depend on that seed alone, whatever else is in the batch.
            guidance: 1 is plain conditional sampling, 0 unconditional, above 1 leans on the history (1.5).
            temperature: 0 takes the likeliest code each time.
            top_k, top_p: keep the likeliest codes only (0 and 1: keep all).
            spread: a user's samples are spread evenly over the distribution, so that they repeat each other less; each
                alone is distributed as independent ones are.
            compile: let ``torch.compile`` make the step; the codes stay the same.
        """
        settings = SamplerSettings(
            guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, spread=spread, compile=compile
        )
        with gathered(self):
            return sample_codes(self, self.prompts.build(favourites_UK), n, seeds=seeds, settings=settings)

    def save(self, folder: Path) -> None:
        """Config, weights (safetensors, codec not included), tokenizer, prompt facts and catalogue features.

        Of several processes all call it, and the first writes."""
        # The text head shares the text embedding: saved once, tied again on loading.
        state = {k: whole(v).contiguous() for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        if rank() > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        save_file({"features_ITF": self.features_ITF}, folder / "features.safetensors")
        self.prompts.save(folder)
        write_json(folder / "generator.json", {"kind": "janus", "codes_per_picture": self.codes_per_picture})

    @classmethod
    def load(cls, folder: Path) -> JanusGenerator:
        """The generator saved in ``folder``, in evaluation mode.

        Raises:
            LineageError: the folder holds none.
        """
        if not (folder / "generator.json").exists():
            raise LineageError(f"{folder} holds no generator.json. Run `couturier retrain` to train a generator.")
        model = JanusForConditionalGeneration(JanusConfig.from_pretrained(folder))
        _drop_codec(model)
        state = load_file(folder / "model.safetensors")
        model.load_state_dict(state | {"lm_head.weight": state["model.language_model.embed_tokens.weight"]})
        prompts = PromptBuilder.load(folder, PreTrainedTokenizerFast.from_pretrained(folder))
        features = load_file(folder / "features.safetensors")["features_ITF"]
        codes = read_json(folder / "generator.json")["codes_per_picture"]
        return cls(model, prompts, features, codes=codes).freeze_eyes().eval()


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


def _packed_mask(prompt_mask_UP: Tensor, n: int, own: int) -> Tensor:
    """Who may look at whom, bool ``[U, S, S]`` with S = P + n * own: the prompt causally, each picture at the prompt
    and causally at itself. Padding sees itself only, so that no row of the softmax is empty."""
    u, p = prompt_mask_UP.shape
    size = p + n * own
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    block = torch.cat([torch.full((p,), -1), torch.arange(n).repeat_interleave(own)])
    same_or_prompt = (block[:, None] == block[None]) | (block[None] == -1)
    real = torch.cat([prompt_mask_UP, prompt_mask_UP.new_ones(u, n * own)], 1)
    return ((causal & same_or_prompt)[None] & real[:, None]) | torch.eye(size, dtype=torch.bool)[None]


@torch.no_grad()
def _understand(model: JanusForConditionalGeneration, catalogue: Catalogue, batch: int = 256) -> Tensor:
    """Understanding features of every catalogue picture before the aligner, ``[I, tokens, F]``."""
    tower = model.model.vision_model.eval()
    parts = [
        tower(to_tower(catalogue.rgb_IHWC[i : i + batch], tower.config.image_size)).last_hidden_state
        for i in range(0, len(catalogue), batch)
    ]
    return torch.cat(parts)


def to_tower(rgb_NHWC: np.ndarray, size: int) -> Tensor:
    """uint8 pictures → what the understanding tower reads: float ``[N, 3, size, size]`` in [-1, 1]."""
    x = torch.from_numpy(np.array(rgb_NHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
    return x
