"""Target attention in PyTorch without padding: the path of every CPU, and of what the Triton kernels do not cover.

Two steps, each with a backward of its own. *Scores* (DIN's network only) run over the flat list of pairs in pieces that
fit the cache, or, where lists are long enough, over blocks of lists (``torch_mlp``). *Attend* runs over nearly dense
blocks of lists of one length (:mod:`couturier.kernels.jagged`), where the dot scores, the softmax and the pooling are
batched matrix products.

Legend: U lists, N behaviours, R rows, P pairs, H width of queries and keys, E of values, F of a hidden layer; inside a
block G lists, C rows a list, L behaviours a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from couturier.kernels import dispatch
from couturier.kernels.jagged import Block, blocks, pair_offsets, pairs
from couturier.kernels.target_attention import torch_gate, torch_mlp
from couturier.kernels.target_attention.gate import DiceGate

# Pairs in one piece of the scorer: its activations (about 1 MB at H = 128) then stay in a core's cache, also when two
# threads share it.
_PIECE = 512
# Up to so many bytes the hidden activations are kept for the backward; beyond it they are computed again.
_KEEP_BYTES = 1 << 26


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
    """As the reference. Callables see all pairs at once; sigmoids (``activations`` None) never hold all pairs."""
    dtype = queries_RH.dtype
    queries_RH, keys_NH, values_NE = _wide(queries_RH), _wide(keys_NH), _wide(values_NE)
    layers = [(_wide(weight), None if bias is None else _wide(bias)) for weight, bias in layers]
    (whole, first_bias), *rest = layers
    wq, wk, wd, wp = whole.chunk(4, 1)
    # W1 [q, k, q - k, q * k] = (Wq + Wd) q + (Wk - Wd) k + Wp (q * k): one product a row, one a behaviour, one a pair.
    from_query_RF = linear(queries_RH, wq + wd, first_bias)
    if _folds(row_user.numel(), int(offsets.diff()[row_user].sum()), *wp.shape):
        first = torch_mlp.First(queries_RH=queries_RH, from_query_RF=from_query_RF, from_key_FH=wk - wd, product_FH=wp)
        if activations is None:
            scale = queries_RH.shape[1] ** -0.5 if softmax else 1.0
            found = torch_mlp.attend(first, keys_NH, values_NE, offsets, row_user, rest, scale, softmax, want_weights)
            return _narrow(found, dtype)
        gate = activations[0]
        if isinstance(gate, DiceGate) and len(rest) == 1 and dtype == queries_RH.dtype:
            scale = queries_RH.shape[1] ** -0.5 if softmax else 1.0
            return torch_gate.attend(
                first, keys_NH, values_NE, offsets, row_user, gate, rest[0], scale, softmax, want_weights
            )
        x = torch_mlp.first_layer(first, keys_NH, offsets, row_user)
    else:
        x = _a_pair(
            queries_RH, keys_NH, from_query_RF, wk - wd, wp, offsets, row_user, rest if activations is None else ()
        )
    if activations is not None:
        for activation, (weight, bias) in zip(activations, rest, strict=True):
            x = linear(_wide(activation(x.to(dtype))), weight, bias)
    score_P = x[:, 0]
    if softmax:
        score_P = score_P / queries_RH.shape[1] ** 0.5
    out = _Attend.apply(None, None, values_NE, None, score_P, offsets, row_user, 1.0, softmax, want_weights)
    return _narrow(out, dtype)


def _folds(rows: int, pairs: int, hidden: int, width: int) -> bool:
    """Whether a matrix a row is cheaper than gathering and scattering a pair: by the numbers that either touches."""
    return 3 * rows * hidden * width <= 2 * pairs * (2 * width + hidden)


def _a_pair(
    queries_RH: Tensor,
    keys_NH: Tensor,
    from_query_RF: Tensor,
    from_key_FH: Tensor,
    product_FH: Tensor,
    offsets: Tensor,
    row_user: Tensor,
    rest: Sequence[tuple[Tensor, Tensor | None]],
) -> Tensor:
    """One product a row, one a behaviour and one a pair: the first layer ``[P, F]``; with ``rest`` the scores."""
    row_P, behaviour_P = pairs(offsets, row_user)
    # With about one row a list the part of the key goes into the product a pair: one wider product is faster.
    alone = row_P.numel() <= 1.5 * keys_NH.shape[0]
    from_key_NF, first = (
        (None, torch.cat([product_FH, from_key_FH], 1)) if alone else (keys_NH @ from_key_FH.T, product_FH)
    )
    out: Tensor = _Network.apply(
        queries_RH,
        keys_NH,
        from_query_RF,
        from_key_NF,
        first,
        row_P,
        behaviour_P,
        *(one for two in rest for one in two),
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
    dtype = queries_RH.dtype
    out = _Attend.apply(
        _wide(queries_RH),
        _wide(keys_NH),
        _wide(values_NE),
        None if behaviour_bias_N is None else _wide(behaviour_bias_N),
        None if pair_bias_P is None else _wide(pair_bias_P),
        offsets,
        row_user,
        scale,
        True,
        want_weights,
    )
    return _narrow(out, dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _narrow(out: tuple[Tensor, Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return out[0].to(dtype), None if out[1] is None else out[1].to(dtype)


class _Network(torch.autograd.Function):
    """The first layer of every pair before its activation, ``[P, F]``; with more layers, the scores ``[P, 1]`` of the
    sigmoid network. The first layer is ``from_query + from_key + W [q * k]``, or, without ``from_key``,
    ``from_query + W [q * k, k]``."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_RH: Tensor,
        keys_NH: Tensor,
        from_query_RF: Tensor,
        from_key_NF: Tensor | None,
        first: Tensor,
        row_P: Tensor,
        behaviour_P: Tensor,
        *rest: Tensor | None,
    ) -> Tensor:
        out = queries_RH.new_empty(row_P.numel(), 1 if rest else first.shape[0])
        a_pair = sum(first.shape) + sum(one.shape[0] for one in rest[:-2:2] if one is not None)
        keep = row_P.numel() * a_pair * out.element_size() <= _KEEP_BYTES and any(ctx.needs_input_grad)
        ctx.kept = [] if keep else None
        for piece in _pieces(row_P.numel()):
            row, behaviour = row_P[piece], behaviour_P[piece]
            x, _ = _inputs(queries_RH, keys_NH, row, behaviour, from_key_NF is None)
            hiddens = _hiddens(x, row, behaviour, from_query_RF, from_key_NF, first, rest)
            if rest:
                _linear(hiddens[-1], rest[-2], rest[-1], out=out[piece])
            else:
                out[piece] = hiddens.pop()
            if ctx.kept is not None:
                ctx.kept.append((x, hiddens))
        ctx.save_for_backward(queries_RH, keys_NH, from_query_RF, from_key_NF, first, row_P, behaviour_P, *rest)
        return out

    @staticmethod
    @once_differentiable
    @dispatch.outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries_RH, keys_NH, from_query_RF, from_key_NF, first, row_P, behaviour_P, *rest = ctx.saved_tensors
        d_q, d_k, d_fq, d_first = (torch.zeros_like(one) for one in (queries_RH, keys_NH, from_query_RF, first))
        d_fk = None if from_key_NF is None else torch.zeros_like(from_key_NF)
        d_rest = [None if one is None else torch.zeros_like(one) for one in rest]
        width = keys_NH.shape[1]
        for number, piece in enumerate(_pieces(row_P.numel())):
            row, behaviour = row_P[piece], behaviour_P[piece]
            if ctx.kept is None:
                x, k = _inputs(queries_RH, keys_NH, row, behaviour, from_key_NF is None)
                hiddens = _hiddens(x, row, behaviour, from_query_RF, from_key_NF, first, rest) if rest else []
            else:
                x, hiddens = ctx.kept[number]
                k = x[:, width:] if from_key_NF is None else keys_NH.index_select(0, behaviour)
            d_out = grad[piece]
            for place in range(len(rest) - 2, -2, -2):
                hidden = hiddens[place // 2]
                d_weight, d_bias = d_rest[place], d_rest[place + 1]
                assert d_weight is not None
                d_weight.addmm_(d_out.T, hidden)
                if d_bias is not None:
                    d_bias += d_out.sum(0)
                d_out = torch.ops.aten.sigmoid_backward(d_out @ rest[place], hidden)
            d_first.addmm_(d_out.T, x)
            d_x = d_out @ first
            d_product = d_x[:, :width]
            d_fq.index_add_(0, row, d_out)
            d_q.index_add_(0, row, k * d_product)
            q = queries_RH.index_select(0, row).mul_(d_product)
            if d_fk is None:
                q.add_(d_x[:, width:])
            else:
                d_fk.index_add_(0, behaviour, d_out)
            d_k.index_add_(0, behaviour, q)
        return (d_q, d_k, d_fq, d_fk, d_first, None, None, *d_rest)


def _pieces(total: int) -> Iterator[slice]:
    return (slice(at, min(at + _PIECE, total)) for at in range(0, total, _PIECE))


def _inputs(
    queries_RH: Tensor, keys_NH: Tensor, row: Tensor, behaviour: Tensor, with_key: bool
) -> tuple[Tensor, Tensor]:
    """What the first layer multiplies, ``q * k`` or ``[q * k, k]``, and k itself."""
    q, k = queries_RH.index_select(0, row), keys_NH.index_select(0, behaviour)
    return (torch.cat([q.mul_(k), k], 1), k) if with_key else (q.mul_(k), k)


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    assert weight is not None
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def _hiddens(
    x: Tensor,
    row: Tensor,
    behaviour: Tensor,
    from_query_RF: Tensor,
    from_key_NF: Tensor | None,
    first: Tensor,
    rest: Sequence[Tensor | None],
) -> list[Tensor]:
    """The activations of every hidden layer of one piece; with no more layers, the first one before its sigmoid."""
    out = [from_query_RF.index_select(0, row).addmm_(x, first.T)]
    if from_key_NF is not None:
        out[0] += from_key_NF.index_select(0, behaviour)
    if rest:
        out[0].sigmoid_()
    for place in range(0, len(rest) - 2, 2):
        out.append(_linear(out[-1], rest[place], rest[place + 1]).sigmoid_())
    return out


class _Attend(torch.autograd.Function):
    """Scores (given a pair, or scale q . k, plus biases), softmax if asked, and the weighted sum of the values."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_RH: Tensor | None,
        keys_NH: Tensor | None,
        values_NE: Tensor,
        behaviour_bias_N: Tensor | None,
        score_P: Tensor | None,
        offsets: Tensor,
        row_user: Tensor,
        scale: float,
        softmax: bool,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        starts = pair_offsets(offsets, row_user)
        width = values_NE.shape[1] + (0 if keys_NH is None else keys_NH.shape[1])
        plan = blocks(offsets, row_user, width=width)
        pooled_RE = values_NE.new_zeros(row_user.numel(), values_NE.shape[1])
        weight_P = values_NE.new_zeros(int(starts[-1])) if want_weights else None
        kept: list[Tensor] = []
        for block in plan:
            pair_places = block.pairs(starts) if want_weights or score_P is not None else None
            values = block.behaviours.take(values_NE)
            keys = values if keys_NH is values_NE else None if keys_NH is None else block.behaviours.take(keys_NH)
            weight = _scores(block, queries_RH, keys, behaviour_bias_N, scale)
            if score_P is not None and pair_places is not None:
                given = pair_places.take(score_P)
                weight = given.clone() if weight is None else weight.add_(given)
            assert weight is not None
            if block.behaviours.pad is not None:
                weight.masked_fill_(block.behaviours.pad[:, None], float("-inf") if softmax else 0.0)
            if softmax:
                weight = weight.softmax(-1)
            block.rows.put(pooled_RE, torch.bmm(weight, values))
            if weight_P is not None and pair_places is not None:
                pair_places.put(weight_P, weight)
            kept.append(weight)
        ctx.save_for_backward(queries_RH, keys_NH, values_NE, *kept)
        ctx.plan, ctx.starts, ctx.scale, ctx.softmax, ctx.one = plan, starts, scale, softmax, keys_NH is values_NE
        ctx.set_materialize_grads(False)
        return pooled_RE, weight_P

    @staticmethod
    @once_differentiable
    @dispatch.outside_autocast
    def backward(ctx: Any, grad_RE: Tensor | None, grad_P: Tensor | None) -> tuple[Tensor | None, ...]:
        queries_RH, keys_NH, values_NE, *kept = ctx.saved_tensors
        want_q, want_k, want_v, want_b, want_p, *_ = ctx.needs_input_grad
        d_q = torch.zeros_like(queries_RH) if want_q else None
        d_k = torch.zeros_like(keys_NH) if want_k else None
        # Where the values are the keys, one tensor takes both gradients.
        d_v = torch.zeros_like(values_NE) if want_v and not (ctx.one and want_k) else None
        d_b = values_NE.new_zeros(values_NE.shape[0]) if want_b else None
        d_p = values_NE.new_zeros(int(ctx.starts[-1])) if want_p else None
        for block, weight in zip(ctx.plan, kept, strict=True):
            values = block.behaviours.take(values_NE)
            d_weight, d_values = torch.zeros_like(weight), None
            if grad_RE is not None:
                g = block.rows.without_padding(block.rows.take(grad_RE))
                d_values = torch.bmm(weight.transpose(1, 2), g) if want_v else None
                d_weight = torch.bmm(g, values.transpose(1, 2))
            if grad_P is not None:
                pair_places = block.pairs(ctx.starts)
                d_weight = d_weight + pair_places.without_padding(pair_places.take(grad_P))
            d_score = weight * (d_weight - (weight * d_weight).sum(-1, keepdim=True)) if ctx.softmax else d_weight
            if d_p is not None:
                pair_places = block.pairs(ctx.starts)
                pair_places.add(d_p, pair_places.without_padding(d_score))
            if d_b is not None:
                block.behaviours.add(d_b, d_score.sum(1))
            if d_q is not None:
                keys = values if ctx.one else block.behaviours.take(keys_NH)
                block.rows.add(d_q, torch.bmm(d_score, keys).mul_(ctx.scale))
            if d_k is not None:
                d_keys = torch.bmm(d_score.transpose(1, 2), block.rows.take(queries_RH)).mul_(ctx.scale)
                if ctx.one and d_values is not None:
                    d_keys += d_values
                block.behaviours.add(d_k, d_keys)
            if d_v is not None and d_values is not None:
                block.behaviours.add(d_v, d_values)
        return d_q, d_k, d_v, d_b, d_p, None, None, None, None, None


def _scores(
    block: Block, queries_RH: Tensor | None, keys_GLH: Tensor | None, behaviour_bias_N: Tensor | None, scale: float
) -> Tensor | None:
    """scale q . k + the bias of the behaviour, ``[G, C, L]``; None when scores are given from outside."""
    if queries_RH is None or keys_GLH is None:
        return None
    score = torch.bmm(block.rows.take(queries_RH), keys_GLH.transpose(1, 2)).mul_(scale)
    return score if behaviour_bias_N is None else score.add_(block.behaviours.take(behaviour_bias_N)[:, None])
