"""Random jagged inputs for target attention and search, and how far two answers are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from couturier.kernels.jagged import pair_offsets
from couturier.kernels.target_attention import Pooling, dot_attention, mlp_attention

# Around tile and piece boundaries, none and one.
LENGTHS = (0, 1, 2, 63, 64, 65, 200)


def error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|; NaN if anything is, so that every comparison with it fails."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Jagged lists and rows of them; random tensors come from one generator."""

    lengths: Sequence[int]
    row_user: Tensor | None = None
    dtype: torch.dtype = torch.float64
    seed: int = 0
    width: int = 6
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self.lengths)) if self.row_user is None else self.row_user

    @property
    def behaviours(self) -> int:
        return sum(self.lengths)

    @property
    def pairs(self) -> int:
        return int(pair_offsets(self.offsets, self.rows)[-1])

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random leaf."""
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.dtype).requires_grad_()

    def tensors(self, values_width: int) -> list[Tensor]:
        """Queries, keys and values."""
        n, h = self.behaviours, self.width
        return [self.normal(len(self.rows), h), self.normal(n, h), self.normal(n, values_width)]

    def layers(self, *hidden: int) -> list[tuple[Tensor, Tensor]]:
        """Weights large enough that units differ: with equal units gradients cancel under a softmax."""
        sizes = [4 * self.width, *hidden, 1]
        return [
            (self.normal(after, before), self.normal(after)) for before, after in zip(sizes, sizes[1:], strict=False)
        ]


def shuffled_rows(users: int, rows: int, seed: int = 0) -> Tensor:
    """The list of each of ``rows`` rows, in no order; the last list has none."""
    return torch.randint(0, max(users - 1, 1), (rows,), generator=torch.Generator().manual_seed(seed))


def with_gradients(call: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What a call returns and the gradient of every input, for random gradients of both results."""
    results = call()
    g = torch.Generator().manual_seed(99)
    # Random, as a constant gradient of a softmax's weights is none; numbers that every dtype can hold.
    given = [torch.randn(one.shape, generator=g).bfloat16().to(one.dtype) for one in results]
    return [*results, *torch.autograd.grad(results, inputs, given)]


def mlp_results(
    lists: Lists,
    pooling: Pooling,
    *hidden: int,
    activations: Sequence[Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Both results and every gradient of DIN's unit, by name. The last bias moves no softmax, so it has none there."""
    q, k, v = lists.tensors(5)
    layers = lists.layers(*hidden)
    flat = [one for two in layers for one in two][: -1 if pooling == "din_code" else None]
    names = ["pooled", "weights", "q", "k", "v", *(f"layer {place // 2}.{place % 2}" for place in range(len(flat)))]
    found = with_gradients(
        lambda: mlp_attention(
            q,
            k,
            lists.offsets,
            layers,
            row_user=lists.row_user,
            values=v,
            pooling=pooling,
            activations=activations,
            return_weights=True,
        ),
        [q, k, v, *flat],
    )
    return dict(zip(names, found, strict=True))


def dot_results(lists: Lists) -> dict[str, Tensor]:
    """Both results and every gradient of the dot scorer with both biases, by name."""
    q, k, v = lists.tensors(5)
    behaviour_bias, pair_bias = lists.normal(lists.behaviours), lists.normal(lists.pairs)
    names = ["pooled", "weights", "q", "k", "v", "behaviour bias", "pair bias"]
    found = with_gradients(
        lambda: dot_attention(
            q,
            k,
            lists.offsets,
            row_user=lists.row_user,
            values=v,
            behaviour_bias=behaviour_bias,
            pair_bias=pair_bias,
            return_weights=True,
        ),
        [q, k, v, behaviour_bias, pair_bias],
    )
    return dict(zip(names, found, strict=True))
