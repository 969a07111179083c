"""What a denoiser knows by heart: the rows of codes that pictures of the catalogue are made of.

A noisy picture is one of these rows, or a new one whose places are drawn one by one. Each of these explanations has a
Gaussian density, a share of its own and, once the person is known, a liking: their posterior names codes at every
place. With no liking this is the exact denoiser of the catalogue (the "optimal denoiser" of Karras et al.,
arXiv 2206.00364, appendix B.3, over rows in place of pixels), so that a tiny transformer need not learn by heart how
sixteen places go together, and spends itself on who wants what. A generator that looks up a part of what it draws is
semi-parametric (Blattmann et al., arXiv 2204.11824); that explanations are weighed by a liking, and that what is new
is one of them, is ours.

Legend: N pictures, L codes a picture, K codebook entries, D code width, M rows, I items, U users, K favourites (of
histories), F understanding features, Q liking width, H = M + 1 explanations, the last of which is "something new".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 256
_NEW = 0.002
"""Share of something new before anything is learned: small, or a row that a coarse step has blurred passes for it."""


class Gallery(nn.Module):
    """Rows of codes with their shares, and keys by which a person's liking finds them.

    Args:
        codes_IL: codes of the catalogue's pictures.
        item_M: an item that has each row.
        features_IF: understanding features of the catalogue.
        codebook_KD: standardised code vectors.
        width: Q.
        history: favourites that are looked at.
    """

    codes_IL: Tensor
    codes_ML: Tensor
    item_M: Tensor
    row_I: Tensor
    features_MF: Tensor
    vectors_ME: Tensor
    square_ML: Tensor

    def __init__(
        self, codes_IL: Tensor, item_M: Tensor, features_IF: Tensor, codebook_KD: Tensor, *, width: int, history: int
    ) -> None:
        super().__init__()
        vectors_MLD = codebook_KD[codes_IL[item_M]]
        self.register_buffer("codes_IL", codes_IL, persistent=False)
        self.register_buffer("codes_ML", codes_IL[item_M], persistent=False)
        self.register_buffer("item_M", item_M, persistent=False)
        self.register_buffer("row_I", self.find(codes_IL), persistent=False)
        self.register_buffer("features_MF", features_IF[item_M], persistent=False)
        self.register_buffer("vectors_ME", vectors_MLD.flatten(1), persistent=False)
        self.register_buffer("square_ML", vectors_MLD.square().sum(-1), persistent=False)
        self.share_M = nn.Parameter(torch.full((len(item_M),), -math.log(len(item_M))))
        self.new = nn.Parameter(torch.tensor(math.log(_NEW / (1 - _NEW))))
        self.key = nn.Sequential(nn.LayerNorm(features_IF.shape[1]), nn.Linear(features_IF.shape[1], width))
        self.own_MQ = nn.Parameter(torch.zeros(len(item_M), width))
        self.again_S = nn.Parameter(torch.ones(history))

    @property
    def shares_H(self) -> Tensor:
        """Log of the explanations' shares, up to a constant: all there is to go by where there is nothing but noise."""
        return torch.cat([self.share_M, self.new[None]])

    def fit(self, x_NLD: Tensor, level_NL1: Tensor, alone_NLK: Tensor) -> Tensor:
        """Log of share times density of each explanation, up to a constant, ``[N, H]``.

        Args:
            x_NLD: noisy code vectors;  level_NL1: their share of noise.
            alone_NLK: log of share times density of each code at each place, looked at alone.
        """
        signal = 1 - level_NL1
        weight = 1 / level_NL1.square().clamp_min(1e-4)
        known_NM = (x_NLD * (signal * weight)).flatten(1) @ self.vectors_ME.T
        known_NM = known_NM - 0.5 * (signal.square() * weight)[..., 0] @ self.square_ML.T + self.share_M
        new_N1 = alone_NLK.logsumexp(-1).sum(1, keepdim=True) + self.new
        return torch.cat([known_NM, new_N1], 1)

    def liking(self, query_NQ: Tensor) -> Tensor:
        """Log odds ``[N, H]`` by which a query raises each row; something new stays as it is."""
        keys_MQ = self.key(self.features_MF) + self.own_MQ
        return F.pad(query_NQ @ keys_MQ.T, (0, 1))

    def again(self, items_UK: Tensor, real_UK: Tensor) -> Tensor:
        """Log odds ``[U, H]`` by which the favourites at each place of a history raise their own rows: what somebody
        has taken they take again."""
        rows_UK = self.row_I[items_UK.clamp_min(0)]
        raised_UK = self.again_S[: items_UK.shape[1]] * real_UK
        known = (rows_UK < len(self.share_M)).to(raised_UK.dtype)
        return raised_UK.new_zeros(len(items_UK), len(self.share_M) + 1).scatter_add(1, rows_UK, raised_UK * known)

    def codes(self, p_NH: Tensor, alone_NLK: Tensor) -> Tensor:
        """Probability of each code at each place ``[N, L, K]``, by the explanations' posterior ``p_NH``."""
        rows_MN = p_NH[:, :-1].T
        n, length, k = alone_NLK.shape
        places = [rows_MN.new_zeros(k, n).index_add_(0, self.codes_ML[:, at], rows_MN) for at in range(length)]
        return torch.stack(places).permute(2, 0, 1) + p_NH[:, -1, None, None] * alone_NLK.softmax(-1)

    def find(self, codes_NL: Tensor) -> Tensor:
        """The explanation of whole pictures, int64 ``[N]``: their row, or M where it is none of them."""
        parts = []
        for some_nL in codes_NL.split(_CHUNK):
            same_nM = (some_nL[:, None] == self.codes_ML).all(-1)
            parts.append(torch.where(same_nM.any(1), same_nM.int().argmax(1), same_nM.shape[1]))
        return torch.cat(parts)

    @torch.no_grad()
    def set_shares(self, weight_M: Tensor) -> None:
        """Begin with rows by ``weight_M``."""
        self.share_M.copy_((weight_M / weight_M.sum()).log())


def rows_of(codes_IL: Tensor, weight_I: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The ``most`` weightiest distinct rows of codes, weightiest first: an item of each ``[M]``, and what all that
    have it weigh ``[M]``.

    Example:
        >>> rows_of(torch.tensor([[1, 2], [3, 4], [1, 2]]), torch.tensor([1.0, 2.0, 3.0]), 9)
        (tensor([2, 1]), tensor([4., 2.]))
    """
    _, row_I = codes_IL.unique(dim=0, return_inverse=True)
    weight_M = torch.zeros(int(row_I.max()) + 1, dtype=weight_I.dtype).index_add_(0, row_I, weight_I)
    # Items by rising weight: the weightiest of each row is written last.
    order = weight_I.argsort(stable=True)
    item_M = torch.zeros(len(weight_M), dtype=torch.long)
    for item in order.tolist():
        item_M[row_I[item]] = item
    kept = weight_M.argsort(descending=True, stable=True)[:most]
    return item_M[kept], weight_M[kept]
