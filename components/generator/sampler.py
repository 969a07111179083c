"""Batched sampling of picture codes with kept keys and values.

Every distinct prompt is read once; its keys and values are shared by the samples that follow it. Every further code is
one light step over all samples of all users, with the rows of guidance (with the history and without) in the same batch
(:mod:`couturier.components.generator.decoding`).

Random numbers are drawn up front, a stream a user, so a user's pictures do not depend on who else is in the batch. The
samples of one user are spread evenly over the distribution, code by code (systematic sampling, Madow 1949; arithmetic
sampling, Vilnis et al., arXiv 2210.15458, does so with one number for all codes): each picture alone is distributed as
before, but together they repeat each other less than independent ones.

Legend: U users, n samples, L codes, K codebook, P prompt tokens, D width, B branches of guidance (one or two).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from couturier.components.errors import ConfigError
from couturier.components.generator.blocks import Block, blocks_of
from couturier.components.generator.decoding import Decoder, Decoding, Prefix
from couturier.components.generator.prompt import Prompts
from couturier.components.shares import how_many, side_by_side, small_work
from couturier.kernels import systematic_draw

if TYPE_CHECKING:
    from transformers import LlamaModel

    from couturier.components.generator.language import LanguageGenerator

# A row of samples shares one copy of its prompt's keys and values; longer rows would meet too many mates' keys.
_MOST_IN_A_ROW = 16


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """See :meth:`LanguageGenerator.sample`."""

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    spread: bool = True
    """Evenly spaced points for the samples of a user that are alike so far, instead of independent ones."""
    compile: bool = False
    """Let ``torch.compile`` make the step: slow at the first call of a shape (a minute on two cores), faster later."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.guidance >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ConfigError(
                f"sampler settings {self} are out of range; temperature, guidance and top_k must be >= 0 and "
                "0 < top_p <= 1."
            )


@torch.no_grad()
def sample_codes(
    generator: LanguageGenerator, prompts: Prompts, n: int, *, seeds: list[int], settings: SamplerSettings
) -> Tensor:
    """Codes int64 ``[U, n, L]`` for ``n`` samples of each prompt, on the model's device.

    Raises:
        ConfigError: ``n`` below one, or not one seed a user.
    """
    decoder, prefix, row_BU = ready(generator, prompts, n, guidance=settings.guidance)
    length = generator.codes_per_picture
    return sample_tokens(decoder, prefix, row_BU, n, length=length, seeds=seeds, settings=settings)


def ready(generator: LanguageGenerator, prompts: Prompts, n: int, *, guidance: float) -> tuple[Decoder, Prefix, Tensor]:
    """What writing ``n`` pictures a user starts from: the decoder, the distinct prompts, and which of them each user
    follows ``[B, U]``, with the history and, where guidance asks for it, without."""
    branches = [] if guidance == 0 else [prompts]
    if guidance != 1:
        branches.append(prompts.unconditional(generator.prompts.pad_id))
    lm, users = cast("LlamaModel", generator.lm), len(prompts.ids_UP)
    with small_work(how_many(lm.layers[0], users, len(branches) * users * n)):
        distinct, row_BU = _distinct(branches, generator.device)
        x_NPD = generator.embed_prompt(distinct)
        prefix = Prefix(x_NPD=x_NPD, mask_NP=distinct.mask_UP, position_NP=distinct.position_UP)
        embed: Callable[[Tensor], Tensor] = generator.embed_codes
        if generator.codebook_size <= users * n * (generator.codes_per_picture - 1):
            table_KD = generator.embed_codes(torch.arange(generator.codebook_size, device=row_BU.device))
            embed = table_KD.__getitem__
    return Decoder(lm=lm, head=generator.head, embed=embed, mark=generator.embed_mark), prefix, row_BU


@torch.no_grad()
def sample_tokens(
    decoder: Decoder,
    prefix: Prefix,
    row_BU: Tensor,
    n: int,
    *,
    length: int,
    seeds: list[int],
    settings: SamplerSettings,
) -> Tensor:
    """Tokens int64 ``[U, n, length]`` that a decoder writes after its prompts.

    Args:
        decoder: of pictures' codes or of words.
        prefix: the distinct prompts.
        row_BU: which of them each user's samples follow; a second row of it is the condition-free side of guidance.
        seeds: one a user.

    Raises:
        ConfigError: ``n`` below one, or not one seed a user.
    """
    users = row_BU.shape[1]
    if len(seeds) != users:
        raise ConfigError(f"{len(seeds)} seeds were given for {users} users; give one a user.")
    if n < 1:
        raise ConfigError(f"n is {n}; ask for at least one picture.")

    def part(own: Prefix, row_Bu: Tensor, some: slice, blocks: list[Block] | None) -> Tensor:
        return _sample_share(
            decoder, own, row_Bu, n, length=length, seeds=seeds[some], settings=settings, blocks=blocks
        )

    return in_shares(part, decoder, prefix, row_BU, n, length=length, compile=settings.compile)


def in_shares(
    part: Callable[[Prefix, Tensor, slice, list[Block] | None], Tensor],
    decoder: Decoder,
    prefix: Prefix,
    row_BU: Tensor,
    n: int,
    *,
    length: int,
    compile: bool = False,
) -> Tensor:
    """Codes ``[U, n, length]`` that ``part`` writes for some users at a time, those of different cores side by side.

    Args:
        part: given the prompts of some users, which of them each follows, which users these are, and the layers as
            all share them, returns their codes.
    """
    users = row_BU.shape[1]
    shares = 1 if compile else how_many(decoder.lm.layers[0], users, row_BU.numel() * n)
    with small_work(shares):
        blocks = blocks_of(decoder.lm, tokens=row_BU.numel() * n * length) if shares > 1 else None

    def share(i: int) -> Tensor:
        some = slice(i, users, shares)  # every so many: prompts are often sorted by length
        read_N, row_Bu = row_BU[:, some].unique(return_inverse=True)
        return part(Prefix(**{name: value[read_N] for name, value in vars(prefix).items()}), row_Bu, some, blocks)

    found = side_by_side([partial(share, i) for i in range(shares)])
    codes_UnL = found[0].new_empty(users, n, length)
    for i, codes in enumerate(found):
        codes_UnL[i::shares] = codes
    return codes_UnL


@torch.no_grad()
def _sample_share(
    decoder: Decoder,
    prefix: Prefix,
    row_BU: Tensor,
    n: int,
    *,
    length: int,
    seeds: list[int],
    settings: SamplerSettings,
    blocks: list[Block] | None,
) -> Tensor:
    """As :func:`sample_tokens`, for some of the users."""
    branches, users = row_BU.shape
    device = prefix.x_NPD.device
    uniforms_UnL = torch.stack([torch.rand(n, length, generator=torch.Generator().manual_seed(s)) for s in seeds])
    points = _Points(uniforms_UnL.to(device), spread=settings.spread)
    rows = -(-n // _MOST_IN_A_ROW)
    each = -(-n // rows)
    # The last row of a user may have places to spare: they follow code 0 and are left out at the end.
    # Made outside of inference mode: a loss may need them.
    codes_UmL = torch.zeros(users, rows * each, length, dtype=torch.long, device=device)
    with torch.inference_mode():
        decoding = Decoding(
            decoder,
            prefix,
            row_BU.flatten().repeat_interleave(rows),
            samples=each,
            steps=length - 1 + sum(decoder.mark(t) is not None for t in range(length - 1)),
            compile=settings.compile,
            blocks=blocks,
        )
        logits = decoding.first_logits()[:, None].expand(-1, each, -1)
        for t in range(length):
            logits_BUmK = logits.reshape(branches, users, rows * each, -1)
            codes_UmL[:, :n, t] = _draw(logits_BUmK[:, :, :n], points, settings)
            if t + 1 < length:
                x_UmD = decoder.embed(codes_UmL[:, :, t])
                x_RnD = x_UmD.view(users * rows, each, -1).repeat(branches, 1, 1)
                logits = decoding.step(x_RnD)
                if (mark := decoder.mark(t)) is not None:
                    logits = decoding.step(mark.expand_as(x_RnD))
    return codes_UmL[:, :n]


def _distinct(branches: list[Prompts], device: torch.device) -> tuple[Prompts, Tensor]:
    """Each prompt once, and which one every user of every branch has ``[B, U]``."""
    parts = {name: torch.cat([vars(one)[name] for one in branches]) for name in vars(branches[0])}
    _, row_M = torch.cat([part.long() for part in parts.values()], 1).unique(dim=0, return_inverse=True)
    places = torch.arange(len(row_M))
    first_N = torch.full((int(row_M.max()) + 1,), len(row_M)).scatter_reduce_(0, row_M, places, "amin")
    prompts = Prompts(**{name: part[first_N].to(device) for name, part in parts.items()})
    return prompts, row_M.view(len(branches), -1).to(device)


class _Points:
    """The number in [0, 1) that decides each sample's next code.

    Independent: a fresh one every time. Spread: the m samples of a user that are alike so far take (v + rank / m) mod 1
    with one fresh v for all of them. Every point is uniform, and of m alike samples m * p go on with a code of
    probability p, rounded up or down. No point is made from an earlier one, which would magnify rounding errors until a
    user's pictures depended on the batch they were drawn in.
    """

    def __init__(self, uniforms_UnL: Tensor, *, spread: bool) -> None:
        self.fresh_UnL, self.t = uniforms_UnL.double(), 0
        u, n, _ = uniforms_UnL.shape
        self.alike_Unn = uniforms_UnL.new_ones(u, n, n, dtype=torch.bool) if spread else None

    def compiled(self, logits_BUnK: Tensor, settings: SamplerSettings) -> Tensor:
        """As :meth:`choose` after the softmax, in one call."""
        codes_Un, alike = systematic_draw.draw(
            logits_BUnK,
            self.fresh_UnL[:, :, self.t],
            self.alike_Unn,
            guidance=settings.guidance,
            temperature=settings.temperature,
        )
        if alike == codes_Un.numel():
            self.alike_Unn = None
        self.t += 1
        return codes_Un

    def choose(self, p_UnK: Tensor) -> Tensor:
        """Codes ``[U, n]`` by inverting the cumulative distribution at each point; moves on to the next code."""
        point_Un = self.fresh_UnL[:, :, self.t]
        if self.alike_Unn is not None:
            first_Un = self.alike_Unn.byte().argmax(-1)
            rank_Un, count_Un = self.alike_Unn.tril(-1).sum(-1), self.alike_Unn.sum(-1)
            point_Un = (point_Un.gather(1, first_Un) + rank_Un / count_Un.double()) % 1
        cumulative = p_UnK.double().cumsum(-1)
        at = point_Un[..., None] * cumulative[..., -1:]
        codes_Un = torch.searchsorted(cumulative, at, right=True)[..., 0].clamp_max(p_UnK.shape[-1] - 1)
        if self.alike_Unn is not None:
            self.alike_Unn &= codes_Un[:, :, None] == codes_Un[:, None]
            if self.alike_Unn.device.type == "cpu" and int(self.alike_Unn.sum()) == codes_Un.numel():
                self.alike_Unn = None  # all differ, and will: a fresh point each (elsewhere, asking costs more)
        self.t += 1
        return codes_Un


def guided(logits_BUXK: Tensor, guidance: float) -> Tensor:
    """Logits float32 ``[U, ..., K]`` out of those with the history and, where there are two branches, without."""
    logits_UXK = logits_BUXK[0]
    if len(logits_BUXK) == 2:
        logits_UXK = logits_BUXK[1] + guidance * (logits_UXK - logits_BUXK[1])
    return logits_UXK.float()


def _draw(logits_BUnK: Tensor, points: _Points, settings: SamplerSettings) -> Tensor:
    """One code a sample."""
    plain = settings.temperature > 0 and not settings.top_k and settings.top_p == 1
    if plain and systematic_draw.covers(logits_BUnK):
        return points.compiled(logits_BUnK, settings)
    logits_UnK = guided(logits_BUnK, settings.guidance)
    if settings.temperature == 0:
        return logits_UnK.argmax(-1)
    logits = logits_UnK / settings.temperature
    if settings.top_k and settings.top_k < logits.shape[-1]:
        floor = logits.topk(settings.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    p = logits.softmax(-1)
    if settings.top_p < 1:
        ordered, index = p.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= settings.top_p
        p = torch.zeros_like(p).scatter(-1, index, ordered.masked_fill(beyond, 0))
    return points.choose(p)
