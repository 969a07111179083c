"""Statistics of attention: hand-made maps, the definition, any block, padding, grouped heads, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.attention_stats import AttentionStats, attention_stats, torch_impl
from couturier.kernels.attention_stats.reference import attention_map
from couturier.kernels.checks import KernelError, KernelTypeError

BACKENDS: tuple[dispatch.Backend, ...] = ("reference", "torch")


def normal(*shape: int, salt: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(salt), dtype=torch.float64).to(dtype)


def planted(map_RS: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose attention, unscaled, is this map: its logarithm against the unit vectors."""
    return map_RS.clamp_min(1e-300).log()[None, None], torch.eye(map_RS.shape[1], dtype=map_RS.dtype)[None, None]


def of_map(map_RS: Tensor, **named: int) -> AttentionStats:
    q, k = planted(map_RS.double())
    found = attention_stats(q, k, scale=1.0, **named)  # type: ignore[arg-type]
    return AttentionStats(*(one[0, 0] for one in found))


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_made_maps(backend: dispatch.Backend) -> None:
    token = torch.arange(40)
    with dispatch.use(backend):
        itself = of_map(torch.eye(40))
        # From token 15 on, everything is read exactly 15 tokens back.
        back = of_map(torch.where(token[:, None] < 15, torch.eye(40), torch.eye(40).roll(15, 0)))
        # Token 3 is the anchor: from token 4 on it alone is read.
        anchor = of_map(torch.where((token[:, None] < 4), torch.eye(40), (token == 3).double().expand(40, -1)))
    assert itself.waad_BHR.abs().max() < 1e-12 and itself.span_BHR.abs().max() < 1e-12
    assert itself.influence_BHS.abs().max() < 1e-12
    torch.testing.assert_close(back.waad_BHR[15:], torch.full((25,), 10.0).double())
    torch.testing.assert_close(back.span_BHR[15:], torch.full((25,), 15.0).double())
    # Token 0 is read by one of the thirty rows that stand 10 to 50 tokens after it.
    torch.testing.assert_close(back.influence_BHS[0], torch.tensor(1 / 30).double())
    torch.testing.assert_close(anchor.influence_BHS, (token == 3).double())
    torch.testing.assert_close(anchor.waad_BHR[4:], (token[4:] - 3).clamp_max(10).double())


def test_fai_of_the_definition_written_out() -> None:
    map_RS = normal(30, 30, salt=4).exp().tril()
    map_RS = map_RS / map_RS.sum(1, keepdim=True)
    found = of_map(map_RS, near=4, far=9)
    for s in range(30):
        later = [map_RS[t, s] for t in range(s + 4, min(s + 9, 29) + 1)]
        wanted = torch.stack(later).mean() if later else torch.tensor(0.0)
        assert float(found.influence_BHS[s]) == pytest.approx(float(wanted), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "keys", "heads", "groups"), [(200, 200, 4, 2), (16, 90, 3, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_reference(dtype: torch.dtype, rows: int, keys: int, heads: int, groups: int, padded: bool) -> None:
    q, k = normal(3, heads, rows, 24, salt=1, dtype=dtype), normal(3, groups, keys, 24, salt=2, dtype=dtype)
    start = torch.tensor([0, keys - rows + rows // 3, keys]) if padded else None
    with dispatch.use("torch"):
        found = attention_stats(q, k, start=start, near=3, far=40)
    with dispatch.use("reference"):
        exact = attention_stats(q.double(), k.double(), start=start, near=3, far=40)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for got, want in zip(found, exact, strict=True):
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        assert error(got, want) < limit


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 30), st.integers(1, 50), st.integers(0, 20), st.integers(0, 60),
    st.sampled_from([1, 300, 1 << 18]), st.integers(0, 10_000),
)  # fmt: skip
def test_any_shape_and_block(rows: int, prompt: int, window: int, near: int, more: int, piece: int, seed: int) -> None:
    keys = rows + prompt
    q, k = normal(2, 2, rows, 4, salt=seed), normal(2, 1, keys, 4, salt=seed + 1)
    start = torch.tensor([0, keys // 2])
    found = []
    for backend in BACKENDS:
        with dispatch.use(backend), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_impl, "_PIECE", piece)
            found.append(attention_stats(q, k, start=start, window=window, near=near, far=near + more))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    assert bool((found[1].waad_BHR <= found[1].span_BHR + 1e-12).all()) and float(found[1].waad_BHR.max()) <= window


def test_what_nobody_looks_at_changes_nothing() -> None:
    """Padding before a sequence moves every position alike: the statistics stay, however long it is."""
    q, k = normal(1, 2, 30, 8, salt=1, dtype=torch.float32), normal(1, 2, 30, 8, salt=2, dtype=torch.float32)
    plain = attention_stats(q, k)
    junk = 100 * normal(1, 2, 500, 8, salt=3, dtype=torch.float32)
    padded = attention_stats(q, torch.cat([junk, k], 2), start=torch.tensor([500]))
    torch.testing.assert_close(padded.waad_BHR, plain.waad_BHR)
    torch.testing.assert_close(padded.span_BHR, plain.span_BHR)
    torch.testing.assert_close(padded.influence_BHS[..., 500:], plain.influence_BHS)
    assert not padded.influence_BHS[..., :500].any()


def test_rows_alone_are_the_rows_of_the_whole() -> None:
    q, k = normal(2, 2, 50, 8, salt=1), normal(2, 2, 50, 8, salt=2)
    whole, some = attention_stats(q, k), attention_stats(q[:, :, 35:], k)
    torch.testing.assert_close(some.waad_BHR, whole.waad_BHR[..., 35:])
    torch.testing.assert_close(some.span_BHR, whole.span_BHR[..., 35:])
    # Keys that are read by these rows alone: 10 tokens on, nothing lies before row 35.
    torch.testing.assert_close(some.influence_BHS[..., 25:], whole.influence_BHS[..., 25:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_that_is_given_is_used(backend: dispatch.Backend) -> None:
    q, k = normal(2, 2, 20, 8, salt=1, dtype=torch.float32), normal(2, 2, 33, 8, salt=2, dtype=torch.float32)
    score = torch.einsum("bhrd,bhsd->bhrs", q, k) * 8**-0.5
    lse = score.masked_fill(torch.ones(20, 33, dtype=torch.bool).triu(14), float("-inf")).logsumexp(-1)
    with dispatch.use(backend):
        plain, given_ = attention_stats(q, k), attention_stats(q, k, lse=lse)
        halved = attention_stats(q, k, lse=lse.double() + torch.log(torch.tensor(2.0)))
    for one, two, half in zip(plain, given_, halved, strict=True):
        torch.testing.assert_close(two, one)
        torch.testing.assert_close(2 * half, one)


def test_small_distances_after_a_long_past_keep_their_digits() -> None:
    """20,000 tokens back and one token back differ in float32 too: positions are counted from the block."""
    q, k = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 20_000, 2)
    q[..., 0], k[:, :, -5:, 0] = 60.0, 1.0
    found = attention_stats(q, k)
    wanted = torch.tensor([(i + 1) / 2 for i in range(4)])
    torch.testing.assert_close(found.span_BHR[0, 0], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.waad_BHR[0, 0], wanted, atol=1e-5, rtol=1e-5)


def test_nothing_of_the_size_of_the_map_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    softmax = torch_impl._softmax

    def watched(score_nECT: Tensor, *rest: Tensor | None) -> Tensor:
        held.append(score_nECT.numel())
        return softmax(score_nECT, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_impl, "_softmax", watched)
    attention_stats(*(normal(2, 4, 1500, 4, salt=i, dtype=torch.float32) for i in range(2)))
    assert max(held) <= torch_impl._PIECE < 2 * 4 * 1500**2 / 60
    # What no row sees is hardly computed: the lower triangle is a half of the square.
    assert sum(held) < 0.56 * 2 * 4 * 1500**2


def test_no_gradient_and_no_rounding_by_autocast() -> None:
    q, k = (normal(1, 1, 40, 8, salt=i, dtype=torch.float32).requires_grad_() for i in range(2))
    plain = attention_stats(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_stats(q, k)
    assert all(torch.equal(one, two) for one, two in zip(found, plain, strict=True))
    assert not any(one.requires_grad for one in found)


def test_a_map_sums_to_one() -> None:
    q, k = normal(2, 4, 9, 8, salt=1), normal(2, 2, 30, 8, salt=2)
    map_BHRS = attention_map(q, k, None, torch.tensor([0, 25]), 1.0)
    assert map_BHRS.sum(-1).allclose((torch.arange(9) + 21 >= torch.tensor([[0], [25]]))[:, None].double())


def test_what_is_refused() -> None:
    q, k = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 9, 8)
    with pytest.raises(KernelError, match="q has 4 heads, k has 3; wanted a multiple"):
        attention_stats(q, torch.zeros(2, 3, 9, 8))
    with pytest.raises(KernelError, match="q has 5 rows, k 4 keys"):
        attention_stats(q, k[:, :, :4])
    with pytest.raises(KernelError, match=r"k \[B, G, S, d\]: axis d has size 7, but q has d = 8"):
        attention_stats(q, k[..., :7])
    with pytest.raises(KernelError, match="window is 0; wanted 1 or more"):
        attention_stats(q, k, window=0)
    with pytest.raises(KernelError, match="near is 10 and far 3"):
        attention_stats(q, k, far=3)
    with pytest.raises(KernelError, match=r"lse \[B, H, R\]: axis R has size 4"):
        attention_stats(q, k, lse=torch.zeros(2, 4, 4))
    with pytest.raises(KernelError, match="start has values from 0 to 10; wanted 0 to 9"):
        attention_stats(q, k, start=torch.tensor([0, 10]))
    with pytest.raises(KernelTypeError, match="k has dtype torch.float64, but q has torch.float32"):
        attention_stats(q, k.double())
