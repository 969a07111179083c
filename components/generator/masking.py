"""Which tokens of a history and of a reference picture count for each other: Pigeon's mutual mask generator.

    codes of the history's pictures ─┐                                     ┌─▶ what the model reads of each picture
                                     ├─▶ one encoder layer over all ─▶ a ──┤
    codes of the reference picture ──┘      (both attend to both)          └─▶ which codes of the reference survive

Pigeon (Xu et al., arXiv 2410.14170; formulas from its released code, generation.md 2.4). A code's relevance is the
cosine between its embedding and what the encoder makes of it beside all others; a softmax turns relevance into
probabilities, and the top ones are kept, with Gumbel noise in training. The kept ones are *multiplied* by a
straight-through value (1 or 0 forward, the softmax's gradient backward). In the released code the decision only indexes
integers, so nothing ever reaches the generator; here it learns.

Legend: U rows, N tokens of a row, D width, K history pictures, L codes a picture, T tokens the model reads a picture.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from couturier.components.errors import ConfigError
from couturier.components.runtime import seeded

HISTORY, REFERENCE = 0, 1


class MaskGenerator(nn.Module):
    """Relevance of every code of a history and a reference to the whole of both.

    Args:
        width: D, of the code embeddings.
        codes: L, codes a picture.
        heads: of the encoder layer; the published number is 4.
        dropout: of the encoder's input and output, only where a generator for it is given.
    """

    place_LD: Tensor

    def __init__(self, width: int, codes: int, *, heads: int = 4, dropout: float = 0.2) -> None:
        super().__init__()
        self.codes, self.dropout = codes, dropout
        self.register_buffer("place_LD", sinusoids(codes, width), persistent=False)
        self.kind = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width)
        self.encoder = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(
        self, history_UKLD: Tensor, reference_ULD: Tensor, real_UK: Tensor, random: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Relevance of the history's codes ``[U, K, L]`` and of the reference's ``[U, L]``, each in [-1, 1].

        Args:
            history_UKLD, reference_ULD: embeddings of the codes.
            real_UK: False where there is no picture.
            random: for dropout; None: no dropout.
        """
        u, k, length, _ = history_UKLD.shape
        tokens_UND = torch.cat([history_UKLD.flatten(1, 2), reference_ULD], 1)
        kind_N = torch.tensor([HISTORY] * (k * length) + [REFERENCE] * length, device=tokens_UND.device)
        x_UND = tokens_UND + self.place_LD.repeat(k + 1, 1) + self.kind(kind_N)
        x_UND = _drop(self.norm(x_UND), self.dropout, random)
        hidden_UN = torch.cat([~real_UK.repeat_interleave(length, 1), real_UK.new_zeros(u, length)], 1)
        x_UND = self.encoder(x_UND, src_key_padding_mask=hidden_UN)
        x_UND = _drop(torch.tanh(self.out(self.norm_out(x_UND))), self.dropout, random)
        a_UN = F.cosine_similarity(tokens_UND, x_UND, dim=-1)
        return a_UN[:, : k * length].view(u, k, length), a_UN[:, k * length :]


class ReferenceAdapter(nn.Module):
    """The surviving codes of a reference picture → one vector in the prompt: their mean, then an MLP.

    Pigeon lets its tokenizer's decoder look at the surviving codes before the mean. Codes here have no such decoder,
    and a mean of bare embeddings would not know which code was where, so each is multiplied by the signs of its place
    first (binding as in holographic reduced representations, Plate 1995; ours). Adding places instead gives all
    pictures nearly the same vector: at width 128 a model then learned nothing of its references.

    Args:
        width: D.
        codes: L.
        hidden: between the two layers.
    """

    sign_LD: Tensor

    def __init__(self, width: int, codes: int, hidden: int) -> None:
        super().__init__()
        random = seeded(0, "signs of places")
        sign_LD = torch.randint(2, (codes, width), generator=random).float() * 2 - 1
        self.register_buffer("sign_LD", sign_LD, persistent=False)
        self.norm, self.into, self.out = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in (self.into, self.out):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, reference_ULD: Tensor, keep_UL: Tensor) -> Tensor:
        """``[U, D]``; ``keep_UL`` are straight-through values."""
        bound_UD = (reference_ULD * self.sign_LD * keep_UL[..., None]).sum(1) / keep_UL.detach().sum(1, keepdim=True)
        return torch.tanh(self.out(F.gelu(self.into(self.norm(bound_UD)))))


def kept(tokens: int, ratio: float) -> int:
    """How many of ``tokens`` survive a mask ratio: ``max(1, int(tokens * (1 - ratio)))``.

    Example:
        >>> [kept(16, ratio) for ratio in (0.0, 0.2, 0.5, 1.0)]
        [16, 12, 8, 1]
    """
    return max(1, int(tokens * (1 - ratio)))


def log_keep(relevance_UN: Tensor, real_UN: Tensor, *, hide_related: bool) -> Tensor:
    """Log of the keep probability: p = softmax(relevance) over real tokens, or 1 - p where the related ones are hidden.

    Example:
        >>> related = torch.tensor([[1.0, 0.0]])
        >>> log_keep(related, torch.ones(1, 2, dtype=torch.bool), hide_related=True).argmax().item()
        1
    """
    p_UN = relevance_UN.masked_fill(~real_UN, torch.finfo(relevance_UN.dtype).min).softmax(-1)
    return (1 - p_UN if hide_related else p_UN).clamp_min(1e-6).log()


def keep(log_p_UN: Tensor, real_UN: Tensor, ratio_U: Tensor, random: torch.Generator | None = None) -> Tensor:
    """Straight-through values ``[U, N]``: 1 for the top tokens of each row, 0 for the others; the gradient is that of
    the softmax (Gumbel top-k: Kool et al., arXiv 1903.06059; straight-through: Bengio et al., arXiv 1308.3432).

    Args:
        log_p_UN: of :func:`log_keep`.
        real_UN: padding is never kept.
        ratio_U: mask ratio of each row, float64 (a rounded ratio would keep one token less).
        random: for Gumbel noise; None keeps the likeliest.

    Example:
        >>> likely, real = torch.tensor([[0.1, 0.9, 0.5, 0.7]]).log(), torch.ones(1, 4, dtype=torch.bool)
        >>> keep(likely, real, torch.tensor([0.5]))
        tensor([[0., 1., 0., 1.]])
    """
    scores_UN = log_p_UN
    if random is not None:
        uniform_UN = torch.rand(log_p_UN.shape, generator=random).clamp(1e-9, 1 - 1e-7).to(log_p_UN)
        scores_UN = scores_UN - (-uniform_UN.log()).log()
    scores_UN = scores_UN.masked_fill(~real_UN, torch.finfo(scores_UN.dtype).min)
    pairs = zip(real_UN.sum(1).tolist(), ratio_U.tolist(), strict=True)
    count_U = torch.tensor([kept(n, ratio) for n, ratio in pairs], device=real_UN.device)
    rank_UN = scores_UN.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    hard_UN = ((rank_UN < count_U[:, None]) & real_UN).to(scores_UN)
    soft_UN = scores_UN.softmax(-1)
    return hard_UN + (soft_UN - soft_UN.detach())


def gather_codes(p_UKL: Tensor, tokens: int) -> Tensor:
    """Probabilities of codes → of the tokens that the model reads of a picture ``[U, K, T]``: each token stands for
    the square of codes that lies where it does.

    Raises:
        ConfigError: the grid of codes is not a whole number of times as fine as that of tokens.

    Example:
        >>> gather_codes(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]), 1)
        tensor([[[1.]]])
    """
    length = p_UKL.shape[-1]
    fine, coarse = math.isqrt(length), math.isqrt(tokens)
    if fine**2 != length or coarse**2 != tokens or fine % coarse:
        raise ConfigError(
            f"a picture has {length} codes and is read as {tokens} tokens; masking needs square grids, the one of "
            "codes a whole number of times as fine. Choose tokenise.codec.size or sft.generator.base so that they are."
        )
    each = fine // coarse
    return p_UKL.unflatten(-1, (coarse, each, coarse, each)).sum((-3, -1)).flatten(-2)


def sinusoids(places: int, width: int) -> Tensor:
    """Sinusoidal places ``[places, width]`` (Vaswani et al., arXiv 1706.03762, section 3.5)."""
    rate = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)
    angle = torch.arange(places)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


def _drop(x: Tensor, share: float, random: torch.Generator | None) -> Tensor:
    """Dropout from a generator of ours, whose state is in every checkpoint; torch's own draws from a global one."""
    if random is None or share == 0:
        return x
    return x * (torch.rand(x.shape, generator=random) >= share).to(x) / (1 - share)
