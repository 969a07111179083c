"""Causal linear attention with a fixed decay a head: time a token that does not grow with length, a state to keep.

The state after the last behaviour is all the past that the next one needs, so a user encoder can store it as the
profile of a person and read new behaviours without the old ones. Derivation, backward and cost: ``README.md`` here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.checks import KernelError, KernelTypeError, check_axes, check_floats, check_offsets
from couturier.kernels.linear_attention.slopes import slopes_by_layer, slopes_tnl

__all__ = ["linear_attention", "slopes_by_layer", "slopes_tnl"]

# Chunks of 32 are the fastest on the CPU at widths of 32 to 64 (README.md here).
CHUNK = 32


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    offsets: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Each token reads a decaying sum over itself and all earlier tokens of its sequence.

    With ``lam = exp(-slope)`` and, for each head, ``S_t = lam S_(t-1) + k_t v_t^T``, the output is ``o_t = S_t^T q_t``:
    no softmax, no normaliser, and no factor ``D ** -0.5`` (scale q if you want one). Lightning attention of
    TransNormerLLM (arXiv 2405.17381); the chunked form and its backward are derived in ``README.md``. Gradients flow
    to q, k, v and the initial state, from the output and the final state; slopes are constants, as in the paper.

    Args:
        q, k: ``[B, T, H, D]``, time before heads; or ``[N, H, D]`` for jagged sequences, with ``offsets``.
        v: ``[B, T, H, E]`` or ``[N, H, E]``.
        slopes: ``[H]``, not negative: decay a token is ``exp(-slope)``, so 0 keeps everything.
        initial_state: ``[B, H, D, E]``, what the sequences left behind so far, or None for nothing. A jagged call has
            as many states as sequences. float32, or float64 where q is float64.
        offsets: int64 ``[B + 1]``: sequence b is the rows ``offsets[b]`` to ``offsets[b + 1]``. May be empty.
        chunk: tokens worked on at once by the torch path; changes rounding and speed only.

    Returns:
        The output, shaped and typed like v, and the final state ``[B, H, D, E]``, typed like the initial state.

    Raises:
        KernelError: a shape does not fit, slopes are negative or want a gradient, or offsets are none.
        KernelTypeError: dtypes differ.

    Example:
        >>> one, halved = torch.ones(1, 3, 1, 1), torch.tensor([0.6931472])
        >>> out, state = linear_attention(one, one, one, halved)
        >>> out.flatten().tolist(), state.flatten().tolist()
        ([1.0, 1.5, 1.75], [1.75])
        >>> next_one = torch.ones(1, 1, 1, 1)
        >>> linear_attention(next_one, next_one, next_one, halved, initial_state=state)[0].item()
        1.875
    """
    check_floats(q=q, k=k, v=v)
    if offsets is None:
        sizes = check_axes(q=(q, "B T H D"), k=(k, "B T H D"), v=(v, "B T H E"))
        sequences, length = sizes["B"], sizes["T"]
    else:
        sizes = check_axes(q=(q, "N H D"), k=(k, "N H D"), v=(v, "N H E"))
        sequences, length = check_offsets(offsets, sizes["N"], of="q"), None
    _check_slopes(slopes, sizes["H"], q)
    if chunk < 1:
        raise KernelError(f"chunk is {chunk}; wanted at least 1 (the default is {CHUNK})")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (sequences, sizes["H"], sizes["D"], sizes["E"])
    if initial_state is None:
        initial_state = q.new_zeros(shape, dtype=wide)
    else:
        check_axes(dict(zip("BHDE", shape, strict=True)), initial_state=(initial_state, "B H D E"))
        if initial_state.dtype != wide:
            raise KernelTypeError(f"initial_state has dtype {initial_state.dtype}; wanted {wide} beside q of {q.dtype}")
        if initial_state.device != q.device:
            raise KernelError(f"initial_state is on {initial_state.device}, but q is on {q.device}; move one of them")
    if offsets is None:
        offsets = torch.arange(sequences + 1, device=q.device) * sizes.get("T", 0)
    rows = [x.reshape(-1, *x.shape[-2:]) for x in (q, k, v)]
    run = dispatch.implementation("linear_attention", q, uncovered=_uncovered(sizes, q))
    # The products are in float32 for the sake of the state; automatic casting would undo that.
    with torch.autocast(q.device.type, enabled=False):
        out, state = run.linear_attention(*rows, slopes.to(wide), initial_state, offsets, length, chunk)
    return out.view(v.shape), state


def _check_slopes(slopes: Tensor, heads: int, q: Tensor) -> None:
    check_axes({"H": heads}, slopes=(slopes, "H"))
    check_floats(slopes=slopes)
    if slopes.device != q.device:
        raise KernelError(f"slopes is on {slopes.device}, but q is on {q.device}; move one of them")
    if slopes.requires_grad:
        raise KernelError("slopes wants a gradient, but decay is a constant of the model here; pass slopes.detach()")
    if slopes.device.type == "cpu" and not bool((slopes >= 0).all()):
        raise KernelError(f"slopes has the value {float(slopes.min())}; wanted 0 or more (decay is exp(-slope))")


def _uncovered(sizes: dict[str, int], q: Tensor) -> str | None:
    """Why the triton kernel does not cover this call: it wants a head's width in one tile, and no float64."""
    if q.dtype == torch.float64:
        return "float64"
    if sizes["D"] > 128 or sizes["E"] > 128:
        return f"heads wider than 128 (D = {sizes['D']}, E = {sizes['E']})"
    return None
