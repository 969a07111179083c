"""What a judge knows of an item: its words as the mean of their embeddings, with the gradient of an embedding bag."""

from __future__ import annotations

import torch

from couturier.components.interest.items import Content, FeatureConfig, ItemFeatures


def test_words_are_the_mean_of_their_embeddings_and_none_are_zeros() -> None:
    content = Content(
        pictures_IP=torch.randn(4, 2),
        word_ids=torch.tensor([0, 2, 5, 2]),
        word_offsets=torch.tensor([0, 3, 3, 4, 4]),
        vocabulary=6,
        counts_I=torch.ones(4),
    )
    items = ItemFeatures(FeatureConfig(words=3), content)
    table = items.word_bag.weight
    found, wanted = items.embed_items()[:, 2:5], items.word_bag(content.word_ids, content.word_offsets[:-1])
    torch.testing.assert_close(found, wanted)
    weight = torch.randn(4, 3)
    grads = [torch.autograd.grad((one * weight).sum(), table)[0] for one in (found, wanted)]
    torch.testing.assert_close(*grads)
    assert not found[1].any() and not found[3].any()
