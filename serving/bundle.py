"""What a bento carries, and the one way to use it: the command line and the service both draw through ``Bundle``.

A bundle folder holds::

    catalogue.parquet pictures.safetensors catalogue.json     the items a model may draw
    users-latest.json windows-latest.safetensors              what is known of every person, as of the end of the log
    codec/ model/ judge/                                      each loaded by its own room
    version.json                                              where all of it came from

Shapes: U users, N pictures, I catalogue items, C candidates, D feature width, K history slots, L codes a picture.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from couturier.components.data.formats import Catalogue, Windows
from couturier.components.errors import ConfigError, LineageError, UnknownUserError
from couturier.components.files import read_json, write_json
from couturier.components.generator.codec import Codec, load_codec, pictures
from couturier.components.generator.types import Generator, load_generator
from couturier.components.interest.base import ContentJudge
from couturier.components.interest.encoder import word_bags
from couturier.components.interest.judge import history_batch, load_judge, vocabulary_of_judge
from couturier.components.runtime import threads
from couturier.serving.sampling import MAX_HISTORY, Sampling

VERSION = "version.json"


@dataclass(frozen=True, kw_only=True)
class History:
    """What one person had done: item indices by falling favour, their decayed counts, and days since the last time."""

    items: tuple[int, ...]
    weights: tuple[float, ...]
    ages_days: tuple[float, ...]
    user_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture that was drawn: uint8 ``[H, W, 3]``, its id (the same request gets it again), the nearest real item."""

    id: str
    rgb_HWC: np.ndarray
    nearest: int


class Bundle:
    """A model, its codec, its judge, and the people and items it knows. Threads may share one: calls take turns."""

    def __init__(
        self, *, catalogue: Catalogue, people: Windows, codec: Codec, generator: Generator,
        judge: ContentJudge, vocabulary: Sequence[str], version: dict[str, Any],
    ) -> None:  # fmt: skip
        self.catalogue, self.people, self.version = catalogue, people, version
        self.codec, self.generator, self.judge, self.vocabulary = codec, generator, judge, vocabulary
        self._lock = threading.Lock()
        self._row_of = {people.users[user]: row for row, user in enumerate(people.user_W.tolist())}
        self._index_of = {item_id: i for i, item_id in enumerate(catalogue.item_ids)}
        self._profile = _typical(people)
        with threads(1), torch.inference_mode():
            self.item_features_ID = judge.embed_items()
            self._shelf_ID = _unit(judge.embed_pictures(_float_pictures(catalogue.rgb_IHWC)))

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read a folder that :func:`write_bundle` wrote.

        Raises:
            LineageError: it is not a bundle.
        """
        if not (folder / VERSION).exists():
            raise LineageError(f"{folder} holds no {VERSION}, so it is no bundle. Run `couturier retrain` to make one.")
        return cls(
            catalogue=Catalogue.load(folder),
            people=Windows.load(folder, "latest"),
            codec=load_codec(folder / "codec"),
            generator=load_generator(folder / "model"),
            judge=load_judge(folder / "judge"),
            vocabulary=vocabulary_of_judge(folder / "judge"),
            version=read_json(folder / VERSION),
        )

    @property
    def users(self) -> list[str]:
        """Ids of the people whose history is known, sorted."""
        return sorted(self._row_of)

    def history_of(self, user_id: str) -> History:
        """What is known of a person at the end of the log.

        Raises:
            UnknownUserError: nothing is.
        """
        if user_id not in self._row_of:
            alike = difflib.get_close_matches(user_id, self._row_of, n=3)
            near = f" Did you mean {', '.join(alike)}?" if alike else ""
            raise UnknownUserError(
                f"user_id {user_id!r} is not among the {len(self._row_of)} people this model knows.{near} "
                "Give a known id, or send a history of item ids instead."
            )
        row = self._row_of[user_id]
        real = self.people.favourites_WK[row] >= 0
        return History(
            items=tuple(self.people.favourites_WK[row][real].tolist()),
            weights=tuple(self.people.weight_WK[row][real].tolist()),
            ages_days=tuple(self.people.age_days_WK[row][real].tolist()),
            user_id=user_id,
        )

    def history_from(self, item_ids: Sequence[str]) -> History:
        """A history from item ids, the favourite first. It carries no times, so each place gets the weight and age
        that is usual there among the people this bundle knows.

        Raises:
            ConfigError: an id that is not in the catalogue, or more than 200 of them.
        """
        if len(item_ids) > MAX_HISTORY:
            raise ConfigError(
                f"history has {len(item_ids)} items; at most {MAX_HISTORY} are read. Send the favourites."
            )
        items = tuple(dict.fromkeys(self.indices(item_ids, "history")))[: self.people.favourites_WK.shape[1]]
        weights, ages = self._profile
        return History(items=items, weights=weights[: len(items)], ages_days=ages[: len(items)])

    def indices(self, item_ids: Sequence[str], field: str) -> list[int]:
        """Catalogue rows of item ids.

        Raises:
            ConfigError: an id that is not in the catalogue.
        """
        unknown = [item_id for item_id in item_ids if item_id not in self._index_of]
        if unknown:
            raise ConfigError(
                f"{field} names {unknown[0]!r}{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}, which the "
                f"catalogue of {len(self.catalogue)} items does not hold. Leave unknown items out."
            )
        return [self._index_of[item_id] for item_id in item_ids]

    def generate(self, histories: Sequence[History], sampling: Sampling) -> list[list[Picture]]:
        """``sampling.n`` pictures a history. What one history gets does not depend on the others beside it."""
        width = self.people.favourites_WK.shape[1]
        favourites_UK = torch.full((len(histories), width), -1, dtype=torch.int64)
        for row, history in enumerate(histories):
            favourites_UK[row, : len(history.items)] = torch.tensor(history.items[:width], dtype=torch.int64)
        with self._lock, threads(1), torch.inference_mode():
            codes_UNL = self._codes(favourites_UK, sampling)
            rgb_N3HW = self.codec.decode(codes_UNL.reshape(-1, codes_UNL.shape[-1]))
            nearest_N = self.nearest(rgb_N3HW)
        rgb_NHWC = (rgb_N3HW * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        drawn = []
        for row, history in enumerate(histories):
            ids = self._generation_ids(history, sampling)
            places = range(row * sampling.n, (row + 1) * sampling.n)
            drawn.append(
                [Picture(id=i, rgb_HWC=rgb_NHWC[p], nearest=nearest_N[p]) for i, p in zip(ids, places, strict=True)]
            )
        return drawn

    def _codes(self, favourites_UK: Tensor, sampling: Sampling) -> Tensor:
        if sampling.likeliest:
            had_UKL = self._had(favourites_UK) if sampling.new else None
            return self.generator.likeliest(favourites_UK, sampling.n, guidance=sampling.guidance, without_UmL=had_UKL)
        return self.generator.sample(
            favourites_UK,
            sampling.n,
            guidance=sampling.guidance,
            temperature=sampling.temperature,
            seeds=[sampling.seed] * len(favourites_UK),
        )

    def _had(self, favourites_UK: Tensor) -> Tensor:
        """Codes of histories ``[U, K, L]``, -1 where there is none."""
        known_M, where = favourites_UK.clamp_min(0).unique(return_inverse=True)
        known = dataclasses.replace(self.catalogue, rgb_IHWC=self.catalogue.rgb_IHWC[known_M.numpy()])
        codes_ML = self.codec.encode(pictures(known, self.codec.picture_size))
        return codes_ML[where].masked_fill((favourites_UK < 0)[..., None], -1)

    def nearest(self, rgb_N3HW: Tensor) -> list[int]:
        """The catalogue row whose picture the judge's eyes find most alike, for each picture."""
        return (_unit(self.judge.embed_pictures(rgb_N3HW)) @ self._shelf_ID.T).argmax(1).tolist()

    def score(self, history: History, items: Sequence[int]) -> np.ndarray:
        """The judge's standardised logits ``[C]`` of catalogue rows: 0 is a random item, 1 is one SD better."""
        with self._lock, threads(1), torch.inference_mode():
            batch = history_batch(_one_window(history), np.array([0]), self.item_features_ID)
            candidates_1CD = self.item_features_ID[torch.tensor(items, dtype=torch.int64)][None]
            logits_1C = self.judge.standardise(self.judge.score(self.judge.encode(batch), candidates_1CD))
        return logits_1C[0].double().numpy()

    def score_titled(self, history: History, picture: Picture, titles: Sequence[str]) -> Tensor:
        """The judge's standardised logits ``[N]`` of one drawn picture under each of N titles."""
        with self._lock, threads(1), torch.inference_mode():
            batch = history_batch(_one_window(history), np.array([0]), self.item_features_ID)
            seen_1D = self.judge.embed_pictures(_float_pictures(picture.rgb_HWC[None]))
            pictures_NP = seen_1D[:, : self.judge.items.picture_width].expand(len(titles), -1)
            candidates_ND = self.judge.items.described(pictures_NP, *word_bags(titles, self.vocabulary))
            logits_1N = self.judge.score(self.judge.encode(batch), candidates_ND[None])
            return self.judge.standardise(logits_1N)[0]

    def _generation_ids(self, history: History, sampling: Sampling) -> list[str]:
        ids = self.catalogue.item_ids
        how: list[float | str] = [sampling.n, sampling.guidance, sampling.temperature, sampling.seed]
        if sampling.likeliest:
            how = [sampling.n, sampling.guidance, "likeliest, new" if sampling.new else "likeliest"]
        recipe = {
            "bundle": self.version["bundle"],
            "history": [ids[i] for i in history.items],
            "sampling": how,
        }
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:24]
        return [f"gen-{digest}-{place}" for place in range(sampling.n)]


def write_bundle(
    out: Path, *, sequences: Path, tokenise: Path, judge: Path, rl: Path, version: Mapping[str, Any]
) -> None:
    """Gather what serving needs from finished stages into ``out``; ``version`` says where it came from.

    ``version`` must hold ``bundle``, the id that pictures of this bundle carry.
    """
    out.mkdir(parents=True, exist_ok=True)
    Catalogue.load(sequences).save(out)
    Windows.load(sequences, "latest").save(out, "latest")
    for source, name in ((tokenise / "codec", "codec"), (rl / "model", "model"), (judge / "judge", "judge")):
        shutil.copytree(source, out / name, copy_function=shutil.copyfile, dirs_exist_ok=True)
    if not version.get("bundle"):
        raise LineageError("version facts lack 'bundle', the id of the bundle; the package stage sets it.")
    write_json(out / VERSION, dict(version))


def _typical(people: Windows) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Median weight and age in days by place in the history, over the people who have that many items."""
    real = people.favourites_WK >= 0
    weights: list[float] = []
    ages: list[float] = []
    for place in range(real.shape[1]):
        has = real[:, place]
        weights.append(float(np.median(people.weight_WK[has, place])) if has.any() else (weights or [1.0])[-1])
        ages.append(float(np.median(people.age_days_WK[has, place])) if has.any() else (ages or [0.0])[-1])
    return tuple(weights), tuple(ages)


def _one_window(history: History) -> Windows:
    """A history in the form the judge was fitted on, so that training and serving prepare it with the same code."""
    favourites = np.array([history.items], np.int32).reshape(1, -1)
    none, offsets = np.empty(0, np.int32), np.zeros(2, np.int64)
    return Windows(
        users=[history.user_id or ""],
        user_W=np.zeros(1, np.int32),
        time_W=np.zeros(1, np.int64),
        favourites_WK=favourites,
        weight_WK=np.array([history.weights], np.float32).reshape(1, -1),
        age_days_WK=np.array([history.ages_days], np.float32).reshape(1, -1),
        recent_WK=favourites,
        basket=none,
        basket_offsets=offsets,
        future=none,
        future_offsets=offsets,
    )


def _float_pictures(rgb_IHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rgb_IHWC)).permute(0, 3, 1, 2).float() / 255


def _unit(features_ND: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features_ND, dim=-1)
