"""Target attention: every candidate reads the history of its person, with weights that depend on the candidate.

One query a row over a jagged list of behaviours, several rows (candidates) a list. Two scorers: DIN's small network
(:func:`mlp_attention`; Zhou et al., arXiv 1706.06978) and the scaled dot product of TIN (2308.08487), DARE (2410.02604)
and MUSE (2512.07216) (:func:`dot_attention`). Neither pads the histories. ``README.md`` beside this file has the
derivation, the backward and the costs.

Legend: U people (lists), N behaviours of all people, R rows (candidates), C candidates a person in the dense form,
P pairs (a row and a behaviour of its list), H width of queries and keys, E width of values, F width of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast, overload

import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.checks import KernelError, check_axes, check_floats, check_offsets
from couturier.kernels.jagged import as_lists, pair_offsets, pairs, rows_of
from couturier.kernels.target_attention.gate import DiceGate

__all__ = ["DiceGate", "Layer", "Pooling", "as_lists", "dot_attention", "mlp_attention", "pair_offsets", "pairs"]

Layer = tuple[Tensor, Tensor | None]
Pooling = Literal["din_code", "din_paper"]


@overload
def mlp_attention(
    queries: Tensor,
    keys: Tensor,
    offsets: Tensor,
    layers: Sequence[Layer],
    *,
    row_user: Tensor | None = ...,
    values: Tensor | None = ...,
    activations: Sequence[Callable[[Tensor], Tensor]] | None = ...,
    pooling: Pooling = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...
@overload
def mlp_attention(
    queries: Tensor,
    keys: Tensor,
    offsets: Tensor,
    layers: Sequence[Layer],
    *,
    row_user: Tensor | None = ...,
    values: Tensor | None = ...,
    activations: Sequence[Callable[[Tensor], Tensor]] | None = ...,
    pooling: Pooling = ...,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def mlp_attention(
    queries: Tensor,
    keys: Tensor,
    offsets: Tensor,
    layers: Sequence[Layer],
    *,
    row_user: Tensor | None = None,
    values: Tensor | None = None,
    activations: Sequence[Callable[[Tensor], Tensor]] | None = None,
    pooling: Pooling = "din_code",
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """DIN's attention unit: a small network scores each (candidate, behaviour) pair, and the values are pooled.

    ``x = [q, k, q - k, q * k]``, hidden layers, one score ``s``. ``din_code`` (the released code) pools with
    ``softmax(s / sqrt(H))`` over the list; ``din_paper`` pools with ``s`` itself, so that strength adds up. The first
    layer is computed in split form, ``(Wq + Wd) q + (Wk - Wd) k + Wp (q * k)`` for ``W1 = [Wq | Wk | Wd | Wp]``: the
    same numbers without the four-fold input.

    Args:
        queries: ``[R, H]`` one row a candidate, or ``[U, C, H]`` with as many candidates for everyone.
        keys: ``[N, H]`` behaviours of all people, one after another.
        offsets: int64 ``[U + 1]``: person u has the behaviours ``[offsets[u], offsets[u + 1])``.
        layers: (weight ``[out, in]``, bias ``[out]`` or None) from the first, ``[F, 4 H]``, to the last, ``[1, F]``.
        row_user: int64 ``[R]``, the person of each row, in any order. None: row r is person r.
        values: ``[N, E]`` what is pooled; the keys when None.
        activations: one callable a hidden layer (PReLU, Dice), called once with all pairs ``[P, F]``, so that batch
            statistics are those of real pairs only; a lone :class:`DiceGate` has a fast path. None: the
            sigmoid of the released code, the fastest path.
        pooling: ``din_code`` or ``din_paper``.
        return_weights: also return the weight of every pair, ``[P]``, in the order of :func:`pairs`.

    Returns:
        ``[R, E]`` (``[U, C, E]`` for dense queries); zeros for an empty list. Differentiable (once) in every tensor.
        Under autocast all tensors take its dtype first, as in a matrix product.

    Raises:
        KernelError: shapes, offsets or settings that do not fit together.
        KernelTypeError: a wrong dtype, or dtypes that differ.
        BackendError: a backend was forced that cannot run this call.

    Example:
        >>> keys, offsets = torch.eye(4)[[0, 1, 1]], torch.tensor([0, 2, 3])
        >>> layers = [(torch.ones(2, 16), None), (torch.ones(1, 2), None)]
        >>> pooled, weights = mlp_attention(torch.eye(4)[:2], keys, offsets, layers, return_weights=True)
        >>> pooled.shape, [round(one, 3) for one in weights.tolist()]
        (torch.Size([2, 4]), [0.518, 0.482, 1.0])
    """
    if (dtype := dispatch.autocast_dtype(keys)) is not None:
        queries, keys, values = queries.to(dtype), keys.to(dtype), _to(values, dtype)
        layers = [(weight.to(dtype), _to(bias, dtype)) for weight, bias in layers]
    queries_RH, row_user, values, lead = _checked(queries, keys, offsets, row_user, values)
    _check_layers(layers, queries_RH, activations)
    if pooling not in ("din_code", "din_paper"):
        raise KernelError(f"pooling is {pooling!r}; wanted 'din_code' (softmax) or 'din_paper' (raw scores)")
    run = dispatch.implementation("target_attention", keys, uncovered=_uncovered_mlp(layers, activations, keys, values))
    with torch.autocast(keys.device.type, enabled=False):
        pooled_RE, weights_P = run.mlp(
            queries_RH, keys, offsets, row_user, values, layers, activations, pooling == "din_code", return_weights
        )
    pooled = cast(Tensor, pooled_RE).view(*lead, values.shape[1])
    return (pooled, weights_P) if return_weights else pooled


@overload
def dot_attention(
    queries: Tensor,
    keys: Tensor,
    offsets: Tensor,
    *,
    row_user: Tensor | None = ...,
    values: Tensor | None = ...,
    behaviour_bias: Tensor | None = ...,
    pair_bias: Tensor | None = ...,
    scale: float | None = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...
@overload
def dot_attention(
    queries: Tensor,
    keys: Tensor,
    offsets: Tensor,
    *,
    row_user: Tensor | None = ...,
    values: Tensor | None = ...,
    behaviour_bias: Tensor | None = ...,
    pair_bias: Tensor | None = ...,
    scale: float | None = ...,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def dot_attention(
    queries: Tensor,
    keys: Tensor,
    offsets: Tensor,
    *,
    row_user: Tensor | None = None,
    values: Tensor | None = None,
    behaviour_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    scale: float | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product target attention: ``softmax_j(scale q . k_j + bias) v_j`` over the person's list.

    Two score parts with scales of their own (DARE's semantic and time part) are one product over concatenated,
    pre-scaled vectors. What a search returned (MUSE, DARE) is attended over with :func:`as_lists`.

    Args:
        queries: ``[R, H]`` one row a candidate, or ``[U, C, H]`` with as many candidates for everyone.
        keys: ``[N, H]`` behaviours of all people, one after another.
        offsets: int64 ``[U + 1]``: person u has the behaviours ``[offsets[u], offsets[u + 1])``.
        row_user: int64 ``[R]``, the person of each row, in any order. None: row r is person r.
        values: ``[N, E]`` what is pooled; the keys when None.
        behaviour_bias: ``[N]`` added to the score of a behaviour for every row (age, for instance).
        pair_bias: ``[P]`` added to the score of a pair, in the order of :func:`pairs`.
        scale: of the product; ``H ** -0.5`` when None.
        return_weights: also return the weight of every pair, ``[P]``, in the order of :func:`pairs`.

    Returns:
        ``[R, E]`` (``[U, C, E]`` for dense queries); zeros for an empty list. Differentiable (once) in every tensor.
        Under autocast all tensors take its dtype first, as in a matrix product.

    Raises:
        KernelError: shapes, offsets or settings that do not fit together.
        KernelTypeError: a wrong dtype, or dtypes that differ.
        BackendError: a backend was forced that cannot run this call.

    Example:
        >>> keys, offsets = torch.eye(2)[[0, 1, 1]], torch.tensor([0, 2, 2, 3])
        >>> dot_attention(torch.tensor([[9.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), keys, offsets, scale=2.0)
        tensor([[1.0000e+00, 1.5230e-08],
                [0.0000e+00, 0.0000e+00],
                [0.0000e+00, 1.0000e+00]])
    """
    if (dtype := dispatch.autocast_dtype(keys)) is not None:
        queries, keys, values = queries.to(dtype), keys.to(dtype), _to(values, dtype)
        behaviour_bias, pair_bias = _to(behaviour_bias, dtype), _to(pair_bias, dtype)
    queries_RH, row_user, values, lead = _checked(queries, keys, offsets, row_user, values)
    check_floats(queries=queries, behaviour_bias=behaviour_bias, pair_bias=pair_bias)
    if behaviour_bias is not None:
        check_axes({"N": keys.shape[0]}, behaviour_bias=(behaviour_bias, "N"))
    if pair_bias is not None:
        check_axes({"P": int(offsets.diff()[row_user].sum())}, pair_bias=(pair_bias, "P"))
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    run = dispatch.implementation("target_attention", keys, uncovered=_uncovered_dot(keys, values))
    with torch.autocast(keys.device.type, enabled=False):
        pooled_RE, weights_P = run.dot(
            queries_RH, keys, offsets, row_user, values, behaviour_bias, pair_bias, scale, return_weights
        )
    pooled = cast(Tensor, pooled_RE).view(*lead, values.shape[1])
    return (pooled, weights_P) if return_weights else pooled


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _checked(
    queries: Tensor, keys: Tensor, offsets: Tensor, row_user: Tensor | None, values: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Queries as rows, the person of each, the values, and the leading shape of the answer."""
    values = keys if values is None else values
    check_floats(queries=queries, keys=keys, values=values)
    sizes = check_axes(keys=(keys, "N H"), values=(values, "N E"))
    users = check_offsets(offsets, sizes["N"])
    queries_RH, row_user, lead = rows_of(queries, row_user, {"U": users, "H": sizes["H"]})
    return queries_RH, row_user, values, lead


def _check_layers(
    layers: Sequence[Layer], queries_RH: Tensor, activations: Sequence[Callable[[Tensor], Tensor]] | None
) -> None:
    if len(layers) < 2:
        raise KernelError(f"layers has {len(layers)} entries; wanted a hidden layer and the scoring layer at least")
    if activations is not None and len(activations) != len(layers) - 1:
        raise KernelError(f"activations has {len(activations)} entries; wanted {len(layers) - 1}, one a hidden layer")
    wide = 4 * queries_RH.shape[1]
    for number, (weight, bias) in enumerate(layers):
        name = f"layers[{number}].weight"
        check_floats(queries=queries_RH, **{name: weight, f"layers[{number}].bias": bias})
        size = {"in": wide, **({"out": 1} if number == len(layers) - 1 else {})}
        wide = check_axes(size, **{name: (weight, "out in")})["out"]
        if bias is not None:
            check_axes({"out": wide}, **{f"layers[{number}].bias": (bias, "out")})


def _uncovered_mlp(
    layers: Sequence[Layer], activations: Sequence[Callable[[Tensor], Tensor]] | None, keys: Tensor, values: Tensor
) -> str | None:
    """Why the Triton kernel does not cover this call, or None."""
    if activations is not None:
        return "activations other than the sigmoid"
    if len(layers) != 3:
        return f"{len(layers) - 1} hidden layers (it has two)"
    hidden = (layers[0][0].shape[0], layers[1][0].shape[0])
    if hidden[0] > 128 or hidden[1] > 64:
        return f"hidden layers of {hidden[0]} and {hidden[1]} units (128 and 64 at most)"
    # In float32 the weights of wider keys do not fit the shared memory of a multiprocessor (resources_sm90.json).
    most = 64 if keys.dtype == torch.float32 else 128
    if max(keys.shape[1], values.shape[1]) > most:
        return f"{keys.dtype} of a width over {most}"
    return _uncovered_dot(keys, values)


def _uncovered_dot(keys: Tensor, values: Tensor) -> str | None:
    if max(keys.shape[1], values.shape[1]) > 128:
        return "widths over 128"
    return "float64" if keys.dtype == torch.float64 else None
