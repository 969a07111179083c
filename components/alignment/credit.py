"""Credit inside a picture: which codes of a picture that earned much the policy gradient should stress.

Attention shows a rhythm ("Attention Illuminates LLM Reasoning", arXiv 2510.13554): a code that looks far back, after
and before codes that look near, begins a new part (*preplan*); a code that many later ones look back at carries the
whole (*anchor*). Their advantage counts more:

    codes ─▶ one pass of the policy, no gradient ─▶ q, k of middle layers ─▶ WAAD, span, FAI of each head, no maps
                                                                                   │
    advantage of each code ◀─ times gamma where the picture earned ◀─ picked codes ◀┘ local, global heads by their span

WAAD_t, over local heads, is how far code t looks back (at most ``window``); FAI_s, over global heads, is how much the
codes ``near`` to ``far`` later look at code s (:mod:`couturier.kernels.attention_stats`). The paper's text was not at
hand: the rules are those of a reader's card of it. Ours, where the card is silent: heads are sorted for each picture
alone, so that no picture's credit depends on its batch; thresholds are a picture's medians; distances follow the
picture's side (the paper's are for words); and a code that several anchors point at gets the parts of all of them, so
that moving credit back makes none.

What was seen here (2026-11-22, one core): the looks cost as much as one forward pass of the policy over the same
pictures. In a model taught that most late codes repeat one early code, changing the code of the highest FAI changes
what follows more than changing that of the lowest in 88 % of cases (the paper: 87 %). On the demo's fine-tuned pictures
of 16 codes, which their first two codes all but decide, only in 56 % (59 % after RL); and thirty steps of GRPO from
there told nothing: the reward with anchors less that with the control ("random") was +.020, +.076, -.115 and +.058 by
seed, so plain GRPO stays the default.

Legend: U users, n pictures a user, L codes a picture, N = U n, P prompt tokens, T = P + n L, H heads, G key heads,
M heads of all layers looked at, d width of a head.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel, apply_rotary_pos_emb

from couturier.components.errors import ConfigError
from couturier.components.generator.language import LanguageGenerator
from couturier.components.generator.prompt import Prompts
from couturier.kernels.attention_stats import AttentionStats, attention_stats

Kind = Literal["uniform", "preplan", "anchor", "coupled", "random"]

# Keys of the pictures of some users, with the prompt's copied to each picture: bytes held at one time.
_KEY_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """How a picture's advantage is shared out over its codes."""

    kind: Kind = "uniform"
    """"uniform": plain GRPO. "preplan": codes where the distance looked back jumps. "anchor": codes that later ones
    look back at. "coupled": anchors, but one that is told by the codes just before it gives a part of its bonus to the
    code that began them. "random": as many codes, anywhere; the control to beat."""
    gamma: float = 1.5
    """What a picked code's advantage is multiplied with (the paper's 1.5)."""
    share: float = 0.4
    """Of a picture's codes that are picked (the paper's 40 %)."""
    heads: float = 0.3
    """Share of all heads that count as local, and as global (the paper's 30 %)."""
    layers: int = 5
    """How many layers of the middle third are looked at (the paper's 5; all there are, if fewer)."""
    window: int = 0
    """Codes; who looks further back counts as this. 0: the picture's side + 2, just beyond the codes that touch in the
    picture, which is the paper's 10 where a picture is 8 x 8 codes."""
    near: int = 0
    """Codes from a code to the first later one whose look counts. 0: as ``window`` (the paper's 10), but at most half
    the picture."""
    far: int = 0
    """Codes to the last one whose look counts. 0: five times ``near`` (the paper's 50)."""
    reach: int = 3
    """Coupled: how many codes back the one is sought that began an anchor (the paper's 1 to 3)."""
    moved: float = 0.5
    """Coupled: share of the bonus that goes back (not given in the paper; 0.5 is third-party code's)."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value} (wanted {wanted})"
            for name, value, wanted, fits in (
                ("gamma", self.gamma, "above 0", self.gamma > 0),
                ("share", self.share, "above 0, at most 1", 0 < self.share <= 1),
                ("heads", self.heads, "above 0, at most 0.5", 0 < self.heads <= 0.5),
                ("layers", self.layers, "1 or more", self.layers >= 1),
                ("reach", self.reach, "1 or more", self.reach >= 1),
                ("moved", self.moved, "0 to 1", 0 <= self.moved <= 1),
                ("window", self.window, "0 or more", self.window >= 0),
                ("near", self.near, "0 or more", self.near >= 0),
                ("far", self.far, "0, or at least near", self.far == 0 or self.far >= self.near),
            )
            if not fits
        ]
        if wrong:
            raise ConfigError(f"credit: {'; '.join(wrong)}. Leave the defaults, which are the paper's.")

    @property
    def looks(self) -> bool:
        """Whether it takes a pass of the policy over what was drawn."""
        return self.kind not in ("uniform", "random")

    def distances(self, length: int) -> tuple[int, int, int]:
        """Window, near and far for pictures of that many codes.

        Example:
            >>> CreditConfig().distances(64), CreditConfig().distances(16), CreditConfig().distances(4)
            ((10, 10, 50), (6, 6, 30), (4, 2, 10))
        """
        window = self.window or math.isqrt(length - 1) + 3
        near = self.near or max(1, min(window, length // 2))
        return window, near, self.far or 5 * near


def credited(
    generator: LanguageGenerator, prompts: Prompts, codes_UnL: Tensor, advantage_Un: Tensor, config: CreditConfig
) -> tuple[Tensor, dict[str, float]]:
    """The advantage of each code, and figures about it.

    Only advantages above 0 are changed, after the paper: a picture that earned less than its group is pushed down
    evenly. Nothing here has a gradient.

    Args:
        generator: the policy.
        prompts: of the users;  codes_UnL: what was drawn for them;  advantage_Un: what it earned.

    Returns:
        ``[U, n, L]``, or ``advantage_Un`` itself where the kind is "uniform"; and ``credit_share``, the codes whose
        advantage changed, ``credit_weight``, the mean of all codes' weights before signs are looked at (1 + share
        (gamma - 1) where no pick is missing, coupled too), and ``credit_moved``, the share of anchors that gave back.
    """
    if config.kind == "uniform":
        return advantage_Un, {}
    if config.kind == "random":
        weight_UnL, moved = _anywhere(codes_UnL, config).to(advantage_Un), 0.0
    else:
        waad_UnL, influence_UnL = looks(generator, prompts, codes_UnL, config)
        weight_UnL, moved = weights(waad_UnL, influence_UnL, config)
    each_UnL = advantage_Un[..., None].expand_as(weight_UnL)
    out_UnL = torch.where(each_UnL > 0, each_UnL * weight_UnL.to(each_UnL), each_UnL)
    return out_UnL, {
        "credit_share": float((out_UnL != each_UnL).float().mean()),
        "credit_weight": float(weight_UnL.float().mean()),
        "credit_moved": moved,
    }


def weights(waad_L: Tensor, influence_L: Tensor, config: CreditConfig) -> tuple[Tensor, float]:
    """What each code's advantage is multiplied with, from WAAD and FAI ``[..., L]`` of its picture.

    ``gamma`` for picked codes, 1 for others. Preplan picks by ``D_t = |WAAD_t - WAAD_(t+1)|`` (0 for the last code),
    anchor and coupled by FAI; the ``share`` with the highest, the first of equals, none with 0. Coupled: anchor t with
    WAAD_t at most its picture's median, after a code u within ``reach`` whose D_u is at least the median, keeps
    ``1 - moved`` of its bonus; the u of the highest D gets the rest, so the sum over a picture stays.

    Returns:
        ``[..., L]``, and the share of anchors that gave a part away (0 unless coupled).

    Example:
        >>> waad, fai = torch.tensor([[1.0, 9, 1, 1, 1, 1, 1, 1]]), torch.tensor([[0.0, 0, 0, 0.9, 0, 0, 0, 0]])
        >>> weights(waad, fai, CreditConfig(kind="preplan", share=0.25))[0].tolist()
        [[1.5, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
        >>> weights(waad, fai, CreditConfig(kind="coupled"))
        (tensor([[1.2500, 1.0000, 1.0000, 1.2500, 1.0000, 1.0000, 1.0000, 1.0000]]), 1.0)
    """
    jump_L = F.pad((waad_L[..., :-1] - waad_L[..., 1:]).abs(), (0, 1))
    picked_L = _highest(jump_L if config.kind == "preplan" else influence_L, config.share)
    bonus_L, moved = picked_L.to(waad_L.dtype), 0.0
    if config.kind == "coupled":
        before_LK = F.pad(jump_L, (config.reach, 0), value=-1.0)[..., :-1].unfold(-1, config.reach, 1)
        most_L, place_L = before_LK.max(-1)
        dominated_L = (waad_L <= _median(waad_L)) & (most_L >= _median(jump_L)) & (most_L > 0)
        given_L = config.moved * (picked_L & dominated_L).to(waad_L.dtype)
        to_L = torch.arange(waad_L.shape[-1], device=waad_L.device) - config.reach + place_L
        bonus_L = (bonus_L - given_L).scatter_add(-1, to_L.clamp_min(0), given_L)
        moved = float((picked_L & dominated_L).sum() / picked_L.sum().clamp_min(1))
    return 1 + (config.gamma - 1) * bonus_L, moved


@torch.no_grad()
def looks(
    generator: LanguageGenerator, prompts: Prompts, codes_UnL: Tensor, config: CreditConfig
) -> tuple[Tensor, Tensor]:
    """WAAD over local heads and FAI over global ones, of each code: two ``[U, n, L]``, float32.

    One pass of the policy over prompts and codes, in which the queries and keys of a few middle layers are kept. Heads
    are sorted by the mean distance that a picture's codes look back: the lowest ``heads`` of all are local, the highest
    global.
    """
    u, n, length = codes_UnL.shape
    if any(generator.embed_mark(at) is not None for at in range(length)):
        raise ConfigError(
            f"rl.credit.kind is {config.kind!r}, which looks at a picture's codes alone; this family reads marks "
            "between its rows. Set rl.credit.kind=uniform."
        )
    lm = generator.lm
    # Teacher forcing leaves the last code out, since nothing follows; here it is looked at too.
    middle = middle_layers(len(generator.layers), config.layers)
    rows_of = queries_and_keys(lm, middle, lambda: generator.logits(prompts, F.pad(codes_UnL, (0, 1))))
    start_U = prompts.ids_UP.shape[1] - prompts.mask_UP.sum(1)
    found = [_stats(q, k, start_U, (n, length), config.distances(length)) for q, k in rows_of]
    span_NM = torch.cat([one.span_BHR.mean(-1) for one in found], 1)
    count = max(1, round(config.heads * span_NM.shape[1]))
    order_NM = span_NM.argsort(dim=1, stable=True)
    waad_NML = torch.cat([one.waad_BHR for one in found], 1)
    influence_NML = torch.cat([one.influence_BHS for one in found], 1)
    waad_NL, influence_NL = _mean_of(waad_NML, order_NM[:, :count]), _mean_of(influence_NML, order_NM[:, -count:])
    return waad_NL.float().view(u, n, length), influence_NL.float().view(u, n, length)


def queries_and_keys(lm: nn.Module, layers: Sequence[int], run: Callable[[], object]) -> list[tuple[Tensor, Tensor]]:
    """Run something that calls the language model once, and return the queries and keys that attention had in some of
    its layers, positions rotated: ``[B, H, T, d]`` and ``[B, G, T, d]``."""
    kept: dict[str, Tensor | tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, out: Tensor) -> None:
            kept[name] = out

        return hook

    llama = cast(LlamaModel, lm)  # or one whose parts have the same names
    attentions = [cast(LlamaAttention, llama.layers[i].self_attn) for i in layers]
    watched: list[tuple[str, nn.Module]] = [("rotary", llama.rotary_emb)]
    for i, attention in enumerate(attentions):
        watched += [(f"q {i}", attention.q_proj), (f"k {i}", attention.k_proj)]
    hooks = [module.register_forward_hook(keep(name)) for name, module in watched]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    cos, sin = kept.pop("rotary")
    found = []
    for i, attention in enumerate(attentions):
        q, k = (
            cast(Tensor, kept[f"{name} {i}"]).detach().unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for name in "qk"
        )
        found.append(apply_rotary_pos_emb(q, k, cos, sin))
    return found


def middle_layers(count: int, wanted: int) -> list[int]:
    """Up to ``wanted`` evenly spaced layers from a third to two thirds of ``count``.

    Example:
        >>> middle_layers(24, 5), middle_layers(4, 5), middle_layers(1, 5)
        ([8, 10, 12, 14, 16], [1, 2], [0])
    """
    return sorted({int(count / 3 + i * count / 3 / max(1, wanted - 1)) for i in range(wanted)})


def _stats(
    q_UHTd: Tensor, k_UGTd: Tensor, start_U: Tensor, codes: tuple[int, int], distances: tuple[int, int, int]
) -> AttentionStats:
    """Statistics ``[N, H, L]`` of a packed batch's pictures: each reads the prompt and itself.

    Args:
        codes: n and L.
        distances: window, near and far.
    """
    (u, groups, t, d), (n, length), (window, near, far) = k_UGTd.shape, codes, distances
    p = t - n * length
    many = max(1, _KEY_BYTES // max(1, n * groups * (p + length) * d * k_UGTd.element_size()))
    found = []
    for low in range(0, u, many):
        some = slice(low, low + many)
        q, own = (x[some, :, p:].unflatten(2, (n, length)).transpose(1, 2).flatten(0, 1) for x in (q_UHTd, k_UGTd))
        prompt = k_UGTd[some, :, :p].repeat_interleave(n, 0)
        start = start_U[some].repeat_interleave(n).to(q.device)
        found.append(attention_stats(q, torch.cat([prompt, own], 2), start=start, window=window, near=near, far=far))
    waad, span, influence = (torch.cat(parts) for parts in zip(*found, strict=True))
    return AttentionStats(waad, span, influence[..., p:])


def _mean_of(x_NML: Tensor, heads_NK: Tensor) -> Tensor:
    return x_NML.gather(1, heads_NK[..., None].expand(-1, -1, x_NML.shape[2])).mean(1)


def _highest(score_L: Tensor, share: float) -> Tensor:
    """Bool ``[..., L]``: the share with the highest scores, the first of equals, none that has 0."""
    count = max(1, round(share * score_L.shape[-1]))
    first = score_L.argsort(dim=-1, descending=True, stable=True)[..., :count]
    picked = torch.zeros_like(score_L, dtype=torch.bool).scatter(-1, first, True)
    return picked & (score_L > 0)


def _anywhere(codes_UnL: Tensor, config: CreditConfig) -> Tensor:
    """Weights of the control. A group's own codes seed its draw: the same after a resume, and whoever else is there."""
    seeds = [zlib.crc32(group.tobytes()) for group in codes_UnL.cpu().numpy()]
    shape = codes_UnL.shape[1:]
    score_UnL = torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return 1 + (config.gamma - 1) * _highest(score_UnL + 1e-6, config.share).float()


def _median(x_L: Tensor) -> Tensor:
    return x_L.median(-1, keepdim=True).values
