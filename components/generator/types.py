"""What every generator can do, whichever family it is of, and how a saved one is opened.

Two families: an any-to-any language model that writes a picture's codes one after the other
(:mod:`couturier.components.generator.janus`), and a diffusion model that denoises them all at once
(:mod:`couturier.components.generator.diffusion`). Evaluation, serving and the watcher of RL need no more than this.

Legend: U users, n pictures a user, L codes a picture, K favourites.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from couturier.components.errors import LineageError
from couturier.components.files import read_json

if TYPE_CHECKING:
    from couturier.components.generator.diffusion import DiffusionGenerator
    from couturier.components.generator.janus import JanusGenerator

FAMILIES = ("janus", "diffusion")


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


def load_generator(folder: Path) -> JanusGenerator | DiffusionGenerator:
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
    if kind == "diffusion":
        from couturier.components.generator.diffusion import DiffusionGenerator

        return DiffusionGenerator.load(folder)
    raise LineageError(f"generator kind {kind!r} in {path} is unknown; known are {' and '.join(map(repr, FAMILIES))}.")
