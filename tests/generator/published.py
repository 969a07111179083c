"""Tiny untrained models, written to a folder as a hub holds them: config, tokenizer, weights, codec included."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from couturier.components.data.formats import Catalogue
from couturier.components.generator.emu3 import END, END_OF_FRAME, END_OF_ROW, FOLLOWS, PLACEHOLDER, START
from couturier.components.generator.janus import JanusGenerator
from couturier.components.generator.prompt import SPECIAL, describe

CODEBOOK = 24


def publish_janus(tiny: JanusGenerator, folder: Path) -> str:
    """A Janus of the shape of ``tiny`` with weights of its own; four tokens a picture."""
    facts = tiny.model.config.to_dict()
    facts["vision_config"] |= {"patch_size": 8, "num_image_tokens": 4}
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(JanusConfig(**facts))
    spread_out(model)
    model.save_pretrained(folder)
    tiny.prompts.tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def spread_out(module: nn.Module) -> None:
    """Weights of the published scale are too small for a tiny fresh model to tell anything apart."""
    for value in module.parameters():
        if value.ndim == 2:
            value.normal_(std=value.shape[1] ** -0.5)


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


def publish_emu3(catalogue: Catalogue, folder: Path) -> str:
    """An Emu3 whose codes stand for four pixels an edge."""
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
    spread_out(model.model.text_model)
    spread_out(model.lm_head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
