"""The kernel of linear attention, for each dtype and width that it claims, as ``triton_child`` compiles it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from couturier.kernels.linear_attention.triton_impl import CONFIGS, chunk_of, linear_attention_kernel

NAMED = {"slopes": "*fp32", "offsets": "*i64", "initial": "*fp32", "final": "*fp32"}
NAMED |= {"initial_d": "i32", "initial_e": "i32"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def kernels(kernel: Callable[..., Any]) -> list[Any]:
    """One entry a dtype and width, forwards; and one that runs from the last token to the first."""
    out = []
    for dtype, torch_dtype in DTYPES.items():
        for width, reverse in ((32, False), (64, False), (128, False), (64, True)):
            constants = {
                "H": 4,
                "D": width,
                "E": width,
                "C": chunk_of(torch_dtype, width),
                "BD": width,
                "REVERSE": reverse,
                "FINAL": True,
                "UPCAST": False,
                "PRECISION": "tf32x3",
                "BE": min(width, CONFIGS[0].kwargs["BE"]),
            }
            out.append(
                kernel(
                    name=f"linear_attention/linear_attention_kernel/{dtype}/{width}{'reverse' if reverse else ''}",
                    function=linear_attention_kernel,
                    types={name: NAMED.get(name, f"*{dtype}") for name in linear_attention_kernel.arg_names},
                    constants=constants,
                    num_warps=CONFIGS[0].num_warps,
                )
            )
    return out
