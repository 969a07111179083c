"""Attention of many samples over one shared prefix: decoding steps, without copying the prefix's keys and values, and
whole rows for training.

When a model draws ``n`` samples for each of ``U`` users, all ``n`` read the same prompt. Keeping the prompt's keys and
values once a user, not once a sample, divides that memory and its traffic by ``n``. The samples' own keys and values
lie behind the prompt's in the same row, step by step, ``n`` to a step; a bias says which belong to whom. So one step is
one ordinary attention of ``n`` queries a user over one row of keys, whatever library computes it, and its result is
ordinary causal attention for each sample.

The price is that a query also meets the keys of its ``n - 1`` mates, which weigh nothing: T (n - 1) multiply-adds
wasted beside P + T useful ones. That is cheap for a handful of samples and a long prompt; a caller with many samples
gives them in several rows.

Legend: U rows (users), n samples a row, H heads, G key/value heads (H a multiple of G), P prompt tokens, T tokens a
sample has so far (the new one included), S slots of a row, d width of a head. Cost of a step: O(U n H (P + n T) d)
multiply-adds, O(U G (P + n T) d) of memory traffic. Called by ``couturier.components.generator.decoding`` and, for
whole rows, ``couturier.components.generator.packed``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    q_UnHd: Tensor, pk_UGPd: Tensor, pv_UGPd: Tensor, mask_UP: Tensor, sk_UnGTd: Tensor, sv_UnGTd: Tensor
) -> Tensor:
    """The plain definition: copy the prompt to every sample and attend. Slow, for tests.

    Args:
        q_UnHd: queries of the newest token of each sample.
        pk_UGPd, pv_UGPd: the prompt's keys and values.
        mask_UP: True where a prompt token counts (False: padding).
        sk_UnGTd, sv_UnGTd: each sample's own keys and values, the newest token included.

    Returns:
        ``[U, n, H, d]``.
    """
    n, heads, d = q_UnHd.shape[1:]
    groups = heads // pk_UGPd.shape[1]
    k = torch.cat([pk_UGPd[:, None].expand(-1, n, -1, -1, -1), sk_UnGTd], 3).repeat_interleave(groups, 2)
    v = torch.cat([pv_UGPd[:, None].expand(-1, n, -1, -1, -1), sv_UnGTd], 3).repeat_interleave(groups, 2)
    scores = torch.einsum("unhd,unhsd->unhs", q_UnHd, k) * d**-0.5
    own = mask_UP.new_ones(mask_UP.shape[0], sk_UnGTd.shape[3])
    keep_US = torch.cat([mask_UP, own], 1)
    scores = scores.masked_fill(~keep_US[:, None, None], float("-inf"))
    return torch.einsum("unhs,unhsd->unhd", scores.softmax(-1), v)


def visible(mask_UP: Tensor, *, samples: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """Bias ``[U, n, S]`` over a row of slots: 0 at the prompt's tokens and at a sample's own, -inf elsewhere."""
    own_nTn = torch.eye(samples, dtype=torch.bool, device=mask_UP.device)[:, None].expand(-1, tokens, -1)
    own_UnS = own_nTn.flatten(1).expand(len(mask_UP), -1, -1)
    keep_UnS = torch.cat([mask_UP[:, None].expand(-1, samples, -1), own_UnS], 2)
    return torch.zeros(keep_UnS.shape, dtype=dtype, device=mask_UP.device).masked_fill_(~keep_UnS, float("-inf"))


def apart(row_UGSd: Tensor, *, prompt: int, samples: int) -> tuple[Tensor, Tensor]:
    """A row of slots as the prompt's ``[U, G, P, d]`` and the samples' own ``[U, n, G, T, d]``: views of it."""
    own = row_UGSd[:, :, prompt:].unflatten(2, (-1, samples))
    return row_UGSd[:, :, :prompt], own.permute(0, 3, 1, 2, 4)


class PrefixCache:
    """Keys and values of several layers, allocated once: slot ``P + t n + i`` holds token ``t`` of sample ``i``.

    Args:
        mask_UP: True where a prompt token counts.
        samples: n.
        tokens: the most a sample will have of its own.
        layers: of the model.
        heads: G.
        like: a tensor ``[d]`` whose dtype and device the keys and values get.
        all_at_once: attention will look at slots that are not filled yet, too.
    """

    def __init__(
        self,
        mask_UP: Tensor,
        *,
        samples: int,
        tokens: int,
        layers: int,
        heads: int,
        like: Tensor,
        all_at_once: bool = True,
    ) -> None:
        users, self.prompt = mask_UP.shape
        self.samples = samples
        self.bias_UnS = visible(mask_UP, samples=samples, tokens=tokens, dtype=like.dtype)
        shape = (layers, users, heads, self.bias_UnS.shape[2], len(like))
        # Zeros, not whatever was there: a slot not yet filled weighs nothing, but nothing times NaN would be NaN.
        make = like.new_zeros if all_at_once else like.new_empty
        self.k_lUGSd, self.v_lUGSd = make(shape), make(shape)

    def end(self, t: int) -> int:
        """How many slots are filled once every sample has ``t`` tokens."""
        return self.prompt + t * self.samples

    def follow(self, from_Un: Tensor, tokens: int) -> None:
        """Give each sample the first ``tokens`` keys and values of another of its row ``[U, n]``."""
        for kept in (self.k_lUGSd, self.v_lUGSd):
            own_lUGTnd = kept[:, :, :, self.prompt : self.end(tokens)].unflatten(3, (tokens, self.samples))
            at = from_Un[None, :, None, None, :, None].expand(own_lUGTnd.shape)
            own_lUGTnd.copy_(own_lUGTnd.gather(4, at))


def shared_prefix_attention(q_UnHd: Tensor, k_UGSd: Tensor, v_UGSd: Tensor, bias_UnS: Tensor) -> Tensor:
    """As :func:`reference` over one row of slots a user.

    Args:
        q_UnHd: queries of the newest token of each sample.
        k_UGSd, v_UGSd: prompt and samples in one row (:class:`PrefixCache`), or the filled beginning of it.
        bias_UnS: 0 where a sample may look, -inf elsewhere, in the dtype of the queries.

    Returns:
        ``[U, n, H, d]``.
    """
    users, n, heads, d = q_UnHd.shape
    kv = k_UGSd.shape[1]
    rep = heads // kv
    if rep == 1:
        # No copy on the way in nor, where the library lays its result out as the queries, on the way out.
        q_UHnd = q_UnHd.transpose(1, 2)
        return F.scaled_dot_product_attention(q_UHnd, k_UGSd, v_UGSd, attn_mask=bias_UnS[:, None]).transpose(1, 2)
    q_UGmd = q_UnHd.view(users, n, kv, rep, d).permute(0, 2, 3, 1, 4).reshape(users, kv, rep * n, d)
    bias_UmS = bias_UnS.repeat(1, rep, 1)
    out = F.scaled_dot_product_attention(q_UGmd, k_UGSd, v_UGSd, attn_mask=bias_UmS[:, None])
    return out.view(users, kv, rep, n, d).permute(0, 3, 1, 2, 4).reshape(users, n, heads, d)


def packed_attention(q_UQHd: Tensor, k_UWGd: Tensor, v_UWGd: Tensor, mask_UP: Tensor, *, samples: int) -> Tensor:
    """Attention over whole rows of a prompt and, behind it, ``n`` samples one after the other, with a gradient: the
    prompt looks at itself causally, a sample at the prompt and causally at itself. Padding sees itself only.

    A mask over the row would compute ``(P + n T)^2`` products; this does ``P^2 + n T (P + T)``.

    Args:
        q_UQHd: queries of the samples and, before them, of the prompt's last tokens: all, or as many as are wanted.
        k_UWGd, v_UWGd: of the prompt and the samples, W = P + n T tokens.
        mask_UP: True where a prompt token counts.
        samples: n.

    Returns:
        ``[U, Q, H, d]``.
    """
    p, device = mask_UP.shape[1], mask_UP.device
    own = (k_UWGd.shape[1] - p) // samples
    first = q_UQHd.shape[1] - samples * own
    rep = q_UQHd.shape[2] // k_UWGd.shape[2]
    k, v = ((x if rep == 1 else x.repeat_interleave(rep, 2)).transpose(1, 2) for x in (k_UWGd, v_UWGd))
    q = (q_UQHd * q_UQHd.shape[-1] ** -0.5).transpose(1, 2)
    own_q, own_k, own_v = (x[:, :, -samples * own :].unflatten(2, (samples, own)) for x in (q, k, v))
    causal_PP = torch.ones(p, p, dtype=torch.bool, device=device).tril()
    keep_UPP = (causal_PP & mask_UP[:, None]) | torch.eye(p, dtype=torch.bool, device=device)
    later_TT = torch.ones(own, own, dtype=torch.bool, device=device).triu(1)
    low = float("-inf")
    scores = q @ k[:, :, :p].transpose(-1, -2)
    prompt = scores[:, :, :first].masked_fill(~keep_UPP[:, None, p - first :], low).softmax(-1)
    onto_prompt = scores[:, :, first:].masked_fill(~mask_UP[:, None, None], low).unflatten(2, (samples, own))
    onto_own = (own_q @ own_k.transpose(-1, -2)).masked_fill(later_TT, low)
    weight = torch.cat([onto_prompt, onto_own], -1).softmax(-1)
    mixed = torch.cat([prompt, weight[..., :p].flatten(2, 3)], 2) @ v[:, :, :p]
    mixed_own = mixed[:, :, first:] + (weight[..., p:] @ own_v).flatten(2, 3)
    return torch.cat([mixed[:, :, :first], mixed_own], 2).transpose(1, 2)
