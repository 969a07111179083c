"""The unit of ``torch_gate`` compiled for this processor (``gate.c``), where there is a C compiler.

The compiler is asked when a call is large enough (:mod:`couturier.kernels.compiled`). Whether a call comes here hangs
on its sizes, the threads and the machine alone, so a resumed fit repeats to the bit. ``COUTURIER_KERNELS=torch`` keeps
everything in PyTorch.

Legend: U lists, N behaviours, R rows, P pairs, H width of queries, keys and values, F of the hidden layer, T threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from couturier.kernels import compiled, dispatch
from couturier.kernels.target_attention.gate import DiceGate
from couturier.kernels.target_attention.torch_mlp import First

# Numbers of the hidden layer from which on a call is worth a compiler.
_LEAST = 1 << 18
_LANES = 16


class _Sizes(ctypes.Structure):
    """``Unit`` of ``gate.c``."""

    _fields_ = [(name, ctypes.c_int64) for name in ("lists", "rows", "threads")] + [
        (name, ctypes.c_void_p) for name in ("offsets", "queries", "keys", "from_query", "from_key", "product")
    ]
    _fields_ += [(name, ctypes.c_void_p) for name in ("key_turned", "product_turned")]


def library(hidden: int, width: int) -> ctypes.CDLL | None:
    """The kernels for a shape, compiled now if they were not yet; None where that cannot be done."""
    return compiled.library("target_attention/gate.c", F=hidden, H=width)


def covers(first: First, keys_NH: Tensor, values_NE: Tensor, offsets: Tensor, row_user: Tensor, gate: DiceGate) -> bool:
    """Whether a call that pools with raw scores and wants no weights is one for the compiled kernels."""
    hidden, width = first.product_FH.shape
    lists = offsets.numel() - 1
    if dispatch.wish() != "auto" or keys_NH.device.type != "cpu" or keys_NH.dtype != torch.float32:
        return False
    if keys_NH is not values_NE or hidden % _LANES or width % _LANES or hidden > 128 or width > 64:
        return False
    if not gate.training or not torch.is_grad_enabled() or not lists or row_user.numel() % lists:
        return False
    rows = row_user.numel() // lists
    if keys_NH.shape[0] * rows * hidden < _LEAST or not torch.equal(row_user, _even(lists, rows)):
        return False
    return library(hidden, width) is not None


def _even(lists: int, rows: int) -> Tensor:
    return torch.arange(lists).repeat_interleave(rows)


def attend(
    first: First,
    keys_NH: Tensor,
    offsets: Tensor,
    gate: DiceGate,
    last: tuple[Tensor, Tensor | None],
) -> Tensor:
    """Pooled keys ``[R, H]`` of the unit in training, with raw scores."""
    weight_1F, bias_1 = last
    bias_1 = weight_1F.new_zeros(1) if bias_1 is None else bias_1
    tensors = (*vars(first).values(), keys_NH, gate.alpha_F, weight_1F, bias_1)
    pooled_RH: Tensor = _Unit.apply(*(one.contiguous() for one in tensors), offsets, gate)
    return pooled_RH


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
        alpha_F: Tensor,
        weight_1F: Tensor,
        bias_1: Tensor,
        offsets: Tensor,
        gate: DiceGate,
    ) -> Tensor:
        kernels = _Kernels(queries_RH, from_query_RF, from_key_FH, product_FH, keys_NH, offsets)
        pairs, threads, hidden = kernels.pairs, kernels.threads, len(product_FH)
        # Near the mean, so that the squares of the distances from it lose no digits.
        key_H = keys_NH.mean(0)
        shift_F = from_query_RF.mean(0) + from_key_FH @ key_H + product_FH @ (queries_RH.mean(0) * key_H)
        hidden_PF, sums_T2F = keys_NH.new_empty(pairs, hidden), keys_NH.new_empty(threads, 2, hidden)
        kernels.run("hidden", shift_F, hidden_PF, sums_T2F)
        away_F, squares_F = sums_T2F.sum(0)
        squares_F = (squares_F - away_F.square() / pairs).clamp_min_(0)
        mean_F, rate_F = shift_F + away_F / pairs, (squares_F / pairs + gate.eps).rsqrt()
        gate.moved(mean_F, squares_F, pairs)
        about_4F = torch.stack([mean_F, rate_F, weight_1F[0] * alpha_F, weight_1F[0] * (1 - alpha_F)])
        score_P, pooled_RH = keys_NH.new_empty(pairs), torch.empty_like(queries_RH)
        kernels.run("pooled", hidden_PF, about_4F, float(bias_1), 1.0, score_P, pooled_RH)
        ctx.save_for_backward(
            queries_RH,
            from_query_RF,
            from_key_FH,
            product_FH,
            keys_NH,
            alpha_F,
            weight_1F,
            offsets,
            hidden_PF,
            about_4F,
            score_P,
        )
        return pooled_RH

    @staticmethod
    @once_differentiable
    @dispatch.outside_autocast
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor | None, ...]:
        queries_RH, from_query_RF, from_key_FH, product_FH, keys_NH, alpha_F, weight_1F, offsets, *made = (
            ctx.saved_tensors
        )
        hidden_PF, about_4F, score_P = made
        kernels = _Kernels(queries_RH, from_query_RF, from_key_FH, product_FH, keys_NH, offsets)
        pairs, threads = kernels.pairs, kernels.threads
        d_score_P, d_keys_NH = torch.zeros_like(score_P), torch.empty_like(keys_NH)
        sums_T4F = about_4F.new_empty(threads, *about_4F.shape)
        kernels.run("scored", hidden_PF, about_4F, score_P, grad_RH.contiguous(), 1.0, d_score_P, d_keys_NH, sums_T4F)
        of_h_F, of_both_F, slope_F, along_F = sums_T4F.sum(0)
        _, rate_F, _, gated_F = about_4F
        bend_F = rate_F.square() * gated_F * rate_F * along_F / pairs
        about_6F = torch.cat([about_4F, torch.stack([bend_F, rate_F * gated_F * slope_F / pairs])])
        d_queries_RH, d_from_query_RF = torch.empty_like(queries_RH), torch.empty_like(from_query_RF)
        sums_T2FH = product_FH.new_empty(threads, 2, *product_FH.shape)
        room = product_FH.new_empty(threads, kernels.longest + 4, product_FH.shape[0])
        kernels.run(
            "through",
            hidden_PF,
            about_6F,
            d_score_P,
            kernels.longest,
            d_keys_NH,
            d_queries_RH,
            d_from_query_RF,
            sums_T2FH,
            room,
        )
        d_from_key_FH, d_product_FH = sums_T2FH.sum(0)
        d_alpha_F = weight_1F[0] * (of_h_F - of_both_F)
        d_weight_1F = (alpha_F * of_h_F + (1 - alpha_F) * of_both_F)[None]
        d_own = (d_queries_RH, d_from_query_RF, d_from_key_FH, d_product_FH, d_keys_NH)
        return (*d_own, d_alpha_F, d_weight_1F, d_score_P.sum().reshape(1), None, None)


class _Kernels:
    """The compiled kernels with what all of them are told."""

    def __init__(
        self,
        queries_RH: Tensor,
        from_query_RF: Tensor,
        from_key_FH: Tensor,
        product_FH: Tensor,
        keys_NH: Tensor,
        offsets: Tensor,
    ) -> None:
        found = library(*product_FH.shape)
        assert found is not None
        self._library, self.threads = found, torch.get_num_threads()
        lists = offsets.numel() - 1
        rows = len(queries_RH) // lists
        self.pairs, self.longest = len(keys_NH) * rows, int(offsets.diff().max())
        # Held, since a pointer does not hold what it points to.
        turned = (from_key_FH.T.contiguous(), product_FH.T.contiguous())
        self._tensors = (offsets, queries_RH, keys_NH, from_query_RF, from_key_FH, product_FH, *turned)
        self._sizes = _Sizes(lists, rows, self.threads, *(one.data_ptr() for one in self._tensors))

    def run(self, name: str, *values: Tensor | float | int) -> None:
        """Call a kernel; the GIL is free meanwhile."""
        words: list[Any] = [ctypes.byref(self._sizes)]
        for value in values:
            if isinstance(value, Tensor):
                words.append(ctypes.c_void_p(value.data_ptr()))
            else:
                words.append(ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value))
        self._library[name](*words)
