"""Target attention by its definition: a loop over rows, any float dtype. Slow; the specification for the others.

Legend: U users (lists), N behaviours, R rows (candidates), P pairs, H width of queries and keys, E width of values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from couturier.kernels.jagged import pairs


def mlp(
    queries_RH: Tensor,
    keys_NH: Tensor,
    offsets: Tensor,
    row_user: Tensor,
    values_NE: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None]],
    activations: Sequence[Callable[[Tensor], Tensor]] | None,
    softmax: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Pooled values ``[R, E]`` and weights ``[P]`` (None when not wanted) of DIN's scorer.

    The network sees ``[q, k, q - k, q * k]``.
    """
    row_P, behaviour_P = pairs(offsets, row_user)
    q, k = queries_RH[row_P], keys_NH[behaviour_P]
    x = torch.cat([q, k, q - k, q * k], 1)
    for number, (weight, bias) in enumerate(layers):
        x = x @ weight.T if bias is None else x @ weight.T + bias
        if number < len(layers) - 1:
            x = torch.sigmoid(x) if activations is None else activations[number](x)
    score_P = x[:, 0] / queries_RH.shape[1] ** 0.5 if softmax else x[:, 0]
    return _pool(score_P, offsets, row_user, values_NE, softmax, want_weights)


def dot(
    queries_RH: Tensor,
    keys_NH: Tensor,
    offsets: Tensor,
    row_user: Tensor,
    values_NE: Tensor,
    behaviour_bias_N: Tensor | None,
    pair_bias_P: Tensor | None,
    scale: float,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Pooled values ``[R, E]`` and weights ``[P]`` of the dot scorer: softmax(scale q . k + biases)."""
    row_P, behaviour_P = pairs(offsets, row_user)
    score_P = (queries_RH[row_P] * keys_NH[behaviour_P]).sum(1) * scale
    if behaviour_bias_N is not None:
        score_P = score_P + behaviour_bias_N[behaviour_P]
    if pair_bias_P is not None:
        score_P = score_P + pair_bias_P
    return _pool(score_P, offsets, row_user, values_NE, True, want_weights)


def _pool(
    score_P: Tensor, offsets: Tensor, row_user: Tensor, values_NE: Tensor, softmax: bool, want_weights: bool
) -> tuple[Tensor, Tensor | None]:
    pooled, weights = [values_NE[:0]], [score_P[:0]]
    at = 0
    for user in row_user.tolist():
        values = values_NE[offsets[user] : offsets[user + 1]]
        score = score_P[at : at + len(values)]
        at += len(values)
        weights.append(score.softmax(0) if softmax else score)
        pooled.append((weights[-1] @ values)[None])
    return torch.cat(pooled), torch.cat(weights) if want_weights else None
