"""Attention of many samples over one shared prefix: one decoding step, without copying the prefix's keys and values.

When a model draws ``n`` samples for each of ``U`` users, all ``n`` read the same prompt. Keeping the prompt's keys and
values once a user, not once a sample, divides that memory and its traffic by ``n``. The softmax runs over the prompt
and the sample's own tokens together, so the result is ordinary causal attention.

Legend: U users, n samples a user, H heads, G key/value heads (H a multiple of G), P prompt tokens, T tokens a sample
has so far (the new one included), d width of a head. Cost: O(U n H (P + T) d) multiply-adds, O(U G P d) for the prompt.
Called by ``couturier.components.generator.sampler``.
"""

from __future__ import annotations

import torch
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


def shared_prefix_attention(
    q_UnHd: Tensor, pk_UGPd: Tensor, pv_UGPd: Tensor, bias_UP: Tensor, sk_UnGTd: Tensor, sv_UnGTd: Tensor
) -> Tensor:
    """As :func:`reference`, but the prompt is read once a user. ``bias_UP`` is 0 where a prompt token counts and -inf
    where it is padding, in the dtype of the queries."""
    users, n, heads, d = q_UnHd.shape
    kv = pk_UGPd.shape[1]
    rep = heads // kv
    q = (q_UnHd * d**-0.5).view(users, n, kv, rep, d)
    # The prompt: one matrix product a user and key head over all its samples' queries.
    q_flat = q.permute(0, 2, 1, 3, 4).reshape(users, kv, n * rep, d)
    over_prompt = q_flat @ pk_UGPd.transpose(2, 3) + bias_UP[:, None, None]
    # The sample's own few tokens.
    over_own = q @ sk_UnGTd.transpose(3, 4)
    over_own_flat = over_own.permute(0, 2, 1, 3, 4).reshape(users, kv, n * rep, -1)
    weights = torch.cat([over_prompt, over_own_flat], -1).softmax(-1)
    p = pk_UGPd.shape[2]
    from_prompt = (weights[..., :p] @ pv_UGPd).view(users, kv, n, rep, d)
    own_weights = weights[..., p:].view(users, kv, n, rep, -1).permute(0, 2, 1, 3, 4)
    from_own = own_weights @ sv_UnGTd
    return (from_prompt.permute(0, 2, 1, 3, 4) + from_own).reshape(users, n, heads, d)
