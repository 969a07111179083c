"""Modalities in one space: what is missing counts for nothing, and alignment brings an item's views together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from couturier.components.errors import ConfigError
from couturier.components.interest.items import Content, FeatureConfig, ItemFeatures
from couturier.components.interest.modalities import Modalities, retrieval
from couturier.components.runtime import global_seed

ITEMS, VIEW, TOPICS = 120, 12, 8


def content() -> Content:
    """Items whose two views are noisy linear looks at one latent; two words each."""
    random = np.random.default_rng(0)
    latent = np.concatenate([np.eye(TOPICS)[np.arange(ITEMS) % TOPICS], random.normal(size=(ITEMS, 6))], axis=1)
    views = [latent @ random.normal(size=(14, VIEW)) + 0.1 * random.normal(size=(ITEMS, VIEW)) for _ in range(2)]
    return Content(
        pictures_IP=torch.from_numpy(np.concatenate(views, axis=1)).float(),
        word_ids=torch.from_numpy(random.integers(20, size=2 * ITEMS)),
        word_offsets=2 * torch.arange(ITEMS + 1),
        vocabulary=20,
        counts_I=torch.ones(ITEMS),
    )


def made() -> tuple[ItemFeatures, Modalities]:
    with global_seed(0, "modalities"):
        items = ItemFeatures(FeatureConfig(words=6), content())
        return items, Modalities((("picture", VIEW), ("audio", VIEW)), items, 16, 0.07)


def test_alignment_takes_retrieval_across_modalities_from_chance_to_nearly_all() -> None:
    items, modalities = made()
    features = items.embed_items(words=False)
    before = retrieval(modalities(features).views_XME, 0, 1)
    optimiser = torch.optim.Adam(modalities.parameters(), lr=1e-2)
    for _ in range(120):
        fused = modalities(features)
        loss = modalities.alignment(fused.views_XME, fused.present_XM)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    views = modalities(features).views_XME
    assert before < 0.1 and retrieval(views, 0, 1) > 0.9 and retrieval(views, 1, 0) > 0.9


def test_weights_are_shares_of_what_is_present() -> None:
    items, modalities = made()
    features = items.embed_items().detach().clone()
    features[1, :VIEW] = 0  # no picture
    features[2, VIEW : 2 * VIEW] = 0  # no sound
    features[3] = items.embed_items(words=False)[3]
    features[4] = 0
    fused = modalities(features[:5])
    assert fused.present_XM.tolist() == [
        [True, True, True],
        [False, True, True],
        [True, False, True],
        [True, True, False],
        [False, False, False],
    ]
    torch.testing.assert_close(fused.weight_XM.sum(-1), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))
    assert bool((fused.weight_XM[~fused.present_XM] == 0).all())
    assert bool((fused.views_XME[~fused.present_XM] == 0).all())
    torch.testing.assert_close(fused.item_XE.norm(dim=-1), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))
    assert bool(torch.isfinite(fused.item_XE).all())


def test_leaving_a_modality_out_is_like_its_being_missing() -> None:
    items, modalities = made()
    features = items.embed_items().detach()
    silent = features.clone()
    silent[:, VIEW : 2 * VIEW] = 0
    torch.testing.assert_close(
        modalities(features, without=modalities.place("audio")).item_XE, modalities(silent).item_XE
    )


def test_an_alignment_of_nothing_is_no_number_to_fear() -> None:
    _, modalities = made()
    none = torch.zeros(4, 3, dtype=torch.bool)
    assert float(modalities.alignment(torch.zeros(4, 3, 16), none)) == 0
    one = torch.tensor([[True, False, False]] * 4)
    assert float(modalities.alignment(torch.randn(4, 3, 16), one)) == 0


def test_missing_rows_take_no_part_in_alignment() -> None:
    items, modalities = made()
    fused = modalities(items.embed_items())
    present = fused.present_XM.clone()
    present[10:, 1:] = False
    torch.testing.assert_close(
        modalities.alignment(fused.views_XME, present), modalities.alignment(fused.views_XME[:10], present[:10])
    )


@pytest.mark.parametrize(
    "parts",
    [(("picture", 3),), (("picture", VIEW), ("picture", VIEW)), (("words", VIEW), ("audio", VIEW))],
    ids=["too narrow", "one name twice", "a name that is taken"],
)
def test_pieces_that_do_not_fit_are_refused(parts: tuple[tuple[str, int], ...]) -> None:
    items, _ = made()
    with pytest.raises(ConfigError, match=f"width of the content vectors, {2 * VIEW}"):
        Modalities(parts, items, 16, 0.07)


def test_an_unknown_modality_is_named() -> None:
    with pytest.raises(ConfigError, match="no modality 'smell'; this judge has picture, audio, words"):
        made()[1].place("smell")
