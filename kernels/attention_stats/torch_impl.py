"""Statistics of attention in PyTorch: blocks of rows whose scores stay in a core's cache, and no map.

A row's scores are complete in its block, so one softmax gives its weights. Far keys all count as ``window``: their
part of WAAD, and the span, are one thin product with the block. Only the band of the last ``window`` keys, and that
from ``near`` to ``far``, are weighted element by element.

Legend: B sequences, H heads, G key heads, E = H / G heads that share keys, R rows (queries), S keys, d width of a head,
N = B G; inside a block n of N, C rows, T keys that its last row sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores held at one time, unless one row of one sequence has more: 1 MB in float32.
_PIECE = 1 << 18


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
    """As the reference."""
    (b, heads, rows, d), (groups, keys) = q_BHRd.shape, k_BGSd.shape[1:3]
    wide = torch.promote_types(q_BHRd.dtype, torch.float32)
    n, share = b * groups, heads // groups
    q_NERd, k_NSd = q_BHRd.reshape(n, share, rows, d), k_BGSd.reshape(n, keys, d)
    lse_NER = None if lse_BHR is None else lse_BHR.reshape(n, share, rows).to(wide)
    start_N = None if start_B is None else start_B.repeat_interleave(groups)
    waad_NER = torch.zeros(n, share, rows, dtype=wide, device=q_BHRd.device)
    span_NER = torch.zeros_like(waad_NER)
    influence_NES = torch.zeros(n, share, keys, dtype=wide, device=q_BHRd.device)
    high, many = _block(n, share, rows, keys)
    for low in range(0, rows, high):
        some = slice(low, min(low + high, rows))
        weigh = _Weights(keys - rows + low, some.stop - low, window, near, far, q_BHRd.device, wide)
        for first in range(0, n, many):
            these = slice(first, first + many)
            score_nECT = _scores(q_NERd[these, :, some].to(wide) * scale, k_NSd[these, : weigh.end].to(wide))
            hidden_nT = None if start_N is None else weigh.token_T < start_N[these, None]
            lse_nEC = None if lse_NER is None else lse_NER[these, :, some]
            map_nECT = _softmax(score_nECT, weigh.later_CC, hidden_nT, lse_nEC)
            waad_NER[these, :, some], span_NER[these, :, some] = weigh.rows(map_nECT)
            weigh.columns(map_nECT, influence_NES[these])
    influence_NES /= _readers(rows, keys, near, far).to(q_BHRd.device)
    return waad_NER.view(b, heads, rows), span_NER.view(b, heads, rows), influence_NES.view(b, heads, keys)


def _block(n: int, share: int, rows: int, keys: int) -> tuple[int, int]:
    """Rows and sequences (with one key head each) of a block."""
    high = max(1, min(rows, _PIECE // max(1, share * keys)))
    # More rows than 64 only compute more scores that no row sees.
    high = min(high, 64)
    return high, max(1, min(n, _PIECE // max(1, share * keys * high)))


def _scores(q_nECd: Tensor, k_nTd: Tensor) -> Tensor:
    n, share, high, _ = q_nECd.shape
    return torch.bmm(q_nECd.flatten(1, 2), k_nTd.transpose(1, 2)).view(n, share, high, -1)


def _softmax(score_nECT: Tensor, later_CC: Tensor, hidden_nT: Tensor | None, lse_nEC: Tensor | None) -> Tensor:
    """Weights of what each row sees; rows that see nothing get zeros. Overwrites the scores."""
    # Only the block's own tokens can lie after one of its rows.
    score_nECT[..., -later_CC.shape[0] :].masked_fill_(later_CC, float("-inf"))
    if hidden_nT is not None:
        score_nECT.masked_fill_(hidden_nT[:, None, None], float("-inf"))
    map_nECT = score_nECT.softmax(-1) if lse_nEC is None else score_nECT.sub_(lse_nEC[..., None]).exp_()
    return map_nECT if hidden_nT is None else map_nECT.nan_to_num_()


def _readers(rows: int, keys: int, near: int, far: int) -> Tensor:
    """How many rows stand ``near`` to ``far`` tokens after each key, at least 1, ``[S]``."""
    token = torch.arange(keys)
    after, before = (token + far).clamp_max(keys - 1), (token + near).clamp_min(keys - rows)
    return (after - before + 1).clamp_min(1)


class _Weights:
    """What the weights of a block of rows are multiplied with."""

    def __init__(
        self, token: int, count: int, window: int, near: int, far: int, device: torch.device, wide: torch.dtype
    ) -> None:
        self.end = token + count
        self.token_T = torch.arange(self.end, device=device)
        row_C = self.token_T[token:]
        self.later_CC = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)
        # Distances from the block's first row: those of what counts are small, so nothing large cancels.
        self.band = max(0, token - window + 1)
        far_T = torch.full((self.end,), window, device=device).masked_fill(self.token_T >= self.band, 0)
        self.thin_T3 = torch.stack([token - self.token_T, torch.ones_like(far_T), far_T], 1).to(wide)
        self.since_C = (row_C - token).to(wide)
        self.near_CT = (row_C[:, None] - self.token_T[self.band :]).clamp(0, window).to(wide)
        self.columns_from, self.columns_to = max(0, token - far), self.end - near
        apart_CT = row_C[:, None] - self.token_T[self.columns_from : max(self.columns_from, self.columns_to)]
        self.read_CT = ((apart_CT >= near) & (apart_CT <= far)).to(wide)

    def rows(self, map_nECT: Tensor) -> tuple[Tensor, Tensor]:
        """WAAD and span of the block's rows, ``[n, E, C]``."""
        before_nEC, whole_nEC, far_nEC = (map_nECT @ self.thin_T3).unbind(-1)
        waad_nEC = far_nEC + (map_nECT[..., self.band :] * self.near_CT).sum(-1)
        return waad_nEC, before_nEC + whole_nEC * self.since_C

    def columns(self, map_nECT: Tensor, influence_nES: Tensor) -> None:
        """Add what the keys get from the block's rows."""
        if self.columns_to > self.columns_from:
            low, high = self.columns_from, self.columns_to
            influence_nES[..., low:high] += (map_nECT[..., low:high] * self.read_CT).sum(2)
