"""The likeliest pictures of a person, all different, instead of random ones: beam search over codes.

    b best beginnings ── their next codes ──▶ b K longer beginnings ── the b likeliest of them ──▶ …

Random draws show an item as often as it is likely; somebody who shows ten pictures at once rather wants the ten best
guesses, once each, which is how generative retrieval decodes (TIGER, arXiv 2305.05065; OneRec, arXiv 2502.18965). The
search runs on the sampler's shared prompts and compiled steps: after each code the beginnings that live on take over
the keys and values of those that they go on from.

Legend: U users, b beams, L codes, K codebook, B branches of guidance (one or two).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from couturier.components.errors import ConfigError
from couturier.components.generator.decoding import Decoder, Decoding, Prefix
from couturier.components.generator.prompt import Prompts
from couturier.components.generator.sampler import guided, in_shares, ready

if TYPE_CHECKING:
    from couturier.components.generator.blocks import Block
    from couturier.components.generator.language import LanguageGenerator

BEAMS_A_PICTURE = 3
"""Beginnings that are kept for each picture asked for: a beginning that many items share looks better than each."""


@torch.no_grad()
def likeliest(
    generator: LanguageGenerator,
    prompts: Prompts,
    n: int,
    *,
    beams: int = 0,
    guidance: float = 1.0,
    without_UmL: Tensor | None = None,
) -> Tensor:
    """Codes int64 ``[U, n, L]``, the likeliest first.

    Args:
        beams: beginnings kept after each code; 0 for :data:`BEAMS_A_PICTURE` times ``n`` and what is passed over.
        without_UmL: pictures that are passed over, each user's own; a row of -1 is none.
        guidance: as in sampling; the search then is for what is likeliest under guidance.

    Raises:
        ConfigError: ``n`` below one, more than there are different pictures, or fewer beams than pictures.
    """
    passed_over = 0 if without_UmL is None else without_UmL.shape[1]
    beams, length = beams or BEAMS_A_PICTURE * (n + passed_over), generator.codes_per_picture
    if n < 1 or n > generator.codebook_size**length:
        raise ConfigError(f"n is {n}; ask for at least one picture, and for no more than there are different ones.")
    if beams < n + passed_over:
        beside = f", {passed_over} of the history that are passed over" if passed_over else ""
        raise ConfigError(f"beams is {beams} for {n} pictures{beside}; keep at least {n + passed_over} beginnings.")
    decoder, prefix, row_BU = ready(generator, prompts, beams, guidance=guidance)

    def part(own: Prefix, row_Bu: Tensor, some: slice, blocks: list[Block] | None) -> Tensor:
        return _search(decoder, own, row_Bu, beams, length=length, guidance=guidance, blocks=blocks)

    codes_UbL = in_shares(part, decoder, prefix, row_BU, beams, length=length)
    if without_UmL is not None:
        same_Ub = (codes_UbL[:, :, None] == without_UmL.to(codes_UbL.device)[:, None]).all(-1).any(-1)
        kept_Ub = same_Ub.long().argsort(dim=1, stable=True)  # what is passed over goes behind all others
        codes_UbL = codes_UbL.gather(1, kept_Ub[..., None].expand_as(codes_UbL))
    return codes_UbL[:, :n]


def _search(
    decoder: Decoder,
    prefix: Prefix,
    row_BU: Tensor,
    beams: int,
    *,
    length: int,
    guidance: float,
    blocks: list[Block] | None,
) -> Tensor:
    """All beams ``[U, b, L]`` of some users, the likeliest first."""
    branches, users = row_BU.shape
    codes_UbL = torch.zeros(users, beams, length, dtype=torch.long, device=row_BU.device)
    marks = [decoder.mark(t) for t in range(length - 1)]
    with torch.inference_mode():
        steps = length - 1 + sum(mark is not None for mark in marks)
        decoding = Decoding(decoder, prefix, row_BU.flatten(), samples=beams, steps=steps, blocks=blocks)
        first_BUK = decoding.first_logits().view(branches, users, -1)
        # All beams begin alike: only the first may go on, or each would find the same codes.
        nats_Ub = codes_UbL.new_full((users, beams), 0, dtype=torch.float32)
        nats_Ub[:, 1:] = float("inf")
        logits_BUbK = first_BUK[:, :, None].expand(-1, -1, beams, -1)
        for t in range(length):
            longer_UbK = nats_Ub[..., None] - guided(logits_BUbK, guidance).log_softmax(-1)
            codebook = longer_UbK.shape[-1]
            nats_Ub, at_Ub = longer_UbK.flatten(1).topk(beams, largest=False)
            from_Ub, code_Ub = at_Ub // codebook, at_Ub % codebook
            codes_UbL = codes_UbL.gather(1, from_Ub[..., None].expand(-1, -1, length))
            codes_UbL[..., t] = code_Ub
            if t + 1 < length:
                decoding.follow(from_Ub.repeat(branches, 1))
                x_RbD = decoder.embed(code_Ub).repeat(branches, 1, 1)
                logits_RbK = decoding.step(x_RbD)
                if (mark := marks[t]) is not None:
                    logits_RbK = decoding.step(mark.expand_as(x_RbD))
                logits_BUbK = logits_RbK.view(branches, users, beams, -1)
    return codes_UbL.clone()
