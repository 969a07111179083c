"""What a person prefers, from a few pairs of pictures, and the way it enters a diffusion transformer (PPD).

Personalised preference fine-tuning (Dang et al., arXiv 2501.06655): four pairs (preferred, not preferred) of a person
give an embedding, a short list of tokens; every cross-attention of the denoiser attends to the history and, apart
from it, to these tokens, and adds the two: out = Attn(q, K_history) + Attn(q, K_user). Values of the second start at
zero, so the first output is the base model's. The paper reads pairs with a vision-language model; here the frozen
understanding features of the pictures go through a small set encoder, which is ours.

Legend: U users, P pairs, F understanding features, E user tokens, W width, B pictures in a batch, T their tokens,
S condition tokens, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from couturier.components.generator.types import PreferenceConfig


class PairReader(nn.Module):
    """Pairs of a person → user embedding ``[U, E, W]``, the same for the pairs in any order.

    A person without any pair gets zeros, which the decoupled attention turns into no change at all.

    Args:
        features: F.

    Example:
        >>> reader = PairReader(8, PreferenceConfig(tokens=2, width=4, heads=1))
        >>> pictures_UPF = torch.ones(1, 3, 8)
        >>> tuple(reader(pictures_UPF, -pictures_UPF, torch.tensor([[True, True, False]])).shape)
        (1, 2, 4)
    """

    def __init__(self, features: int, config: PreferenceConfig) -> None:
        super().__init__()
        w = config.width
        self.norm = nn.LayerNorm(features)
        self.contrast = nn.Linear(features, w)
        self.pair = nn.Sequential(nn.Linear(3 * features, 2 * w), nn.GELU(), nn.Linear(2 * w, w))
        self.asks_EW = nn.Parameter(torch.randn(config.tokens, w))
        self.gather = nn.MultiheadAttention(w, config.heads, batch_first=True)
        self.out = nn.Sequential(nn.LayerNorm(w), nn.Linear(w, 2 * w), nn.GELU(), nn.Linear(2 * w, w))

    def forward(self, preferred_UPF: Tensor, other_UPF: Tensor, real_UP: Tensor) -> Tensor:
        """``real_UP`` is False where there is no pair."""
        good, bad = self.norm(preferred_UPF), self.norm(other_UPF)
        # What sets the two apart goes straight through: a preference can turn round without anything being learned.
        pair_UPW = self.contrast(good - bad) + self.pair(torch.cat([good, bad, good - bad], -1))
        none_U = ~real_UP.any(1)
        # Where nothing is real everything is let through, so that no softmax is empty; the zeros below undo it.
        hidden_UP = ~(real_UP | none_U[:, None])
        asks_UEW = self.asks_EW.expand(len(pair_UPW), -1, -1)
        found_UEW, _ = self.gather(asks_UEW, pair_UPW, pair_UPW, key_padding_mask=hidden_UP, need_weights=False)
        users_UEW = found_UEW + self.out(found_UEW)
        return users_UEW.masked_fill(none_U[:, None, None], 0.0)


class DecoupledAttention(nn.Module):
    """A processor for diffusers' ``Attention``: cross-attention to the history plus cross-attention to user tokens.

    The user tokens come as ``ip_hidden_states``, the name under which diffusers' own decoupled attentions take theirs
    (IP-Adapter, Ye et al., arXiv 2308.06721); without them this is plain cross-attention.

    Args:
        inner: width of the attention's queries;  user: width of a user token.
    """

    def __init__(self, inner: int, user: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(user)
        self.to_k = nn.Linear(user, inner, bias=False)
        self.to_v = nn.Linear(user, inner, bias=False)
        nn.init.zeros_(self.to_v.weight)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
    ) -> Tensor:
        """``[B, T, inner]`` queries and ``[B, S, inner]`` condition → ``[B, T, inner]``."""
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        bias = None if attention_mask is None else attention_mask.view(len(q), -1, 1, attention_mask.shape[-1])
        mixed = _attend(q, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states), bias)
        if ip_hidden_states is not None:
            known = ip_hidden_states.abs().amax((1, 2), keepdim=True) > 0
            users = self.norm(ip_hidden_states)
            mixed = mixed + _attend(q, self.to_k(users), self.to_v(users) * known, None)
        return attn.to_out[0](mixed)


def _attend(q_BHTd: Tensor, k_BSX: Tensor, v_BSX: Tensor, bias: Tensor | None) -> Tensor:
    heads = q_BHTd.shape[1]
    k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (k_BSX, v_BSX))
    return F.scaled_dot_product_attention(q_BHTd, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
