"""Titles for pictures that a bundle drew: the judge decides, for one person, which words to put under a picture.

The judge was fitted on items with their words, so it scores a picture under a title as it scores an item. What it
prefers it has learned from what people took, not from titles they were shown: a title it accepts is one that reads
like what the person takes. :mod:`couturier.components.generator.words` has the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from couturier.components.generator.words import Title, TitleConfig, Titler
from couturier.serving.bundle import Bundle, History, Picture


class Titles:
    """Gives titles; what the writer proposes is kept by item for as long as this lives."""

    def __init__(self, bundle: Bundle, config: TitleConfig) -> None:
        self.bundle, self.titler = bundle, Titler(bundle.catalogue, config)

    def own(self, pictures: Sequence[Picture]) -> list[Title]:
        """The nearest item's own title a picture."""
        return [self.titler.own(picture.nearest) for picture in pictures]

    def of(self, history: History, pictures: Sequence[Picture]) -> list[Title]:
        """A title a picture: a phrase where the judge prefers it for this person, else the nearest item's own title."""
        return [
            self.titler.title(
                picture.nearest,
                history.items,
                lambda titles, picture=picture: self.bundle.score_titled(history, picture, titles),  # type: ignore[misc]
            )
            for picture in pictures
        ]
