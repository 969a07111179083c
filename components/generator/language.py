"""What generators have in common whose language model, in Llama's form, writes a picture's codes one after the other.

A family says where its language model is, how prompts and codes are embedded and which head reads codes out; some write
marks between the rows of a picture, which are read but never drawn.

Legend: U users (prompts), n pictures a user, L codes a picture, K codebook entries, P prompt tokens, D width,
S tokens that a picture takes as input (its codes but the last, and marks).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from couturier.components.generator.beams import likeliest
from couturier.components.generator.packed import packed_hidden
from couturier.components.generator.prompt import PromptBuilder, Prompts
from couturier.components.generator.sampler import SamplerSettings, sample_codes
from couturier.components.together import gathered


class LanguageGenerator(nn.Module, ABC):
    """A language model that writes picture codes, and its prompt builder.

    Attributes:
        prompts: turns histories into prompts.
        codes_per_picture: L.
        product_dtype: "bfloat16" makes the products of training in that type whatever the weights are held in.
    """

    prompts: PromptBuilder
    codes_per_picture: int
    product_dtype: str

    @property
    @abstractmethod
    def lm(self) -> nn.Module:
        """The language model: ``layers``, ``norm``, ``rotary_emb``, ``config``."""

    @property
    @abstractmethod
    def codebook_size(self) -> int:
        """K."""

    @abstractmethod
    def parameters_to_train(self) -> list[nn.Parameter]:
        """Those that learn."""

    def given(self) -> frozenset[str]:
        """Names of the state that a published base gives and training never changes: nothing, unless adapters learn."""
        return frozenset()

    @property
    def layers(self) -> nn.ModuleList:
        """Of the language model."""
        layers = self.lm.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    @abstractmethod
    def blank(self) -> LanguageGenerator:
        """A generator of the same shape; its weights are to be loaded."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[..., D]`` → logits of the next code ``[..., K]``."""

    @abstractmethod
    def embed_prompt(self, prompts: Prompts) -> Tensor:
        """``[U, P, D]``."""

    @abstractmethod
    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes ``[...]`` → embeddings ``[..., D]``."""

    def embed_mark(self, at: int) -> Tensor | None:
        """What is read after the ``at``-th code and before the next, ``[D]``; None where nothing is."""
        return None

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Everything that loading needs."""

    def embed_picture(self, codes_UnL: Tensor) -> tuple[Tensor, list[int]]:
        """What a picture is read as ``[U, n, S, D]``, and the place in it from which each code but the first is
        predicted."""
        x_UnSD = self.embed_codes(codes_UnL[:, :, :-1])
        marks = [self.embed_mark(at) for at in range(x_UnSD.shape[2])]
        if all(mark is None for mark in marks):
            return x_UnSD, list(range(x_UnSD.shape[2]))
        parts, places = [], []
        for at, mark in enumerate(marks):
            parts.append(x_UnSD[:, :, at])
            if mark is not None:
                parts.append(mark.expand_as(parts[-1]))
            places.append(len(parts) - 1)
        return torch.stack(parts, 2), places

    def logits(self, prompts: Prompts, codes_UnL: Tensor, prefix_UPD: Tensor | None = None) -> Tensor:
        """Teacher-forced logits ``[U, n, L, K]`` of ``n`` pictures a user in one packed pass.

        The prompt is computed once; each picture's codes attend to it and to themselves, never to another picture.

        Args:
            prefix_UPD: the prompts embedded otherwise than by :meth:`embed_prompt`.
        """
        with self.products():
            return self._logits(prompts, codes_UnL, prefix_UPD)

    def products(self) -> AbstractContextManager[object]:
        """Within it, products are made in ``product_dtype``."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.product_dtype == "bfloat16")

    @property
    def device(self) -> torch.device:
        """Where the weights are; prompts and codes may come from elsewhere."""
        return next(self.parameters()).device

    def _logits(self, prompts: Prompts, codes_UnL: Tensor, prefix_UPD: Tensor | None) -> Tensor:
        device, n = self.device, codes_UnL.shape[1]
        prompts, codes_UnL = prompts.to(device), codes_UnL.to(device)
        if prefix_UPD is None:
            prefix_UPD = self.embed_prompt(prompts)
        own_UnSD, places = self.embed_picture(codes_UnL)
        last_UD, rest_UnSD = packed_hidden(self.lm, prefix_UPD, own_UnSD, prompts.mask_UP, prompts.position_UP)
        if len(places) < own_UnSD.shape[2]:
            rest_UnSD = rest_UnSD[:, :, places]
        first_UnD = last_UD[:, None].expand(-1, n, -1)
        return self.head(torch.cat([first_UnD[:, :, None], rest_UnSD], 2))

    def log_prob(self, prompts: Prompts, codes_UnL: Tensor, prefix_UPD: Tensor | None = None) -> Tensor:
        """Log-probability of every code, float32 ``[U, n, L]``; ``prefix_UPD`` as in :meth:`logits`."""
        logits = self.logits(prompts, codes_UnL, prefix_UPD).float()
        codes = codes_UnL.flatten().to(logits.device)
        nats = F.cross_entropy(logits.flatten(0, -2), codes, reduction="none")
        return -nats.view(codes_UnL.shape).to(codes_UnL.device)

    def loss(
        self, favourites_UK: np.ndarray | Tensor, codes_UnL: Tensor, *, keep_U: Tensor, random: torch.Generator
    ) -> tuple[Tensor, int]:
        """Nats a code, mean over all, and how many tokens were read. Where ``keep_U`` is False the prompt has no
        condition. Nothing is random here: ``random`` is what a diffusion generator draws its noise from."""
        prompts = self.prompts.build(favourites_UK)
        prompts = prompts.where(keep_U, prompts.unconditional(self.prompts.pad_id))
        u, n, length = codes_UnL.shape
        return -self.log_prob(prompts, codes_UnL).mean(), prompts.ids_UP.numel() + u * n * (length - 1)

    @torch.no_grad()
    def nats(self, favourites_UK: np.ndarray | Tensor, codes_UnL: Tensor, *, unconditional: bool = False) -> Tensor:
        """Nats a picture ``[U, n]`` of codes ``[U, n, L]`` after each history (or with no condition)."""
        prompts = self.prompts.build(favourites_UK)
        if unconditional:
            prompts = prompts.unconditional(self.prompts.pad_id)
        return -self.log_prob(prompts, codes_UnL).sum(-1)

    def nll(self, favourites_UK: np.ndarray | Tensor, codes_UL: Tensor, *, unconditional: bool = False) -> Tensor:
        """Nats a picture ``[U]``; see :meth:`nats`."""
        return self.nats(favourites_UK, codes_UL[:, None], unconditional=unconditional)[:, 0]

    @torch.no_grad()
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
        compile: bool = False,
    ) -> Tensor:
        """Draw ``n`` pictures a user: codes int64 ``[U, n, L]``.

        Args:
            favourites_UK: item indices of each history, -1 for none.
            seeds: one a user; a user's random numbers depend on that seed alone, whatever else is in the batch.
            guidance: 1 is plain conditional sampling, 0 unconditional, above 1 leans on the history (1.5).
            temperature: 0 takes the likeliest code each time.
            top_k, top_p: keep the likeliest codes only (0 and 1: keep all).
            spread: a user's samples are spread evenly over the distribution, so that they repeat each other less; each
                alone is distributed as independent ones are.
            compile: let ``torch.compile`` make the step; the codes stay the same.
        """
        settings = SamplerSettings(
            guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, spread=spread, compile=compile
        )
        with gathered(self):
            return sample_codes(self, self.prompts.build(favourites_UK), n, seeds=seeds, settings=settings).cpu()

    @torch.no_grad()
    def likeliest(
        self,
        favourites_UK: np.ndarray | Tensor,
        n: int,
        *,
        beams: int = 0,
        guidance: float = 1.0,
        without_UmL: Tensor | None = None,
    ) -> Tensor:
        """The ``n`` likeliest pictures a user, all different: codes int64 ``[U, n, L]``, the likeliest first; see
        :func:`~couturier.components.generator.beams.likeliest`."""
        with gathered(self):
            prompts = self.prompts.build(favourites_UK)
            return likeliest(self, prompts, n, beams=beams, guidance=guidance, without_UmL=without_UmL).cpu()
