"""The kernels of SDIM, for each dtype and width that they claim, as ``triton_child`` compiles them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from couturier.kernels.hash_sampling import BITS, GROUPS
from couturier.kernels.hash_sampling.triton_impl import CONFIGS, lookup_kernel, signature_kernel, table_kernel, tile_e

NAMED = {"planes": "*fp32", "table": "*fp32", "out": "*fp32", "codes": "*i32", "offsets": "*i64", "row_user": "*i64"}
NAMED |= {"N": "i32", "R": "i32"}
FIRST = CONFIGS[0]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def kernels(kernel: Callable[..., Any]) -> list[Any]:
    """One entry a kernel, dtype and width, at the paper's 16 groups of 3 bits."""
    out = []

    def add(function: Any, word: str, dtype: str, constants: Mapping[str, object], products: bool = True) -> None:
        out.append(
            kernel(
                name=f"hash_sampling/{function.__name__}/{dtype}/{word}",
                function=function,
                types={name: NAMED.get(name, f"*{dtype}") for name in function.arg_names},
                constants={**constants, "G": GROUPS, "L": FIRST.kwargs["L"]},
                num_warps=FIRST.num_warps,
                products=products,
            )
        )

    for dtype in DTYPES:
        for width in (32, 64, 128):
            hashed = {"D": width, "BD": width, "G2": GROUPS, "B2": 4, "PRECISION": "tf32x3"}
            tile = tile_e(DTYPES[dtype], width)
            summed = {**hashed, "E": width, "BE": tile, "S": 1 << BITS, "UPCAST": False}
            add(table_kernel, str(width), dtype, {**summed, "BACKWARD": False})
            add(table_kernel, f"{width}backward", dtype, {**summed, "BACKWARD": True})
            add(signature_kernel, str(width), dtype, hashed)
    for width in (32, 64, 128):
        # Gathers rows and adds them up: no product anywhere.
        add(lookup_kernel, str(width), "fp32", {"E": width, "BE": width, "S": 1 << BITS, "NORMALISE": True}, False)
    return out
