"""DIN's unit of the paper in PyTorch: one hidden layer with Dice, its score and what is pooled, in one function.

With ``w`` the scoring layer and ``c = w (1 - alpha)`` the score is ``h . (w alpha) + (h p) . c``, two products with a
vector: what Dice gives is never made. The hidden layer is made block by block of lists (``torch_mlp``) into one buffer,
where the statistics, ``p`` and the way back are a handful of passes over all pairs. README.md has the formulas.

Legend: U lists, N behaviours, R rows, P pairs, H width of queries and keys, E of values, F of the hidden layer;
inside a block G lists, C rows a list, L behaviours a list, Z = G L C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from couturier.kernels import dispatch
from couturier.kernels.jagged import Block, Places, blocks, pair_offsets
from couturier.kernels.target_attention import native
from couturier.kernels.target_attention.gate import DiceGate
from couturier.kernels.target_attention.torch_mlp import First, FirstGrads

# Numbers of the hidden layer in a block: they and what is made of them then stay in the cache.
_BLOCK = 1 << 18
# So many numbers of padding cost what one more block costs.
_SPARE = 1 << 15


def attend(
    first: First,
    keys_NH: Tensor,
    values_NE: Tensor,
    offsets: Tensor,
    row_user: Tensor,
    gate: DiceGate,
    last: tuple[Tensor, Tensor | None],
    scale: float,
    softmax: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Pooled values ``[R, E]`` and weights ``[P]`` of the unit whose hidden layer has Dice."""
    if not softmax and not want_weights and native.covers(first, keys_NH, values_NE, offsets, row_user, gate):
        return native.attend(first, keys_NH, offsets, gate, last), None
    out: tuple[Tensor, Tensor | None] = _Unit.apply(
        *vars(first).values(),
        keys_NH,
        values_NE,
        gate.alpha_F,
        *last,
        gate,
        offsets,
        row_user,
        scale,
        softmax,
        want_weights,
    )
    return out


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A block and where it lies among all."""

    block: Block
    at: int
    """Its first place."""
    real_Z: Tensor | None
    """1 for a pair and 0 for padding; None where nothing is padded."""

    @property
    def size(self) -> int:
        """Z."""
        return self.block.rows.index.numel() * self.block.behaviours.index.shape[1]

    def of(self, all_ZF: Tensor, start: int = 0) -> Tensor:
        """Its part of what is there for all pairs from place ``start`` on, ``[G, L, C F]``."""
        lists, length = self.block.behaviours.index.shape
        return all_ZF[self.at - start : self.at - start + self.size].view(lists, length, -1)


def _plan(offsets: Tensor, row_user: Tensor, hidden: int, dtype: torch.dtype) -> list[_Part]:
    lists = offsets.numel() - 1
    rows = row_user.numel() // max(1, lists)
    lengths_U = offsets.diff()
    even = torch.arange(lists, device=offsets.device).repeat_interleave(rows)
    if not offsets.is_cuda and rows and torch.equal(row_user, even):
        found = list(_even_blocks(offsets.numpy(), lengths_U.numpy(), rows, hidden))
    else:
        found = blocks(offsets, row_user, width=hidden, most=_BLOCK // 2, spare=_SPARE)
    parts: list[_Part] = []
    for block in found:
        at = parts[-1].at + parts[-1].size if parts else 0
        parts.append(_Part(block=block, at=at, real_Z=_real(block, dtype)))
    return parts


def _even_blocks(offsets: NDArray[np.int64], lengths_U: NDArray[np.int64], rows: int, hidden: int) -> Iterator[Block]:
    """As ``jagged.blocks`` where every list has as many rows, in order; several times as fast for small batches."""
    order = np.argsort(-lengths_U, kind="stable")
    lengths = lengths_U[order].tolist()
    live = int(np.count_nonzero(lengths_U))
    begin = 0
    while begin < live:
        longest, end, padding = lengths[begin], begin, 0
        most = max(1, _BLOCK // (longest * rows * hidden))
        while end < live and end - begin < most:
            padding += (longest - lengths[end]) * rows * hidden
            if padding > _SPARE:
                break
            end += 1
        yield _block(np.sort(order[begin:end]), offsets, lengths_U, rows, longest)
        begin = end


def _block(
    users_G: NDArray[np.int64], offsets: NDArray[np.int64], lengths_U: NDArray[np.int64], rows: int, longest: int
) -> Block:
    place_L, lengths_G1 = np.arange(longest), lengths_U[users_G][:, None]
    behaviours_GL = offsets[users_G][:, None] + np.minimum(place_L, lengths_G1 - 1)
    padded = int(lengths_G1.min()) < longest
    run = not padded and int(users_G[-1] - users_G[0]) == len(users_G) - 1
    rows_GC = users_G[:, None] * rows + np.arange(rows)
    return Block(
        rows=Places(index=torch.from_numpy(rows_GC), pad=None, start=int(rows_GC[0, 0]) if run else None),
        behaviours=Places(
            index=torch.from_numpy(behaviours_GL),
            pad=torch.from_numpy(place_L >= lengths_G1) if padded else None,
            start=int(behaviours_GL[0, 0]) if run else None,
        ),
    )


def _real(block: Block, dtype: torch.dtype) -> Tensor | None:
    lists, rows = block.rows.index.shape
    pads = (block.rows.pad, block.behaviours.pad)
    if pads[0] is None and pads[1] is None:
        return None
    real_GLC = torch.ones(lists, block.behaviours.index.shape[1], rows, dtype=dtype, device=block.rows.index.device)
    for pad, axis in zip(pads, (1, 2), strict=True):
        if pad is not None:
            real_GLC.masked_fill_(pad.unsqueeze(axis), 0.0)
    return real_GLC.view(-1)


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """What rows are normalised by: ``z = (h - mean) rate``."""

    mean_F: Tensor
    rate_F: Tensor
    pairs: int
    """How many pairs the statistics are of; 0 where they are the running ones, through which no gradient goes."""


class _Unit(torch.autograd.Function):
    """The whole attention unit."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_RH: Tensor,
        from_query_RF: Tensor,
        from_key_FH: Tensor,
        product_FH: Tensor,
        keys_NH: Tensor,
        values_NE: Tensor,
        alpha_F: Tensor,
        weight_1F: Tensor,
        bias_1: Tensor | None,
        gate: DiceGate,
        offsets: Tensor,
        row_user: Tensor,
        scale: float,
        softmax: bool,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        first = First(
            queries_RH=queries_RH, from_query_RF=from_query_RF, from_key_FH=from_key_FH, product_FH=product_FH
        )
        starts = pair_offsets(offsets, row_user)
        learns = gate.training and int(starts[-1]) > 1
        pooled_RE = values_NE.new_zeros(row_user.numel(), values_NE.shape[1])
        weight_P = values_NE.new_zeros(int(starts[-1])) if want_weights else None
        plan = _plan(offsets, row_user, first.hidden, keys_NH.dtype)
        kept: list[Tensor] = []
        # Statistics need all pairs at once; without, a block is forgotten before the next.
        for parts in [plan] if learns or any(ctx.needs_input_grad) else [[part] for part in plan]:
            keys = [part.block.behaviours.take(keys_NH) for part in parts]
            hidden_ZF = _hidden(first, parts, keys)
            norm = _norm(gate, parts, hidden_ZF, int(starts[-1]) if learns else 0)
            score_Z, p_ZF = _scores(norm, hidden_ZF, alpha_F, weight_1F[0], bias_1, scale)
            weights = [_weights(part, score_Z, parts[0].at, softmax) for part in parts]
            for part, keys_GLH, weight_GCL in zip(parts, keys, weights, strict=True):
                values = keys_GLH if keys_NH is values_NE else part.block.behaviours.take(values_NE)
                part.block.rows.put(pooled_RE, torch.bmm(weight_GCL, values))
                if weight_P is not None:
                    part.block.pairs(starts).put(weight_P, weight_GCL)
            if any(ctx.needs_input_grad):
                kept, ctx.norm = [hidden_ZF, p_ZF, *keys, *weights], norm
        ctx.save_for_backward(*vars(first).values(), keys_NH, values_NE, alpha_F, weight_1F, bias_1, *kept)
        ctx.plan, ctx.starts, ctx.scale, ctx.softmax, ctx.one = plan, starts, scale, softmax, keys_NH is values_NE
        ctx.set_materialize_grads(False)
        return pooled_RE, weight_P

    @staticmethod
    @once_differentiable
    @dispatch.outside_autocast
    def backward(ctx: Any, grad_RE: Tensor | None, grad_P: Tensor | None) -> tuple[Tensor | None, ...]:
        *own, keys_NH, values_NE, alpha_F, weight_1F, bias_1 = ctx.saved_tensors[:9]
        kept, plan = ctx.saved_tensors[9:], ctx.plan
        d_k, d_v = torch.zeros_like(keys_NH), None if ctx.one else torch.zeros_like(values_NE)
        if not plan:
            return (*(torch.zeros_like(one) for one in own), d_k, d_v, *(None for _ in range(9)))
        hidden_ZF, p_ZF, *boxes = kept
        keys, weights = boxes[: len(plan)], boxes[len(plan) :]
        d_score_Z, d_keys = hidden_ZF.new_empty(len(hidden_ZF)), []
        for part, keys_GLH, weight_GCL in zip(plan, keys, weights, strict=True):
            behaviours, d_weight, d_values = part.block.behaviours, torch.zeros_like(weight_GCL), None
            if grad_RE is not None:
                g = part.block.rows.without_padding(part.block.rows.take(grad_RE))
                d_values = torch.bmm(weight_GCL.transpose(1, 2), g)
                values = keys_GLH if ctx.one else behaviours.take(values_NE)
                d_weight = torch.bmm(g, values.transpose(1, 2))
            if grad_P is not None:
                places = part.block.pairs(ctx.starts)
                d_weight = d_weight + places.without_padding(places.take(grad_P))
            if d_v is not None and d_values is not None:
                behaviours.add(d_v, d_values)
            # Where the values are the keys, one box takes both gradients.
            d_keys.append(d_values if ctx.one and d_values is not None else torch.zeros_like(keys_GLH))
            _score_grads(part, weight_GCL, d_weight, ctx.softmax, d_score_Z)
        d_score_Z *= ctx.scale
        d_hidden_ZF, d_alpha_F, d_weight_F = _through(ctx.norm, plan, hidden_ZF, p_ZF, alpha_F, weight_1F[0], d_score_Z)
        grads = FirstGrads(First(**dict(zip(First.__dataclass_fields__, own, strict=True))))
        for part, keys_GLH, d_keys_GLH in zip(plan, keys, d_keys, strict=True):
            grads.add(part.block.rows, keys_GLH, d_keys_GLH, part.of(d_hidden_ZF))
            part.block.behaviours.add(d_k, d_keys_GLH)
        firsts = (grads.queries_RH, grads.from_query_RF, grads.from_key_FH, grads.product_FH)
        d_bias = None if bias_1 is None else d_score_Z.sum().reshape(1)
        return (*firsts, d_k, d_v, d_alpha_F, d_weight_F[None], d_bias, *(None for _ in range(6)))


def _hidden(first: First, parts: Sequence[_Part], keys: Sequence[Tensor]) -> Tensor:
    """The hidden layer before its activation, ``[Z, F]``, one block after another."""
    hidden_ZF = first.queries_RH.new_empty(sum(part.size for part in parts), first.hidden)
    at = parts[0].at if parts else 0
    for part, keys_GLH in zip(parts, keys, strict=True):
        first.out(part.block.rows, keys_GLH, part.of(hidden_ZF, at))
    return hidden_ZF


def _scores(
    norm: _Norm, hidden_ZF: Tensor, alpha_F: Tensor, weight_F: Tensor, bias_1: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Scores ``[Z]`` and ``p`` ``[Z, F]``."""
    p_ZF = torch.addcmul(-norm.mean_F * norm.rate_F, hidden_ZF, norm.rate_F).sigmoid_()
    score_Z = torch.mv(hidden_ZF, weight_F * alpha_F).addmv_(hidden_ZF * p_ZF, weight_F * (1 - alpha_F))
    return (score_Z if bias_1 is None else score_Z.add_(bias_1)).mul_(scale), p_ZF


def _weights(part: _Part, score_Z: Tensor, start: int, softmax: bool) -> Tensor:
    """``[G, C, L]``, zeros where there is padding."""
    score_GCL = part.of(score_Z[:, None], start).transpose(1, 2)
    pad = part.block.behaviours.pad
    if pad is not None:
        score_GCL = score_GCL.masked_fill(pad[:, None], float("-inf") if softmax else 0.0)
    return score_GCL.softmax(-1) if softmax else score_GCL.contiguous()


def _score_grads(part: _Part, weight_GCL: Tensor, d_weight_GCL: Tensor, softmax: bool, out_Z: Tensor) -> None:
    """The gradient of a block's scores, into its places of ``out_Z``."""
    d_GCL = d_weight_GCL
    if softmax:
        d_GCL = weight_GCL * (d_GCL - (weight_GCL * d_GCL).sum(-1, keepdim=True))
    elif part.block.behaviours.pad is not None:
        d_GCL = d_GCL.masked_fill(part.block.behaviours.pad[:, None], 0.0)
    part.of(out_Z[:, None]).copy_(d_GCL.transpose(1, 2))


def _through(
    norm: _Norm, plan: Sequence[_Part], h_ZF: Tensor, p_ZF: Tensor, alpha_F: Tensor, weight_F: Tensor, d_Z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From the scores' gradient to those of ``h``, of alpha and of the scoring layer."""
    plain_F, gated_F = weight_F * alpha_F, weight_F * (1 - alpha_F)
    both_ZF = h_ZF * p_ZF
    slope_ZF = torch.addcmul(both_ZF, both_ZF, p_ZF, value=-1)  # h p (1 - p)
    of_h_F, of_both_F = torch.mv(h_ZF.T, d_Z), torch.mv(both_ZF.T, d_Z)
    if norm.pairs:
        slope_F = torch.mv(slope_ZF.T, d_Z)
        of_mean_F = gated_F * slope_F / norm.pairs
        along_F = torch.mv(torch.mul(slope_ZF, h_ZF, out=both_ZF).T, d_Z)
        of_rate_F = gated_F * norm.rate_F * (along_F - norm.mean_F * slope_F) / norm.pairs
    d_ZF = torch.addcmul(plain_F, p_ZF, gated_F, out=both_ZF)
    d_ZF.addcmul_(slope_ZF, norm.rate_F * gated_F).mul_(d_Z[:, None])
    if norm.pairs:
        bend_F = norm.rate_F.square() * of_rate_F
        d_ZF.addcmul_(h_ZF, bend_F, value=-1).add_(bend_F * norm.mean_F - norm.rate_F * of_mean_F)
        for part in plan:
            if part.real_Z is not None:
                d_ZF[part.at : part.at + part.size].mul_(part.real_Z[:, None])
    return d_ZF, weight_F * (of_h_F - of_both_F), alpha_F * of_h_F + (1 - alpha_F) * of_both_F


def _norm(gate: DiceGate, plan: Sequence[_Part], hidden_ZF: Tensor, pairs: int) -> _Norm:
    """What to normalise by: the statistics of ``pairs`` pairs, which move the running ones, or with 0 those."""
    if not pairs:
        rate_F = (gate.var_F + gate.eps).rsqrt()
        return _Norm(mean_F=gate.mean_F.to(rate_F), rate_F=rate_F, pairs=0)
    padded = any(part.real_Z is not None for part in plan)
    ones = [hidden_ZF.new_ones(part.size) if part.real_Z is None else part.real_Z for part in plan] if padded else []
    real_Z = torch.cat(ones) if padded else hidden_ZF.new_ones(len(hidden_ZF))
    mean_F = torch.mv(hidden_ZF.T, real_Z) / pairs
    # By distances from the mean: the mean of squares less the square of the mean loses digits where a mean is large.
    squares_F = torch.mv((hidden_ZF - mean_F).square_().T, real_Z)
    gate.moved(mean_F, squares_F, pairs)
    return _Norm(mean_F=mean_F, rate_F=(squares_F / pairs + gate.eps).rsqrt(), pairs=pairs)
