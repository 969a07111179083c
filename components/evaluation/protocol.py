"""Who is evaluated, with what, and what each row of the table shows them (generation.md 23).

Every row gets the same windows and, where it draws, the same seeds: a row differs from another by its model, its
history or its rule alone. Rows of real items show the tiles themselves; only the oracle's pass through the codec.

Legend: V windows, n pictures a window, I items, L codes a picture, K favourites, U users.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from couturier.components.alignment.rewards import membership
from couturier.components.alignment.sft import other_users
from couturier.components.data.formats import Catalogue, Windows
from couturier.components.errors import DataError
from couturier.components.evaluation.encoder import ItemFinder, load_encoder
from couturier.components.evaluation.metrics import Truth
from couturier.components.files import written_beside
from couturier.components.generator.codec import Codec, load_codec
from couturier.components.generator.types import Generator
from couturier.components.interest.judge import history_batch, load_judge
from couturier.components.interest.types import Judge
from couturier.components.runtime import derived_seed, seeded_numpy

_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The windows that are evaluated: indices into the test windows, whose they are, and a sampling seed for each."""

    windows: Windows
    rows_V: np.ndarray
    wrong_V: np.ndarray
    seeds: list[int]

    @classmethod
    def of(cls, windows: Windows, *, seed: int, windows_per_user: int, max_users: int = 0) -> Plan:
        """The first ``windows_per_user`` windows of each user (of the first ``max_users``; 0: of all).

        Raises:
            DataError: there is nothing to evaluate.
        """
        first_U = np.searchsorted(windows.user_W, np.arange(len(windows.users)), side="left")
        place_W = np.arange(len(windows)) - first_U[windows.user_W]
        keep = place_W < windows_per_user
        if max_users:
            keep &= windows.user_W < max_users
        rows = np.flatnonzero(keep)
        if not len(rows):
            raise DataError(
                "there is no test window to evaluate: test users need a basket after the cut-off. Add events."
            )
        seeds = [derived_seed(seed, "evaluate", windows.users[windows.user_W[row]], str(place_W[row])) for row in rows]
        return cls(windows=windows, rows_V=rows, wrong_V=other_users(windows)[rows], seeds=seeds)

    def __len__(self) -> int:
        return len(self.rows_V)

    @property
    def user_V(self) -> np.ndarray:
        """Index into ``windows.users``."""
        return self.windows.user_W[self.rows_V]

    @property
    def favourites_VK(self) -> np.ndarray:
        return self.windows.favourites_WK[self.rows_V]

    def truth(self, items: int) -> Truth:
        """What the windows really were, over a catalogue of ``items``."""
        baskets = [self.windows.basket_of(row) for row in self.rows_V]
        return Truth(
            basket_VI=membership(baskets, items),
            history_VI=membership(list(self.favourites_VK), items),
            target_V=torch.tensor([int(basket[0]) for basket in baskets]),
            user_V=torch.from_numpy(self.user_V.astype(np.int64)),
        )


class Liking:
    """The judge's standardised logits of pictures, each picture embedded once.

    Args:
        judge: a fitted judge.
        finder: whose rows the pictures are.
    """

    def __init__(self, judge: Judge, finder: ItemFinder, plan: Plan) -> None:
        self.judge, self.finder, self.plan = judge, finder, plan
        self.item_features_ID = judge.embed_items()
        self._features_RD = torch.zeros(0, judge.width)

    @torch.no_grad()
    def of(self, rows_Vn: Tensor, windows_V: Tensor | None = None) -> Tensor:
        """``[V, n]`` for the finder's rows, against the true history of each window (of ``windows_V`` of the plan)."""
        at = self.plan.rows_V if windows_V is None else self.plan.rows_V[windows_V.numpy()]
        return self._score(self._known(rows_Vn), at)

    @torch.no_grad()
    def of_codes(self, codes_VnL: Tensor, codec: Codec, windows_V: Tensor) -> Tensor:
        """As :meth:`of`, for pictures that only the judge need see."""
        unique_ML, where = codes_VnL.flatten(0, 1).unique(dim=0, return_inverse=True)
        features = torch.cat([self.judge.embed_pictures(codec.decode(part)) for part in unique_ML.split(_CHUNK)])
        return self._score(features[where].view(*codes_VnL.shape[:2], -1), self.plan.rows_V[windows_V.numpy()])

    def _score(self, features_VnD: Tensor, at: np.ndarray) -> Tensor:
        state = self.judge.encode(history_batch(self.plan.windows, at, self.item_features_ID))
        return self.judge.standardise(self.judge.score(state, features_VnD))

    def _known(self, rows_Vn: Tensor) -> Tensor:
        fresh = self.finder.rgb_R3HW[len(self._features_RD) :]
        parts = [self.judge.embed_pictures(part.float() / 255) for part in fresh.split(_CHUNK)]
        self._features_RD = torch.cat([self._features_RD, *parts])
        return self._features_RD[rows_Vn]


class World:
    """Everything that rows are made with: catalogue, codec, encoder, judge, and the plan.

    Args:
        sequences, tokenise, judge: finished stage folders.
        pictures: n.
        batch: windows sampled at once.
        beams: how many beginnings a beam search keeps for the likeliest pictures; 0 for random draws.
        new: with beams, what the windows' true histories hold is passed over.
        drawn: a folder in which finished draws are kept, and found again after a kill; None keeps nothing.
        advance: called with the number of windows done.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        plan: Plan,
        *,
        tokenise: Path,
        judge: Path,
        pictures: int,
        batch: int,
        beams: int = 0,
        new: bool = False,
        drawn: Path | None,
        advance: Callable[[int], None],
    ) -> None:
        self.catalogue, self.plan, self.n, self.batch = catalogue, plan, pictures, batch
        self.beams, self.new = beams, new
        self.drawn, self.advance = drawn, advance
        self.codec = load_codec(tokenise / "codec")
        self.codes_IL = load_file(tokenise / "codes.safetensors")["codes_IL"]
        self.finder = ItemFinder(load_encoder(), catalogue, size=self.codec.picture_size)
        self.liking = Liking(load_judge(judge / "judge"), self.finder, plan)
        self.truth = plan.truth(len(catalogue))
        purchases = catalogue.items["purchases"].to_numpy().astype(np.float64)
        self.popular_I = np.argsort(-purchases, kind="stable")
        self.purchases_I = purchases

    def draw(
        self,
        name: str,
        generator: Generator,
        *,
        guidance: float = 1.0,
        temperature: float = 1.0,
        favourites_VK: np.ndarray | None = None,
        n: int | None = None,
        windows_V: Tensor | None = None,
        stream: str = "",
    ) -> Tensor:
        """Codes ``[V, n, L]`` from a generator for every window (or some); kept under ``name`` when finished.

        Args:
            favourites_VK: other histories than the windows' own.
            stream: a name for other random numbers than those all rows share; these are drawn at random always.

        Raises:
            ConfigError: beams for a generator that cannot search.
        """
        path = None if self.drawn is None else self.drawn / f"{name}.safetensors"
        at = torch.arange(len(self.plan)) if windows_V is None else windows_V
        if path is not None and path.exists():
            self.advance(len(at))
            return load_file(path)["codes"]
        histories = self.plan.favourites_VK if favourites_VK is None else favourites_VK
        parts = []
        for some in at.split(self.batch):
            given = histories[some.numpy()]
            if self.beams and not stream:
                parts.append(
                    generator.likeliest(
                        given,
                        n or self.n,
                        beams=self.beams,
                        guidance=guidance,
                        without_UmL=self._had(some) if self.new else None,
                    )
                )
                self.advance(len(some))
                continue
            seeds = [self.plan.seeds[v] for v in some.tolist()]
            parts.append(
                generator.sample(
                    given,
                    n or self.n,
                    seeds=[derived_seed(s, stream) for s in seeds] if stream else seeds,
                    guidance=guidance,
                    temperature=temperature,
                )
            )
            self.advance(len(some))
        codes = torch.cat(parts)
        if path is not None:
            with written_beside(path) as beside:
                save_file({"codes": codes}, beside)
        return codes

    def _had(self, windows_V: Tensor) -> Tensor:
        """Codes of the histories of some windows ``[V, K, L]``, -1 where there is none."""
        favourites_VK = torch.from_numpy(self.plan.favourites_VK[windows_V.numpy()].astype(np.int64))
        return self.codes_IL[favourites_VK.clamp_min(0)].masked_fill((favourites_VK < 0)[..., None], -1)

    def look(self, codes_VnL: Tensor) -> Tensor:
        """The finder's rows ``[V, n]`` of drawn pictures."""
        return self.finder.look(codes_VnL.flatten(0, 1), self.codec).view(codes_VnL.shape[:2])

    def cycled(self, items: list[np.ndarray]) -> Tensor:
        """``n`` items a window ``[V, n]``: a list too short starts again, an empty one gives popular items."""
        filled = [np.resize(row if len(row) else self.popular_I[: self.n], self.n) for row in items]
        return torch.from_numpy(np.stack(filled).astype(np.int64))


def copy_last(world: World) -> Tensor:
    """The distinct items taken last, newest first."""
    recent = world.plan.windows.recent_WK[world.plan.rows_V]
    return world.cycled([row[row >= 0] for row in recent])


def copy_favourites(world: World) -> Tensor:
    """The items taken most, recent ones counting more."""
    return world.cycled([row[row >= 0] for row in world.plan.favourites_VK])


def popularity(world: World) -> Tensor:
    """What most people took, for everybody alike."""
    return world.cycled([world.popular_I] * len(world.plan))


def random_item(world: World) -> Tensor:
    """Real items at random, a seed a window."""
    picks = [seeded_numpy(s, "random item").choice(len(world.catalogue), world.n) for s in world.plan.seeds]
    return torch.from_numpy(np.stack(picks))


def likeness(world: World) -> Tensor:
    """Of every item to the mean of each history's features, ``[V, I]``; 0 where there is no history."""
    history_VI = world.truth.history_VI.float()
    mean_VD = history_VI @ world.finder.tiles_ID / history_VI.sum(1, keepdim=True).clamp_min(1)
    return mean_VD @ world.finder.tiles_ID.T


def nearest_item(world: World) -> Tensor:
    """The real items most similar to the mean of the history's features."""
    top = likeness(world).topk(min(world.n, len(world.catalogue)), dim=1).indices.numpy()
    known = world.truth.history_VI.any(1).tolist()
    return world.cycled([row if some else row[:0] for row, some in zip(top, known, strict=True)])


def oracle(world: World) -> Tensor:
    """The true next items, once through the codec: what a perfect generator would draw."""
    baskets = [world.plan.windows.basket_of(row) for row in world.plan.rows_V]
    return world.look(world.codes_IL[world.cycled(baskets)])


AT_EQUAL_NOVELTY = ("copy_favourites_eq", "popularity_eq", "nearest_item_eq")
"""Rows that :func:`at_equal_novelty` makes: of favourites in their order and popular new items; of popular ones alone;
of those most similar to the history."""


def at_equal_novelty(world: World, shown_Vn: Tensor, rule: str) -> Tensor:
    """Real items with exactly as many out of the history, and exactly as many repeats, as another row in each window.

    A row that shows its surest guess four times has a higher share of hits than one that must show ten different items.
    So the best of these items is shown as often as the other row's most frequent one, and so on, old and new apart.

    Args:
        shown_Vn: catalogue items that the other row shows.
        rule: one of :data:`AT_EQUAL_NOVELTY`.
    """
    near_VI = likeness(world).numpy() if rule == "nearest_item_eq" else None
    chosen = []
    for v, shown in enumerate(shown_Vn.tolist()):
        history = world.truth.history_VI[v].numpy()
        favourites = world.plan.favourites_VK[v]
        times = Counter(shown)
        old = sorted((count for item, count in times.items() if history[item]), reverse=True)
        new = sorted((count for item, count in times.items() if not history[item]), reverse=True)
        # Nothing is near to no history: then what sells.
        order = world.popular_I if near_VI is None or not history.any() else np.argsort(-near_VI[v], kind="stable")
        old_items = favourites[favourites >= 0] if rule == "copy_favourites_eq" else order[history[order]]
        new_items = order[~history[order]]
        chosen.append(np.concatenate([np.repeat(old_items[: len(old)], old), np.repeat(new_items[: len(new)], new)]))
    return world.cycled(chosen)


def best_of(world: World, codes_VnL: Tensor, more_VmL: Tensor, windows_V: Tensor) -> Tensor:
    """The ``n`` pictures of each window that the judge likes best of those drawn; codes ``[V, n, L]``, best first."""
    all_VNL = torch.cat([codes_VnL, more_VmL], 1)
    liking = world.liking.of_codes(all_VNL, world.codec, windows_V)
    best_Vn = liking.topk(world.n, dim=1).indices
    return all_VNL.gather(1, best_Vn[..., None].expand(-1, -1, all_VNL.shape[-1]))
