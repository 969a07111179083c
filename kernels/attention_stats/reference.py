"""Statistics of attention by their definition, from the whole map. Slow and large; the specification for the others.

Legend: B sequences, H heads, G key heads, R rows (queries), S keys, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_map(
    q_BHRd: Tensor, k_BGSd: Tensor, lse_BHR: Tensor | None, start_B: Tensor | None, scale: float
) -> Tensor:
    """``A[b, h, r, s]``, 0 where a row does not see a key: float64 for float64, else float32."""
    wide = torch.promote_types(q_BHRd.dtype, torch.float32)
    k_BHSd = k_BGSd.to(wide).repeat_interleave(q_BHRd.shape[1] // k_BGSd.shape[1], 1)
    score = scale * torch.einsum("bhrd,bhsd->bhrs", q_BHRd.to(wide), k_BHSd)
    seen = apart(q_BHRd, k_BGSd) >= 0
    if start_B is not None:
        key = torch.arange(k_BGSd.shape[2], device=q_BHRd.device)
        seen = seen & (key >= start_B[:, None, None, None])
    score = score.masked_fill(~seen, float("-inf"))
    if lse_BHR is None:
        # A row that sees nothing looks at nothing.
        return score.softmax(-1).nan_to_num()
    return (score - lse_BHR[..., None].to(wide)).exp().masked_fill(~seen, 0)


def apart(q_BHRd: Tensor, k_BGSd: Tensor) -> Tensor:
    """Tokens from each key to each row, ``[R, S]``: negative where the key is later."""
    rows, keys = q_BHRd.shape[2], k_BGSd.shape[2]
    token = torch.arange(keys, device=q_BHRd.device)
    return token[keys - rows :, None] - token


def stats(
    q_BHRd: Tensor,
    k_BGSd: Tensor,
    lse_BHR: Tensor | None,
    start_B: Tensor | None,
    scale: float,
    window: int,
    near: int,
    far: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """WAAD ``[B, H, R]``, span ``[B, H, R]`` and influence ``[B, H, S]``."""
    map_BHRS = attention_map(q_BHRd, k_BGSd, lse_BHR, start_B, scale)
    apart_RS = apart(q_BHRd, k_BGSd)
    waad_BHR = (map_BHRS * apart_RS.clamp(0, window)).sum(-1)
    span_BHR = (map_BHRS * apart_RS.clamp_min(0)).sum(-1)
    later_RS = (apart_RS >= near) & (apart_RS <= far)
    influence_BHS = (map_BHRS * later_RS).sum(2) / later_RS.sum(0).clamp_min(1)
    return waad_BHR, span_BHR, influence_BHS
