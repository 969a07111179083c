"""The search kernel against the reference; ``test_triton.py`` runs this, interpreted."""

from __future__ import annotations

import pytest
import torch

from couturier.kernels import dispatch
from couturier.kernels.topk_search import Similarity, topk_search

from .jagged_cases import Lists, shuffled_rows

LENGTHS = (0, 1, 2, 16, 33)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_same_behaviours_and_scores(dtype: torch.dtype, k: int, similarity: Similarity) -> None:
    lists = Lists(lengths=LENGTHS, row_user=shuffled_rows(len(LENGTHS), 7), dtype=dtype, width=12)
    q, keys, _ = lists.tensors(1)
    bias = lists.normal(lists.behaviours).detach()
    bias[5] = float("-inf")
    found = []
    for backend in ("triton", "reference"):
        with dispatch.use(backend):
            found.append(
                topk_search(q, keys, lists.offsets, k, row_user=lists.row_user, similarity=similarity, bias=bias)
            )
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_of_equals_the_newest_first() -> None:
    keys = torch.tensor([[0.0], [1.0], [-0.0], [1.0], [0.0], [-1.0], [1.0]])
    with dispatch.use("triton"):
        index, _ = topk_search(torch.ones(1, 1), keys, torch.tensor([0, 7]), 8, similarity="dot")
    assert index.tolist() == [[6, 3, 1, 4, 2, 0, 5, -1]]
