"""Target attention on a GPU with Triton: what goes in and out of the kernels of ``triton_mlp`` and ``triton_dot``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn.functional import linear

from couturier.kernels.target_attention.triton_dot import DotAttention
from couturier.kernels.target_attention.triton_mlp import MlpAttention


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
    """As the reference, for two sigmoid layers; ``activations`` is None (what is not covered does not come here)."""
    (whole, b1), (w2, b2), (w3, b3) = layers
    wq, wk, wd, wp = whole.chunk(4, 1)
    from_query_RF, from_key_NF = linear(queries_RH, wq + wd, b1), keys_NH @ (wk - wd).T
    tensors = (queries_RH, keys_NH, values_NE, from_query_RF, from_key_NF, wp, w2)
    last = (w2.new_zeros(w2.shape[0]) if b2 is None else b2, w3[0], w3.new_zeros(1) if b3 is None else b3)
    out: tuple[Tensor, Tensor | None] = MlpAttention.apply(
        *(one.contiguous() for one in (*tensors, *last)), offsets, row_user, softmax, want_weights
    )
    return out


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
    """As the reference."""
    out: tuple[Tensor, Tensor | None] = DotAttention.apply(
        queries_RH.contiguous(),
        keys_NH.contiguous(),
        values_NE.contiguous(),
        None if behaviour_bias_N is None else behaviour_bias_N.contiguous(),
        None if pair_bias_P is None else pair_bias_P.contiguous(),
        offsets,
        row_user,
        scale,
        want_weights,
    )
    return out
