"""Rows of codes that a denoiser begins with: whose posterior it is, what a liking does, what is new."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from couturier.components.generator.gallery import Gallery, rows_of

ITEMS, CODES, CODEBOOK, WIDTH = 6, 4, 9, 3


def made() -> tuple[Gallery, Tensor]:
    random = torch.Generator().manual_seed(0)
    codes_ML = torch.randint(0, CODEBOOK, (ITEMS, CODES), generator=random)
    codebook_KD = torch.randn(CODEBOOK, WIDTH, generator=random)
    torch.manual_seed(0)
    gallery = Gallery(codes_ML, torch.arange(ITEMS), torch.randn(ITEMS, 5), codebook_KD, width=4, history=3)
    gallery.set_shares(torch.arange(1.0, ITEMS + 1))
    return gallery, codebook_KD


def alone(x_NLD: Tensor, level: float, codebook_KD: Tensor) -> Tensor:
    """Log densities of codes at each place under the path's Gaussian, all codes alike, less what all share."""
    each = -(x_NLD[:, :, None] - (1 - level) * codebook_KD).square().sum(-1) / (2 * level**2)
    shared = -x_NLD.square().sum(-1, keepdim=True) / (2 * level**2)
    return each - shared - torch.log(torch.tensor(float(CODEBOOK)))


def test_explanations_are_weighed_by_bayes_rule() -> None:
    gallery, codebook_KD = made()
    level, x_NLD = 0.6, torch.randn(5, CODES, WIDTH, generator=torch.Generator().manual_seed(1))
    apart_NLK = alone(x_NLD, level, codebook_KD)
    with torch.no_grad():
        found = gallery.fit(x_NLD, torch.full((5, CODES, 1), level), apart_NLK).softmax(-1)
    # By hand: the density of all places of a row together, and the sum over all pictures whatever for something new.
    density_NM = torch.stack(
        [
            torch.distributions.Normal((1 - level) * codebook_KD[row], level).log_prob(x_NLD).sum((1, 2))
            for row in gallery.codes_ML
        ],
        1,
    )
    each = torch.distributions.Normal((1 - level) * codebook_KD, level).log_prob(x_NLD[:, :, None]).sum(-1)
    new_N = each.sub(torch.log(torch.tensor(float(CODEBOOK)))).logsumexp(-1).sum(1)
    share_M = torch.arange(1.0, ITEMS + 1) / 21
    new = torch.tensor(0.002 / 0.998)
    by_hand = torch.cat([density_NM + share_M.log(), (new_N + new.log())[:, None]], 1).softmax(-1)
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-3)


def test_codes_follow_the_explanations() -> None:
    gallery, _ = made()
    apart_NLK = torch.randn(2, CODES, CODEBOOK)
    sure = torch.zeros(2, ITEMS + 1)
    sure[0, 3], sure[1, -1] = 1.0, 1.0
    with torch.no_grad():
        found = gallery.codes(sure, apart_NLK)
    assert torch.equal(found[0].argmax(-1), gallery.codes_ML[3])
    torch.testing.assert_close(found[1], apart_NLK[1].softmax(-1))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, CODES))


def test_a_picture_is_found_again_and_a_strange_one_is_new() -> None:
    gallery, _ = made()
    strange = (gallery.codes_ML[:1] + 1) % CODEBOOK
    assert gallery.find(torch.cat([gallery.codes_ML, strange])).tolist() == [*range(ITEMS), ITEMS]


def test_a_liking_raises_its_row_and_leaves_what_is_new() -> None:
    gallery, _ = made()
    with torch.no_grad():
        key = gallery.key(gallery.features_MF)[2:3]
        likes = gallery.liking(key)
    assert float(likes[0, -1]) == 0
    assert float(likes[0, 2]) == pytest.approx(float(key.square().sum()), rel=1e-4)
    assert not gallery.liking(torch.zeros(1, 4)).any()


def test_favourites_raise_their_own_rows() -> None:
    gallery, _ = made()
    items = torch.tensor([[2, 4, 2], [1, -1, -1], [-1, -1, -1]])
    with torch.no_grad():
        gallery.again_S.copy_(torch.tensor([1.0, 2.0, 4.0]))
        found = gallery.again(items, items >= 0)
    assert found.tolist() == [[0, 0, 5, 0, 2, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0] * 7]


def test_rows_are_the_weightiest_with_the_item_that_sells_most() -> None:
    codes = torch.tensor([[0, 1], [2, 3], [0, 1], [4, 5]])
    item, weight = rows_of(codes, torch.tensor([1.0, 3.0, 4.0, 2.0]), 2)
    assert item.tolist() == [2, 1] and weight.tolist() == [5.0, 3.0]
