"""The judge's eyes and its words."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
import torch

from couturier.components.data.formats import Catalogue
from couturier.components.errors import ConfigError, TrainingError
from couturier.components.interest.encoder import (
    AttributeHeads,
    EncoderConfig,
    TileEncoder,
    attribute_targets,
    degraded,
    encoder_step,
    pictures_of,
    vocabulary_of,
    word_bags,
)
from couturier.components.runtime import seeded

from .planted import CATEGORIES, ITEMS, QUICK, World


@pytest.fixture
def catalogue(world: World) -> Catalogue:
    return Catalogue.load(world.folder)


def test_degraded_pictures_stay_pictures_and_repeat(catalogue: Catalogue) -> None:
    clean = pictures_of(catalogue)
    one, two = (degraded(clean, seeded(3, "test")) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, degraded(clean, seeded(4, "test")))
    assert float(one.min()) >= 0 and float(one.max()) <= 1 and one.shape == clean.shape
    assert 0.005 < float((one - clean).abs().mean()) < 0.2


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (33, 20)])
def test_any_size_is_resampled_at_the_door(size: tuple[int, int]) -> None:
    assert TileEncoder(QUICK.encoder)(torch.rand(2, 3, *size)).shape == (2, QUICK.encoder.width)


def test_a_picture_is_embedded_alike_alone_and_among_others(catalogue: Catalogue) -> None:
    encoder, rgb = TileEncoder(QUICK.encoder), pictures_of(catalogue)
    torch.testing.assert_close(encoder(rgb[3:4])[0], encoder(rgb)[3], rtol=1e-4, atol=1e-5)


def test_heads_are_attributes_with_enough_values_and_identity(catalogue: Catalogue) -> None:
    same = replace(
        catalogue, items=catalogue.items.with_columns(pl.lit("x").alias("same")), attributes=("category", "same")
    )
    targets = attribute_targets(same, QUICK.encoder)
    assert set(targets) == {"item", "attribute category"}
    assert int(targets["attribute category"].max()) == CATEGORIES - 1
    assert targets["item"].tolist() == list(range(ITEMS))
    few = attribute_targets(replace(catalogue, attributes=()), EncoderConfig(side=16, max_classes=5))
    assert set(few) == {"item"} and int(few["item"].max()) == 4


def test_a_missing_attribute_is_a_value_of_its_own(catalogue: Catalogue) -> None:
    holes = catalogue.items.with_columns(
        pl.when(pl.int_range(pl.len()) < 6).then(None).otherwise(pl.col("category")).alias("category")
    )
    target = attribute_targets(replace(catalogue, items=holes), QUICK.encoder)["attribute category"]
    assert len(set(target[:6].tolist())) == 1 and int(target[0]) not in target[6:].tolist()


def test_a_loss_that_is_no_number_names_the_rows(catalogue: Catalogue) -> None:
    targets = attribute_targets(catalogue, QUICK.encoder)
    encoder, heads = TileEncoder(QUICK.encoder), AttributeHeads(QUICK.encoder.width, targets)
    with pytest.raises(TrainingError, match=r"catalogue rows \["):
        encoder_step(encoder, heads, pictures_of(catalogue) * float("nan"), targets, seeded(0, "test"))


@pytest.mark.parametrize("side", [0, 12, -8])
def test_the_side_is_a_multiple_of_eight(side: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        EncoderConfig(side=side)


def test_words_are_counted_and_bagged() -> None:
    texts = ["Red apple", "red RED pear!", "", "unheard"]
    vocabulary = vocabulary_of(texts, limit=3)
    assert vocabulary == ["red", "apple", "pear"]
    words, offsets = word_bags(texts, vocabulary)
    assert [vocabulary[word] for word in words] == ["red", "apple", "red", "pear"]
    assert offsets.tolist() == [0, 2, 4, 4, 4] and words.dtype == offsets.dtype == torch.int64
