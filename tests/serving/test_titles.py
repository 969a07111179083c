"""Titles that a judge chooses for a person, of pictures that a bundle drew."""

import pytest
import torch

from couturier.components.generator.words import OWN, TitleConfig, normalised
from couturier.serving.bundle import Bundle
from couturier.serving.sampling import Sampling
from couturier.serving.titles import Titles


@pytest.fixture(scope="module")
def bundle(made):
    return Bundle.load(made.package.scratch / "context" / "model")


def test_the_judge_reads_a_drawn_picture_under_a_title_as_it_reads_an_item(bundle):
    """An item's tile under the item's own words is the item: the same score."""
    history = bundle.history_of("user-03")
    item, rgb = 4, bundle.catalogue.rgb_IHWC[4]
    row = bundle.catalogue.items.row(item, named=True)
    drawn = bundle.generate([history], Sampling(n=1))[0][0]
    shown = type(drawn)(id="tile", rgb_HWC=rgb, nearest=item)
    scores = bundle.score_titled(history, shown, [f"{row['title']} {row['text']}", "", "a tile"])
    assert float(scores[0]) == pytest.approx(float(bundle.score(history, [item])[0]), abs=1e-4)
    assert len({round(float(score), 6) for score in scores}) > 1


def test_a_title_is_extracted_and_never_worth_less_than_the_items_own(bundle):
    titles = Titles(bundle, TitleConfig(writer="phrases", telling_share=0.5))
    by = set()
    for user in bundle.users[:8]:
        history = bundle.history_of(user)
        drawn = bundle.generate([history], Sampling(n=3))[0]
        for picture, title in zip(drawn, titles.of(history, drawn), strict=True):
            sources = [titles.titler.source(item) for item in (picture.nearest, *history.items)]
            assert any(normalised(title.text) in normalised(source) for source in sources)
            assert title.reward is not None and title.own_reward is not None
            assert title.reward >= title.own_reward and (title.reward > title.own_reward) == (title.by != OWN)
            by.add(title.by)
    assert "phrases" in by


def test_words_nobody_taught_the_judge_weigh_nothing(bundle):
    history = bundle.history_of("user-03")
    picture = bundle.generate([history], Sampling(n=1))[0][0]
    scores = bundle.score_titled(history, picture, ["zzz", "qqq www", ""])
    # To rounding: which rows a product takes together may differ from row to row.
    torch.testing.assert_close(scores, scores[:1].expand(3), rtol=1e-6, atol=1e-6)
