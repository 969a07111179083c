"""The traps of generation.md 1.5 and 1.9: history matters, latest items, mask, causality, guidance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import JanusConfig, JanusForConditionalGeneration

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, LineageError
from couturier.components.generator.janus import GeneratorConfig, JanusGenerator
from couturier.components.runtime import threads

from .conftest import CODEBOOK, CODES


def test_changing_one_history_picture_changes_the_first_code(generator: JanusGenerator, histories: np.ndarray) -> None:
    codes = torch.zeros(1, 1, 4, dtype=torch.long)
    before = generator.logits(generator.prompts.build(histories[:1]), codes)[:, :, 0]
    # The words stay: two items of the same phrase differ in their picture alone.
    other = histories[:1].copy()
    other[0, 2] = 13  # as item 3: category kind 3, brand own
    lines = generator.prompts.lines
    assert lines[3] == lines[13]
    after = generator.logits(generator.prompts.build(other), codes)[:, :, 0]
    assert (before - after).abs().max() > 1e-4


def test_every_history_picture_takes_its_place_in_the_prompt(generator: JanusGenerator, histories: np.ndarray) -> None:
    prompts = generator.prompts.build(histories)
    assert (prompts.ids_UP == generator.prompts.picture_id).sum(1).tolist() == [5, 2, 0]
    assert prompts.item_UP[0][prompts.item_UP[0] >= 0].tolist() == [1, 2, 3, 4, 5]
    x = generator.embed_prompt(prompts)
    table = generator.model.get_input_embeddings()(prompts.ids_UP)
    assert torch.equal((x != table).any(-1), prompts.item_UP >= 0)


def test_only_the_first_items_of_a_longer_history_are_shown(generator: JanusGenerator) -> None:
    long = np.arange(12)[None]
    short = generator.prompts.build(long[:, :5])
    assert torch.equal(generator.prompts.build(long).ids_UP, short.ids_UP)


def test_the_packed_pass_equals_one_picture_at_a_time(
    generator: JanusGenerator, histories: np.ndarray, codes: torch.Tensor
) -> None:
    prompts = generator.prompts.build(histories)
    together = generator.log_prob(prompts, codes)
    alone = torch.cat([generator.log_prob(prompts, codes[:, i : i + 1]) for i in range(codes.shape[1])], 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_padding_a_batch_changes_no_row(generator: JanusGenerator, histories: np.ndarray, codes: torch.Tensor) -> None:
    together = generator.log_prob(generator.prompts.build(histories), codes)
    for u in range(3):
        alone = generator.log_prob(generator.prompts.build(histories[u : u + 1]), codes[u : u + 1])
        torch.testing.assert_close(together[u : u + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_code_never_sees_itself_or_later_ones(
    generator: JanusGenerator, histories: np.ndarray, codes: torch.Tensor
) -> None:
    prompts = generator.prompts.build(histories)
    before = generator.logits(prompts, codes)
    changed = codes.clone()
    changed[:, :, 2:] = (changed[:, :, 2:] + 1) % 24
    after = generator.logits(prompts, changed)
    torch.testing.assert_close(before[:, :, :3], after[:, :, :3])
    assert (before[:, :, 3] - after[:, :, 3]).abs().max() > 1e-6


def test_the_loss_asks_nothing_of_the_text_head_and_the_tower(
    generator: JanusGenerator, histories: np.ndarray, codes: torch.Tensor
) -> None:
    (-generator.log_prob(generator.prompts.build(histories), codes).mean()).backward()
    assert all(p.grad is None for p in generator.model.model.vision_model.parameters())
    trained = {id(p) for p in generator.parameters_to_train()}
    assert id(generator.model.lm_head.weight) not in trained
    head = generator.model.model.generation_head.vision_head.weight
    assert head.grad is not None and id(head) in trained


def test_the_unconditional_prompt_keeps_length_and_forgets_the_history(
    generator: JanusGenerator, histories: np.ndarray, codes: torch.Tensor
) -> None:
    full = histories[:1]
    other = np.array([[20, 21, 22, 23, 24]])
    a = generator.prompts.build(full).unconditional(generator.prompts.pad_id)
    b = generator.prompts.build(other).unconditional(generator.prompts.pad_id)
    assert a.ids_UP.shape == generator.prompts.build(full).ids_UP.shape
    assert torch.equal(generator.log_prob(a, codes[:1]), generator.log_prob(b, codes[:1]))


def test_saving_and_loading_gives_the_same_bits(
    generator: JanusGenerator, histories: np.ndarray, codes: torch.Tensor, tmp_path: Path
) -> None:
    generator.save(tmp_path)
    again = JanusGenerator.load(tmp_path)
    prompts = generator.prompts.build(histories)
    assert torch.equal(again.log_prob(again.prompts.build(histories), codes), generator.log_prob(prompts, codes))
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pt"))


def test_a_model_in_the_published_layout_takes_the_same_path(
    generator: JanusGenerator, catalogue: Catalogue, histories: np.ndarray, tmp_path: Path
) -> None:
    """Written to a folder as a published Janus is (codec included), then loaded by name of that folder."""
    facts = generator.model.config.to_dict()
    # As published: the codec's grid is the tower's, and every patch is a token of the prompt.
    facts["vision_config"] |= {"patch_size": 8, "num_image_tokens": 4}
    JanusForConditionalGeneration(JanusConfig(**facts)).save_pretrained(tmp_path)
    generator.prompts.tokenizer.save_pretrained(tmp_path)
    loaded = JanusGenerator.published(GeneratorConfig(base=str(tmp_path), history=5, max_words=2), catalogue)
    codes = loaded.sample(histories, 2, seeds=[1, 2, 3])
    assert codes.shape == (3, 2, 4)
    from couturier.components.generator.janus_codec import JanusCodec

    codec = JanusCodec.published(str(tmp_path))
    assert (codec.codebook_size, codec.codes_per_picture) == (24, 4)
    rgb = codec.decode(codes[0])
    assert rgb.shape == (2, 3, codec.picture_size, codec.picture_size)
    codec.save(tmp_path / "codec")
    from couturier.components.generator.codec import load_codec

    assert torch.equal(load_codec(tmp_path / "codec").decode(codes[0]), rgb)
    assert load_codec(tmp_path / "codec").encode(rgb).shape == (2, 4)


def test_errors_name_what_is_wrong(generator: JanusGenerator, catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="outside the catalogue of 40"):
        generator.prompts.build(np.array([[40]]))
    with pytest.raises(LineageError, match="no generator.json"):
        JanusGenerator.load(tmp_path)
    with pytest.raises(ConfigError, match="neither a folder"):
        JanusGenerator.published(GeneratorConfig(base=str(tmp_path / "absent")), catalogue)


def test_gradients_are_the_same_bits_on_two_threads_every_time(generator: JanusGenerator) -> None:
    """Many histories show the same few items, so that many gradients add up in one row of the aligner's output."""
    histories = np.random.default_rng(0).integers(0, 3, (512, 5))
    codes = torch.randint(CODEBOOK, (512, 1, CODES), generator=torch.Generator().manual_seed(0))
    prompts = generator.prompts.build(histories)
    found = []
    with threads(2):
        for _ in range(12):
            generator.zero_grad()
            generator.log_prob(prompts, codes).mean().backward()
            found.append(torch.cat([p.grad.flatten() for p in generator.parameters() if p.grad is not None]))
    assert all(torch.equal(found[0], other) for other in found[1:])
