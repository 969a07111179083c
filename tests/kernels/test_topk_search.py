"""Search: against brute force, ties, padding, grouping, bounded memory, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from couturier.kernels import dispatch
from couturier.kernels.checks import KernelError, KernelTypeError
from couturier.kernels.target_attention import dot_attention
from couturier.kernels.topk_search import Similarity, as_lists, topk_search, torch_impl

from .jagged_cases import LENGTHS, Lists, error, shuffled_rows

BACKENDS: tuple[dispatch.Backend, ...] = ("reference", "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_brute_force(backend: dispatch.Backend, similarity: Similarity) -> None:
    lists = Lists(lengths=(6, 3))
    q, keys, _ = lists.tensors(1)
    with dispatch.use(backend):
        index, score = topk_search(q, keys, lists.offsets, 4, similarity=similarity)
    for row, behaviours in enumerate((range(6), range(6, 9))):
        scores = {
            one: (
                torch.cosine_similarity(q[row], keys[one], dim=0) if similarity == "cosine" else q[row] @ keys[one]
            ).item()
            for one in behaviours
        }
        best = sorted(scores, key=lambda one: -scores[one])[:4]
        assert index[row].tolist() == (best + [-1])[:4]
        assert score[row, : len(best)].tolist() == pytest.approx([scores[one] for one in best])
    assert score[1, 3] == float("-inf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, 40], ids=["row a list", "rows in no order"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("k", [1, 5, 64, 250])
def test_equals_the_reference(dtype: torch.dtype, rows: int | None, similarity: Similarity, k: int) -> None:
    row_user = None if rows is None else shuffled_rows(len(LENGTHS), rows)
    lists = Lists(lengths=LENGTHS, row_user=row_user, dtype=dtype)
    q, keys, _ = lists.tensors(1)
    bias = lists.normal(lists.behaviours).detach()
    bias[70:75] = float("-inf")
    found = []
    for backend in BACKENDS:
        with dispatch.use(backend):
            found.append(topk_search(q, keys, lists.offsets, k, row_user=row_user, similarity=similarity, bias=bias))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert not torch.isin(found[1][0], torch.arange(70, 75)).any()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.lists(st.integers(0, 7), max_size=20),
    st.integers(1, 12),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 10_000),
)
def test_ties_go_to_the_newest(lengths: list[int], users: list[int], k: int, dtype: torch.dtype, seed: int) -> None:
    # Small whole numbers: many equal scores, and no rounding.
    g = torch.Generator().manual_seed(seed)
    row_user = torch.tensor([one % len(lengths) for one in users], dtype=torch.int64)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q = torch.randint(-1, 2, (len(users), 2), generator=g).to(dtype)
    keys = torch.randint(-1, 2, (sum(lengths), 2), generator=g).to(dtype)
    index, score = topk_search(q, keys, offsets, k, row_user=row_user, similarity="dot")
    for row, user in enumerate(row_user.tolist()):
        scores = {one: float(q[row] @ keys[one]) for one in range(int(offsets[user]), int(offsets[user + 1]))}
        best = sorted(scores, key=lambda one: (-scores[one], -one))[:k]
        assert index[row].tolist() == best + [-1] * (k - len(best))
        assert score[row, : len(best)].tolist() == [scores[one] for one in best]


def test_signed_zeros_are_equal() -> None:
    keys = torch.tensor([[0.0], [-0.0], [0.0], [-1.0]])
    index, _ = topk_search(torch.ones(1, 1), keys, torch.tensor([0, 4]), 4, similarity="dot")
    assert index.tolist() == [[2, 1, 0, 3]]


def test_cosine_ignores_length_and_a_zero_vector_is_like_nothing() -> None:
    lists = Lists(lengths=(20,), dtype=torch.float32)
    q, keys, _ = lists.tensors(1)
    keys = torch.cat([keys.detach(), torch.zeros(1, 6)])
    offsets = torch.tensor([0, 21])
    scale = torch.linspace(0.5, 1.5, 21)[:, None]
    index, score = topk_search(q, keys, offsets, 21)
    longer, _ = topk_search(q * 1e3, keys * scale, offsets, 21)
    assert torch.equal(index, longer)
    assert score[index == 20].item() == 0.0
    assert score.abs().max() <= 1 + 1e-6
    assert not topk_search(torch.zeros(1, 6), keys, offsets, 3)[1].any()


def test_pieces_and_grouping_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = Lists(lengths=(90, 7, 0, 33), dtype=torch.float32)
    _, keys, _ = lists.tensors(1)
    q_UCH = lists.normal(4, 11, 6)
    index, score = topk_search(q_UCH, keys, lists.offsets, 6)
    assert index.shape == score.shape == (4, 11, 6)
    monkeypatch.setattr(torch_impl, "_PIECE", 1)
    order = torch.randperm(44, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(4).repeat_interleave(11)[order]
    again, _ = topk_search(q_UCH.flatten(0, 1)[order], keys, lists.offsets, 6, row_user=rows)
    assert torch.equal(again, index.flatten(0, 1)[order])


def test_memory_does_not_grow_with_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    select = torch_impl._select

    def watched(score_GCL: Tensor, k: int) -> tuple[Tensor, Tensor]:
        held.append(score_GCL.numel())
        return select(score_GCL, k)

    monkeypatch.setattr(torch_impl, "_select", watched)
    lists = Lists(lengths=(3000,), dtype=torch.float32)
    topk_search(lists.normal(1, 500, 4), lists.normal(3000, 4), lists.offsets, 3)
    assert sum(held) == 500 * 3000
    assert max(held) <= torch_impl._PIECE


def test_attention_over_what_was_found_is_attention_over_all_when_all_is_found() -> None:
    lists = Lists(lengths=(8, 0, 5))
    q, keys, v = lists.tensors(3)
    index, _ = topk_search(q, keys, lists.offsets, 10, similarity="dot")
    chosen, offsets = as_lists(index)
    found = dot_attention(q, keys[chosen], offsets, values=v[chosen])
    assert error(found, dot_attention(q, keys, lists.offsets, values=v)) < 1e-12
    found.sum().backward()
    assert keys.grad is not None and bool(keys.grad.any())


def test_autocast_changes_nothing() -> None:
    lists = Lists(lengths=(40, 9), dtype=torch.float32)
    q, keys, _ = lists.tensors(1)
    exact = topk_search(q, keys, lists.offsets, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = topk_search(q, keys, lists.offsets, 12)
    assert torch.equal(found[0], exact[0]) and torch.equal(found[1], exact[1])


def test_no_gradient_flows() -> None:
    lists = Lists(lengths=(4,))
    q, keys, _ = lists.tensors(1)
    assert not topk_search(q, keys, lists.offsets, 2)[1].requires_grad


def test_what_is_refused() -> None:
    q, keys, offsets = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 2, 5])
    with pytest.raises(KernelError, match="k is 0; wanted 1 or more"):
        topk_search(q, keys, offsets, 0)
    with pytest.raises(KernelError, match="similarity is 'euclid'"):
        topk_search(q, keys, offsets, 1, similarity="euclid")  # type: ignore[arg-type]
    with pytest.raises(KernelError, match=r"bias \[N\]: axis N has size 4, but keys has N = 5"):
        topk_search(q, keys, offsets, 1, bias=torch.ones(4))
    with pytest.raises(KernelError, match=r"queries \[R, H\]: axis H has size 2"):
        topk_search(q[:, :2], keys, offsets, 1)
    with pytest.raises(KernelTypeError, match="queries has dtype torch.int64"):
        topk_search(q.long(), keys, offsets, 1)
