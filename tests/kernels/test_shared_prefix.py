"""The shared-prefix step equals plain attention over copied prompts, for any shape and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from couturier.kernels.shared_prefix import (
    PrefixCache,
    apart,
    packed_attention,
    reference,
    shared_prefix_attention,
    visible,
)


def _case(users: int, n: int, kv: int, rep: int, p: int, t: int, d: int, seed: int) -> tuple[Tensor, ...]:
    """Queries, keys and values in one row of slots, and which prompt tokens count."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.rand(users, p, generator=g) < 0.7
    mask[:, -1] = True
    slots = p + t * n
    return normal(users, n, kv * rep, d), normal(users, kv, slots, d), normal(users, kv, slots, d), mask


def _step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    n = q.shape[1]
    tokens = (k.shape[2] - mask.shape[1]) // n
    return shared_prefix_attention(q, k, v, visible(mask, samples=n, tokens=tokens, dtype=q.dtype))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 10_000),
)
def test_equals_the_plain_definition(users: int, n: int, kv: int, rep: int, p: int, t: int, seed: int) -> None:
    q, k, v, mask = _case(users, n, kv, rep, p, t, 8, seed)
    (pk, sk), (pv, sv) = apart(k, prompt=p, samples=n), apart(v, prompt=p, samples=n)
    expected = reference(q, pk, pv, mask, sk, sv)
    torch.testing.assert_close(_step(q, k, v, mask), expected, atol=1e-10, rtol=1e-10)


def test_padding_in_the_prompt_changes_nothing() -> None:
    q, k, v, mask = _case(2, 3, 2, 2, 6, 4, 8, seed=1)
    mask[:, :3] = False
    before = _step(q, k, v, mask)
    k[:, :, :3], v[:, :, :3] = 99.0, -99.0
    torch.testing.assert_close(_step(q, k, v, mask), before)


def test_a_sample_never_sees_its_mates() -> None:
    q, k, v, mask = _case(2, 3, 2, 1, 5, 4, 8, seed=3)
    before = _step(q, k, v, mask)
    k[:, :, 5 + 1 :: 3], v[:, :, 5 + 1 :: 3] = 99.0, -99.0
    after = _step(q, k, v, mask)
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]])
    assert (after[:, 1] - before[:, 1]).abs().max() > 1


def test_a_constant_value_passes_through() -> None:
    q, k, _, mask = _case(1, 2, 1, 1, 5, 3, 4, seed=2)
    assert _step(q, k, torch.ones_like(k), mask) == pytest.approx(torch.ones_like(q))


def test_the_cache_has_a_slot_for_every_token_of_every_sample() -> None:
    mask = torch.tensor([[False, True, True], [True, True, True]])
    cache = PrefixCache(mask, samples=4, tokens=5, layers=2, heads=3, like=torch.empty(8, dtype=torch.float64))
    assert cache.k_lUGSd.shape == cache.v_lUGSd.shape == (2, 2, 3, 3 + 4 * 5, 8)
    assert cache.k_lUGSd.dtype == torch.float64
    assert [cache.end(t) for t in (0, 1, 5)] == [3, 7, 23]
    own_UnTn = cache.bias_UnS[:, :, 3:].unflatten(-1, (5, 4)) == 0
    assert torch.equal(own_UnTn, torch.eye(4, dtype=torch.bool)[None, :, None].expand(2, -1, 5, -1))
    assert (cache.bias_UnS[0, :, 0] == float("-inf")).all()
    assert (cache.bias_UnS[1, :, :3] == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 10_000),
)
def test_whole_rows_equal_attention_under_a_mask(
    users: int, n: int, kv: int, rep: int, p: int, t: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    whole = p + n * t
    q, k, v = (torch.randn(users, whole, heads, 4, generator=g, dtype=torch.float64) for heads in (kv * rep, kv, kv))
    mask = torch.rand(users, p, generator=g) < 0.7
    mask[:, -1] = True
    owner = torch.cat([torch.full((p,), -1), torch.arange(n).repeat_interleave(t)])
    keep = ((owner[:, None] == owner) | (owner == -1)) & torch.ones(whole, whole, dtype=torch.bool).tril()
    real = torch.cat([mask, torch.ones(users, n * t, dtype=torch.bool)], 1)
    keep = (keep & real[:, None]) | torch.eye(whole, dtype=torch.bool)
    scores = torch.einsum("uqhd,ukhd->uhqk", q, k.repeat_interleave(rep, 2)) * 4**-0.5
    weight = scores.masked_fill(~keep[:, None], float("-inf")).softmax(-1)
    expected = torch.einsum("uhqk,ukhd->uqhd", weight, v.repeat_interleave(rep, 2))
    found = packed_attention(q, k, v, mask, samples=n)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(packed_attention(q[:, p - 1 :], k, v, mask, samples=n), expected[:, p - 1 :])
