"""The search kernel, for each dtype and width that it claims, as ``triton_child`` compiles it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from couturier.kernels.topk_search.triton_impl import CONFIGS, topk_search_kernel

NAMED = {"out_index": "*i64", "row_user": "*i64", "offsets": "*i64", "out_score": "*fp32", "wanted": "i32"}


def kernels(kernel: Callable[..., Any]) -> list[Any]:
    """One entry a dtype and width, at 16 and 64 wanted."""
    out = []
    for dtype in ("bf16", "fp32"):
        for width, k in ((64, 16), (128, 16), (128, 64)):
            out.append(
                kernel(
                    name=f"topk_search/topk_search_kernel/{dtype}/{width}k{k}",
                    function=topk_search_kernel,
                    types={name: NAMED.get(name, f"*{dtype}") for name in topk_search_kernel.arg_names},
                    constants={"H": width, "BH": width, "K": k, "COSINE": True, "HAS_BIAS": True},
                    num_warps=CONFIGS[0].num_warps,
                    products=False,
                )
            )
    return out
