"""Target attention: the reference against first principles, and the fast paths against it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from couturier.kernels import dispatch, jagged
from couturier.kernels.target_attention import (
    Pooling,
    dot_attention,
    mlp_attention,
    pair_offsets,
    pairs,
    torch_impl,
    torch_mlp,
)

from .jagged_cases import LENGTHS, Lists, dot_results, error, mlp_results, shuffled_rows

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
POOLINGS: tuple[Pooling, ...] = ("din_code", "din_paper")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written reads as NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# The reference against first principles.


def padded_din(q_UH: Tensor, k_ULH: Tensor, mask_UL: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """DIN's released attention unit, written out as there: padded, concatenated four-fold, a large negative as mask."""
    x = torch.cat([q := q_UH[:, None].expand_as(k_ULH), k_ULH, q - k_ULH, q * k_ULH], -1)
    for weight, bias in layers[:-1]:
        x = torch.sigmoid(x @ weight.T + bias)
    score_UL = (x @ layers[-1][0].T + layers[-1][1])[..., 0]
    score_UL = torch.where(mask_UL, score_UL, -(2.0**32) + 1) / q_UH.shape[1] ** 0.5
    return (score_UL.softmax(1)[..., None] * k_ULH).sum(1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_released_unit(backend: dispatch.Backend) -> None:
    lists = Lists(lengths=(3, 1, 7), width=4)
    q, k, _ = lists.tensors(1)
    layers = lists.layers(5, 3)
    place_UL = lists.offsets[:-1, None] + torch.arange(7)
    mask_UL = torch.arange(7) < torch.tensor(lists.lengths)[:, None]
    wanted = padded_din(q, k[place_UL.clamp_max(10)], mask_UL, layers)
    with dispatch.use(backend):
        assert error(mlp_attention(q, k, lists.offsets, layers), wanted) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_dot_scorer_is_attention_as_torch_has_it(backend: dispatch.Backend) -> None:
    lists = Lists(lengths=(5, 5), width=4)
    _, k, v = lists.tensors(3)
    q, bias = lists.normal(2, 6, 4), lists.normal(10)
    mask = bias.view(2, 1, 5).expand(-1, 6, -1)
    wanted = nn.functional.scaled_dot_product_attention(q, k.view(2, 5, 4), v.view(2, 5, 3), attn_mask=mask)
    with dispatch.use(backend):
        assert error(dot_attention(q, k, lists.offsets, values=v, behaviour_bias=bias), wanted) < 1e-12


def test_gradients_by_finite_differences() -> None:
    lists = Lists(lengths=(2, 0, 3), row_user=torch.tensor([2, 0, 2]), width=2)
    q, k, v = lists.tensors(2)
    layers = lists.layers(3, 2)
    flat = [one for two in layers for one in two]
    bias, pair_bias = lists.normal(5), lists.normal(lists.pairs)
    for pooling in POOLINGS:

        def mlp(q: Tensor, k: Tensor, v: Tensor, *flat: Tensor, pooling: Pooling = pooling) -> tuple[Tensor, Tensor]:
            chosen = list(zip(flat[::2], flat[1::2], strict=True))
            return mlp_attention(
                q, k, lists.offsets, chosen, row_user=lists.row_user, values=v, pooling=pooling, return_weights=True
            )

        assert torch.autograd.gradcheck(mlp, (q, k, v, *flat))

    def dot(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pair_bias: Tensor) -> tuple[Tensor, Tensor]:
        return dot_attention(
            q,
            k,
            lists.offsets,
            row_user=lists.row_user,
            values=v,
            behaviour_bias=bias,
            pair_bias=pair_bias,
            return_weights=True,
        )

    assert torch.autograd.gradcheck(dot, (q, k, v, bias, pair_bias))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_behaviour_twice(pooling: Pooling) -> None:
    lists = Lists(lengths=(4, 0, 9))
    q, k, _ = lists.tensors(1)
    layers = lists.layers(5, 3)
    once = mlp_attention(q, k, lists.offsets, layers, pooling=pooling)
    doubled = mlp_attention(q, k.repeat_interleave(2, 0), lists.offsets * 2, layers, pooling=pooling)
    assert error(doubled, once * (2 if pooling == "din_paper" else 1)) < 1e-12


def test_the_weights_of_a_softmax_sum_to_one_and_pool_the_values() -> None:
    lists = Lists(lengths=LENGTHS, row_user=shuffled_rows(len(LENGTHS), 20))
    q, k, v = lists.tensors(3)
    pooled, weights = dot_attention(q, k, lists.offsets, row_user=lists.row_user, values=v, return_weights=True)
    row_P, behaviour_P = pairs(lists.offsets, lists.rows)
    lengths = lists.offsets.diff()[lists.rows]
    assert error(torch.zeros(20, dtype=v.dtype).index_add(0, row_P, weights), (lengths > 0).double()) < 1e-12
    assert error(torch.zeros_like(pooled).index_add(0, row_P, weights[:, None] * v[behaviour_P]), pooled) < 1e-12


# The fast path against the reference.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [None, 3, 60], ids=["row a list", "3 rows", "60 rows in no order"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("hidden", [(7,), (9, 5), (9, 5, 4)], ids=str)
@pytest.mark.parametrize("folds", [True, False], ids=["a matrix a row", "a product a pair"])
def test_mlp_equals_the_reference(
    dtype: torch.dtype,
    rows: int | None,
    pooling: Pooling,
    hidden: tuple[int, ...],
    folds: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_impl, "_folds", lambda *sizes: folds)
    monkeypatch.setattr(torch_impl, "_PIECE", 100)  # several pieces, the last one short
    monkeypatch.setattr(torch_mlp, "_CHUNK", 3000)  # several chunks of a block and several blocks
    monkeypatch.setattr(torch_mlp, "_SPARE", 300)
    row_user = None if rows is None else shuffled_rows(len(LENGTHS), rows)
    found, wanted = (_mlp(backend, dtype, row_user, pooling, hidden) for backend in ("torch", "reference"))
    far = {name: error(found[name], wanted[name]) for name in wanted}
    assert max(far.values()) < LIMIT[dtype], far


def _mlp(
    backend: dispatch.Wish, dtype: torch.dtype, row_user: Tensor | None, pooling: Pooling, hidden: tuple[int, ...]
) -> dict[str, Tensor]:
    with dispatch.use(backend):
        return mlp_results(Lists(lengths=LENGTHS, row_user=row_user, dtype=dtype), pooling, *hidden)


@pytest.mark.parametrize("folds", [True, False], ids=["a matrix a row", "a product a pair"])
def test_activations_computed_again_are_the_same(folds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "_folds", lambda *sizes: folds)
    kept = _mlp("torch", torch.float32, None, "din_code", (9, 5))
    for module in (torch_impl, torch_mlp):
        monkeypatch.setattr(module, "_KEEP_BYTES", 0)
    again = _mlp("torch", torch.float32, None, "din_code", (9, 5))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [None, 3, 60], ids=["row a list", "3 rows", "60 rows in no order"])
def test_dot_equals_the_reference(dtype: torch.dtype, rows: int | None) -> None:
    row_user = None if rows is None else shuffled_rows(len(LENGTHS), rows)
    found = {}
    for backend in ("torch", "reference"):
        with dispatch.use(backend):
            found[backend] = dot_results(Lists(lengths=LENGTHS, row_user=row_user, dtype=dtype))
    far = {name: error(found["torch"][name], wanted) for name, wanted in found["reference"].items()}
    assert max(far.values()) < LIMIT[dtype], far


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    st.lists(st.integers(0, 11), max_size=30),
    st.integers(0, 10_000),
)
def test_any_lists_and_rows(lengths: list[int], users: list[int], seed: int) -> None:
    row_user = torch.tensor([one % len(lengths) for one in users], dtype=torch.int64)
    found = {}
    for backend in ("torch", "reference"):
        with dispatch.use(backend):
            lists = Lists(lengths=lengths, row_user=row_user, seed=seed)
            found[backend] = {**mlp_results(lists, "din_paper", 4, 3), **dot_results(lists)}
    for name, wanted in found["reference"].items():
        assert torch.allclose(found["torch"][name], wanted, atol=1e-9, rtol=1e-9), name


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("folds", [True, False], ids=["a matrix a row", "a product a pair"])
def test_callables_see_real_pairs_only_and_all_of_them(
    pooling: Pooling, folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_impl, "_folds", lambda *sizes: folds)
    seen = []

    def dice(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        p = torch.sigmoid((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-8).sqrt())
        return p * x + (1 - p) * 0.25 * x

    prelu = nn.PReLU(5, 0.1, dtype=torch.float64)
    found = {}
    for backend in ("torch", "reference"):
        with dispatch.use(backend):
            lists = Lists(lengths=(0, 5, 2), row_user=torch.tensor([1, 0, 2, 1]))
            found[backend] = mlp_results(lists, pooling, 7, 5, activations=[dice, prelu])
    assert seen == [(12, 7), (12, 7)]
    far = {name: error(found["torch"][name], wanted) for name, wanted in found["reference"].items()}
    assert max(far.values()) < 1e-12, far


def test_keys_that_are_the_values_get_both_gradients() -> None:
    lists = Lists(lengths=LENGTHS, row_user=shuffled_rows(len(LENGTHS), 30))
    q, k, _ = lists.tensors(1)
    pooled = dot_attention(q, k, lists.offsets, row_user=lists.row_user)
    apart = dot_attention(q, k, lists.offsets, row_user=lists.row_user, values=k.clone())
    weight = torch.linspace(-1, 1, pooled.numel(), dtype=pooled.dtype).view_as(pooled)
    found, wanted = (torch.autograd.grad((one * weight).sum(), (q, k)) for one in (pooled, apart))
    assert max(error(one, two) for one, two in zip(found, wanted, strict=True)) < 1e-12


def test_sixteen_bits_in_sixteen_bits_out() -> None:
    lists = Lists(lengths=LENGTHS, dtype=torch.bfloat16)
    q, k, _ = lists.tensors(1)
    layers = lists.layers(7, 5)
    pooled, weights = mlp_attention(q, k, lists.offsets, layers, return_weights=True)
    wide = [(weight.double(), bias.double()) for weight, bias in layers]
    assert pooled.dtype == weights.dtype == torch.bfloat16
    assert error(pooled, mlp_attention(q.double(), k.double(), lists.offsets, wide)) < LIMIT[torch.bfloat16]
    assert dot_attention(q, k, lists.offsets).dtype == torch.bfloat16


def test_autocast_takes_its_dtype_and_gives_gradients_in_theirs() -> None:
    lists = Lists(lengths=LENGTHS, dtype=torch.float32)
    q, k, _ = lists.tensors(1)
    layers = lists.layers(7, 5)
    exact = [mlp_attention(q, k, lists.offsets, layers), dot_attention(q, k, lists.offsets)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # As under autocast: what a layer gave is narrow, what was looked up is not.
        narrow = [mlp_attention(q.bfloat16(), k, lists.offsets, layers), dot_attention(q.bfloat16(), k, lists.offsets)]
    for one, two in zip(narrow, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert error(one, two) < 3e-2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (g,) = torch.autograd.grad(one.float().sum(), k)
        assert g.dtype == torch.float32
        assert error(g, torch.autograd.grad(two.sum(), k)[0]) < 3e-2


# Invariances.


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_order_of_behaviours_does_not_matter(pooling: Pooling) -> None:
    lists = Lists(lengths=(7, 12), dtype=torch.float32)
    q, k, v = lists.tensors(3)
    layers = lists.layers(5, 3)
    g = torch.Generator().manual_seed(1)
    order = torch.cat([torch.randperm(7, generator=g), 7 + torch.randperm(12, generator=g)])
    for attend in (
        lambda k, v: mlp_attention(q, k, lists.offsets, layers, values=v, pooling=pooling),
        lambda k, v: dot_attention(q, k, lists.offsets, values=v),
    ):
        assert error(attend(k[order], v[order]), attend(k, v)) < 1e-6


def test_how_candidates_are_grouped_does_not_matter() -> None:
    lists = Lists(lengths=(9, 0, 4), dtype=torch.float32)
    _, k, v = lists.tensors(3)
    q_UCH = lists.normal(3, 5, 6)
    layers = lists.layers(5, 3)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(3).repeat_interleave(5)[order]
    for attend in (
        lambda q, row_user: mlp_attention(q, k, lists.offsets, layers, values=v, row_user=row_user),
        lambda q, row_user: dot_attention(q, k, lists.offsets, values=v, row_user=row_user),
    ):
        dense = attend(q_UCH, None)
        assert dense.shape == (3, 5, 3)
        assert error(attend(q_UCH.flatten(0, 1)[order], rows), dense.flatten(0, 1)[order]) < 1e-6
        alone = torch.stack([attend(q_UCH[:, one], None) for one in range(5)], 1)
        assert error(alone, dense) < 1e-6


def test_what_lies_in_other_lists_does_not_matter() -> None:
    lists = Lists(lengths=(9, 30, 31), dtype=torch.float32)
    q, k, _ = lists.tensors(1)
    layers = lists.layers(5, 3)
    before = [mlp_attention(q, k, lists.offsets, layers)[1], dot_attention(q, k, lists.offsets)[1]]
    with torch.no_grad():
        k[:9], k[39:] = 1e4, -1e4
    after = [mlp_attention(q, k, lists.offsets, layers)[1], dot_attention(q, k, lists.offsets)[1]]
    assert torch.equal(torch.stack(after), torch.stack(before))


def test_large_scores_do_not_overflow() -> None:
    keys = torch.tensor([[1.0], [2.0], [-1.0]])
    assert dot_attention(torch.tensor([[1e4]]), keys, torch.tensor([0, 3]), scale=1.0).item() == 2.0


def test_nobody_and_nothing() -> None:
    layers = Lists(lengths=(), dtype=torch.float32).layers(4, 3)
    offsets = torch.zeros(3, dtype=torch.int64)
    q, k = torch.ones(2, 6, requires_grad=True), torch.ones(0, 6, requires_grad=True)
    for out in (dot_attention(q, k, offsets), mlp_attention(q, k, offsets, layers)):
        assert out.shape == (2, 6) and not out.any()
        out.sum().backward()
    assert q.grad is not None and not q.grad.any()
    for out in (dot_attention(q[:0], k, offsets[:1]), mlp_attention(q[:0], k, offsets[:1], layers)):
        assert out.shape == (0, 6)


def test_which_way_the_first_layer_goes() -> None:
    # What was timed: two and 19 candidates for lists of 45, and one for lists of 45 at a width where it does not pay.
    assert torch_impl._folds(256, 11_402, 64, 32) and torch_impl._folds(608, 26_030, 32, 32)
    assert not torch_impl._folds(256, 11_452, 80, 128) and not torch_impl._folds(2560, 63_360, 80, 32)


# Blocks.


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=40),
    st.lists(st.integers(0, 39), max_size=120),
    st.sampled_from([0, 1000, 1 << 18]),
    st.sampled_from([1, 5000, 1 << 19]),
)
def test_blocks_hold_every_pair_once(lengths: list[int], users: list[int], spare: int, most: int) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    row_user = torch.tensor([one % len(lengths) for one in users], dtype=torch.int64)
    starts = pair_offsets(offsets, row_user)
    held = torch.zeros(int(starts[-1]))
    for block in jagged.blocks(offsets, row_user, width=8, most=most, spare=spare):
        places = block.pairs(starts)
        ones = torch.ones(places.index.shape)
        places.add(held, places.without_padding(ones))
        assert torch.equal(places.take(torch.arange(held.numel())), places.index)
        assert torch.equal(block.rows.take(torch.arange(len(users))), block.rows.index)
    assert bool((held == 1).all())
