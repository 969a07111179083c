"""What every generator can do, whichever family it is of, how a saved one is opened, and the second family's settings
(here, so that naming them does not import diffusers).

Two kinds: an any-to-any language model that writes a picture's codes one after the other
(:mod:`couturier.components.generator.janus`, :mod:`couturier.components.generator.emu3`), and a diffusion model that
denoises them all at once (:mod:`couturier.components.generator.diffusion`). Evaluation, serving and the watcher of RL
need no more than this.

Legend: U users, n pictures a user, L codes a picture, K favourites.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from couturier.components.errors import ConfigError, LineageError, MissingExtraError
from couturier.components.files import read_json

if TYPE_CHECKING:
    from couturier.components.generator.diffusion import DiffusionGenerator
    from couturier.components.generator.emu3 import Emu3Generator
    from couturier.components.generator.janus import JanusGenerator

FAMILIES = ("janus", "emu3", "diffusion")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The shape of the denoiser, and how it draws. It learns best at twice the any-to-any model's rate: on the demo,
    ``--set sft.generator.family=diffusion --set sft.lr=2e-3``."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    history: int = 12
    """Favourites it looks at."""
    steps: int = 12
    """Calls of the denoiser a picture."""
    shift: float = 0.0
    """How far steps and training lean towards noise; 1 is even in the path's time, 0 stands for
    sqrt(L * D / (1 + stagger)) / 4.5."""
    stagger: float = 0.0
    """How much later the last place of a picture is denoised than the first, in times that one place takes; 0 denoises
    all at once."""
    known: int = 2048
    """Rows of codes of catalogue pictures that it begins with, those that sell most (:mod:`.gallery`); 0: none."""
    liking: int = 64
    """Width in which what a person likes is compared with these rows."""
    nats_levels: int = 8
    """Noise levels over which :meth:`DiffusionGenerator.nats` integrates."""

    def __post_init__(self) -> None:
        if self.width % self.heads or min(self.width, self.layers, self.heads, self.history, self.steps) < 1:
            raise ConfigError(f"{self} does not work: all must be at least 1 and width a multiple of heads.")
        if self.shift < 0 or self.stagger < 0 or self.known < 0 or min(self.liking, self.nats_levels) < 1:
            raise ConfigError(
                f"shift is {self.shift}, stagger {self.stagger}, known {self.known}, liking {self.liking} and "
                f"nats_levels {self.nats_levels}; the first three must not be negative (shift 0: by the size of a "
                "picture), the others at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """The shape of a user embedding."""

    pairs: int = 4
    """Pairs that are read of each person (the paper's number)."""
    tokens: int = 4
    """E, tokens of a user embedding."""
    width: int = 64
    """Of those tokens."""
    heads: int = 4
    """Of the attention that gathers pairs into tokens."""

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.tokens < 1 or self.width % self.heads:
            raise ConfigError(
                f"preference settings {self} are out of range; pairs and tokens must be >= 1 and width a multiple of "
                "heads."
            )


class Generator(Protocol):
    """Draws the next picture for a person, as codes of the codec."""

    @property
    def codes_per_picture(self) -> int:
        """L."""
        ...

    @property
    def codebook_size(self) -> int:
        """Codes there are; each is below."""
        ...

    def sample(
        self,
        favourites_UK: np.ndarray | Tensor,
        n: int,
        *,
        seeds: list[int],
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        spread: bool = True,
    ) -> Tensor:
        """Draw ``n`` pictures a user: codes int64 ``[U, n, L]``. ``favourites_UK`` are item indices, -1 for none; a
        user's pictures depend on that user's seed and history alone, whoever else is in the batch."""
        ...

    def likeliest(
        self,
        favourites_UK: np.ndarray | Tensor,
        n: int,
        *,
        beams: int = 0,
        guidance: float = 1.0,
        without_UmL: Tensor | None = None,
    ) -> Tensor:
        """The ``n`` likeliest pictures a user, all different: codes int64 ``[U, n, L]``, the likeliest first.

        Args:
            beams: beginnings that the search keeps after each code; 0 for its own choice.
            without_UmL: pictures that are passed over, each user's own; a row of -1 is none.

        Raises:
            ConfigError: a model that does not write codes one by one, or fewer beams than pictures.
        """
        ...

    def nats(self, favourites_UK: np.ndarray | Tensor, codes_UnL: Tensor, *, unconditional: bool = False) -> Tensor:
        """Nats a picture ``[U, n]``: how surprised the model is by these codes after each history (or after none).
        Exact for a language model, an estimate from above for a diffusion model."""
        ...

    def nll(self, favourites_UK: np.ndarray | Tensor, codes_UL: Tensor, *, unconditional: bool = False) -> Tensor:
        """As :meth:`nats`, of one picture a user ``[U]``."""
        ...

    def save(self, folder: Path) -> None:
        """Everything :func:`load_generator` needs."""
        ...


def load_generator(folder: Path) -> JanusGenerator | Emu3Generator | DiffusionGenerator:
    """The generator saved in ``folder``, of the family that ``generator.json`` names, in evaluation mode.

    Raises:
        LineageError: the folder holds none, or one of a family that this version does not know.
        MissingExtraError: it is a diffusion model and diffusers is not installed.
    """
    path = folder / "generator.json"
    if not path.exists():
        raise LineageError(f"{folder} holds no generator.json. Run `couturier retrain` to train a generator.")
    kind = read_json(path)["kind"]
    if kind == "janus":
        from couturier.components.generator.janus import JanusGenerator

        return JanusGenerator.load(folder)
    if kind == "emu3":
        from couturier.components.generator.emu3 import Emu3Generator

        return Emu3Generator.load(folder)
    if kind == "diffusion":
        if find_spec("diffusers") is None:
            raise MissingExtraError("diffusers", extra="train", needed_for="a generator of the diffusion family")
        from couturier.components.generator.diffusion import DiffusionGenerator

        return DiffusionGenerator.load(folder)
    raise LineageError(f"generator kind {kind!r} in {path} is unknown; known are {' and '.join(map(repr, FAMILIES))}.")
