"""The shared-prefix step equals plain attention over copied prompts, for any shape and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from couturier.kernels.shared_prefix import reference, shared_prefix_attention


def _case(users: int, n: int, kv: int, rep: int, p: int, t: int, d: int, seed: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.rand(users, p, generator=g) < 0.7
    mask[:, -1] = True
    return (
        normal(users, n, kv * rep, d),
        normal(users, kv, p, d),
        normal(users, kv, p, d),
        mask,
        normal(users, n, kv, t, d),
        normal(users, n, kv, t, d),
    )


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
    q, pk, pv, mask, sk, sv = _case(users, n, kv, rep, p, t, 8, seed)
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    expected = reference(q, pk, pv, mask, sk, sv)
    torch.testing.assert_close(shared_prefix_attention(q, pk, pv, bias, sk, sv), expected, atol=1e-10, rtol=1e-10)


def test_padding_in_the_prompt_changes_nothing() -> None:
    q, pk, pv, mask, sk, sv = _case(2, 3, 2, 2, 6, 4, 8, seed=1)
    mask[:, :3] = False
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    before = shared_prefix_attention(q, pk, pv, bias, sk, sv)
    pk[:, :, :3], pv[:, :, :3] = 99.0, -99.0
    torch.testing.assert_close(shared_prefix_attention(q, pk, pv, bias, sk, sv), before)


def test_a_constant_value_passes_through() -> None:
    q, pk, pv, mask, sk, sv = _case(1, 2, 1, 1, 5, 3, 4, seed=2)
    out = shared_prefix_attention(q, pk, torch.ones_like(pv), torch.zeros(1, 5, dtype=q.dtype), sk, torch.ones_like(sv))
    assert out == pytest.approx(torch.ones_like(out))
