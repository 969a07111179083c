"""Batched sampling of picture codes with kept keys and values.

The prompt runs once a user through transformers' own language model; its keys and values are kept once a user and
shared by that user's samples (:mod:`couturier.kernels.shared_prefix`). Every further code is one light step over all
samples of all users. Guidance runs a second, unconditional set of prompts beside the first.

Random numbers are drawn up front, a stream a user, so a user's pictures do not depend on who else is in the batch. The
samples of one user are spread evenly over the distribution, code by code (systematic sampling, Madow 1949; arithmetic
sampling, Vilnis et al., arXiv 2210.15458, does so with one number for all codes): each picture alone is distributed as
before, but together they repeat each other less than independent ones.

Legend: U users, n samples, L codes, K codebook, P prompt tokens, D width, H heads, G key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from couturier.components.errors import ConfigError
from couturier.components.generator.prompt import Prompts
from couturier.kernels.shared_prefix import shared_prefix_attention

if TYPE_CHECKING:
    from couturier.components.generator.janus import JanusGenerator


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """See :meth:`JanusGenerator.sample`."""

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    spread: bool = True
    """Evenly spaced points for the samples of a user that are alike so far, instead of independent ones."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.guidance >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ConfigError(
                f"sampler settings {self} are out of range; temperature, guidance and top_k must be >= 0 and "
                "0 < top_p <= 1."
            )


@torch.no_grad()
def sample_codes(
    generator: JanusGenerator, prompts: Prompts, n: int, *, seeds: list[int], settings: SamplerSettings
) -> Tensor:
    """Codes int64 ``[U, n, L]`` for ``n`` samples of each prompt."""
    users, length = prompts.ids_UP.shape[0], generator.codes_per_picture
    if len(seeds) != users:
        raise ConfigError(f"{len(seeds)} seeds were given for {users} users; give one a user.")
    if n < 1:
        raise ConfigError(f"n is {n}; ask for at least one picture.")
    uniforms_UnL = torch.stack([torch.rand(n, length, generator=torch.Generator().manual_seed(s)) for s in seeds])
    points = _Points(uniforms_UnL, spread=settings.spread)
    plain, free = settings.guidance == 1.0, settings.guidance == 0.0
    branches = []
    if not free:
        branches.append(_Branch(generator, prompts, n, length))
    if not plain:
        branches.append(_Branch(generator, prompts.unconditional(generator.prompts.pad_id), n, length))
    codes = torch.empty(users, n, length, dtype=torch.long)
    logits = [branch.first_logits() for branch in branches]
    for t in range(length):
        mixed = logits[0] if len(logits) == 1 else logits[1] + settings.guidance * (logits[0] - logits[1])
        codes[:, :, t] = _draw(mixed.float(), points, settings)
        if t + 1 < length:
            x_UnD = generator.embed_codes(codes[:, :, t])
            logits = [branch.step(x_UnD) for branch in branches]
    return codes


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
        self.alike_Unn = torch.ones(u, n, n, dtype=torch.bool) if spread else None

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
        self.t += 1
        return codes_Un


def _draw(logits_UnK: Tensor, points: _Points, settings: SamplerSettings) -> Tensor:
    """One code a sample."""
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


class _Branch:
    """The state of one set of prompts: prompt keys and values a user, own keys and values a sample."""

    def __init__(self, generator: JanusGenerator, prompts: Prompts, n: int, length: int) -> None:
        janus = generator.model.model
        self.head, self.lm, self.n = janus.generation_head, janus.language_model, n
        config = self.lm.config
        cache = DynamicCache(config=config)
        x_UPD = generator.embed_prompt(prompts)
        hidden = self.lm(
            inputs_embeds=x_UPD,
            attention_mask=_prefix_bias(prompts.mask_UP, x_UPD.dtype),
            position_ids=prompts.position_UP,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        self.first_UD = hidden[:, -1]
        self.prompt_kv: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr,misc]
        self.bias_UP = torch.zeros(prompts.mask_UP.shape, dtype=x_UPD.dtype).masked_fill(
            ~prompts.mask_UP, float("-inf")
        )
        self.next_position_U = prompts.position_UP[:, -1] + 1
        kv_heads, d = config.num_key_value_heads, config.head_dim
        shape = (x_UPD.shape[0], n, kv_heads, length - 1, d)
        self.own_kv = [(x_UPD.new_empty(shape), x_UPD.new_empty(shape)) for _ in self.prompt_kv]
        self.t = 0

    def first_logits(self) -> Tensor:
        """Logits of the first code: the same for all samples of a user, ``[U, n, K]``."""
        return self.head(self.first_UD)[:, None].expand(-1, self.n, -1)

    def step(self, x_UnD: Tensor) -> Tensor:
        """Feed the embedding of the code just drawn; logits ``[U, n, K]`` of the next."""
        cos, sin = self.lm.rotary_emb(x_UnD, self.next_position_U[:, None])
        cos, sin = cos[:, :, None], sin[:, :, None]
        self.t += 1
        for layer, (pk, pv), (ok, ov) in zip(self.lm.layers, self.prompt_kv, self.own_kv, strict=True):
            attention = layer.self_attn
            h = layer.input_layernorm(x_UnD)
            d = attention.head_dim
            q = _rotate(attention.q_proj(h).unflatten(-1, (-1, d)), cos, sin)
            ok[:, :, :, self.t - 1] = _rotate(attention.k_proj(h).unflatten(-1, (-1, d)), cos, sin)
            ov[:, :, :, self.t - 1] = attention.v_proj(h).unflatten(-1, (-1, d))
            mixed = shared_prefix_attention(q, pk, pv, self.bias_UP, ok[:, :, :, : self.t], ov[:, :, :, : self.t])
            x_UnD = x_UnD + attention.o_proj(mixed.flatten(-2))
            x_UnD = x_UnD + layer.mlp(layer.post_attention_layernorm(x_UnD))
        self.next_position_U = self.next_position_U + 1
        return self.head(self.lm.norm(x_UnD))


def _rotate(x_UnHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in transformers' half-split form; cos and sin ``[U, 1, 1, d]``."""
    half = x_UnHd.shape[-1] // 2
    swapped = torch.cat([-x_UnHd[..., half:], x_UnHd[..., :half]], -1)
    return x_UnHd * cos + swapped * sin


def _prefix_bias(mask_UP: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal attention bias ``[U, 1, P, P]``; padding sees itself only."""
    p = mask_UP.shape[1]
    eye = torch.eye(p, dtype=torch.bool)
    keep = (torch.ones(p, p, dtype=torch.bool).tril()[None] & mask_UP[:, None]) | eye[None]
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)[:, None]
