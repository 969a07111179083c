"""The kernels of attention's statistics, for each dtype and width they claim, as ``triton_child`` compiles them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from couturier.kernels.attention_stats.triton_impl import CONFIGS, attention_columns_kernel, attention_rows_kernel

NAMED = {"q": "", "k": "", "start": "*i64", "R": "i32", "S": "i32", "scale": "fp32"}
NAMED |= dict.fromkeys(("window", "near", "far"), "i32")


def kernels(kernel: Callable[..., Any]) -> list[Any]:
    """One entry a kernel, dtype and width."""
    out = []
    for function in (attention_rows_kernel, attention_columns_kernel):
        for dtype in ("bf16", "fp32"):
            for width in (32, 64, 128):
                constants: dict[str, object] = {
                    "H": 8,
                    "G": 4,
                    "D": width,
                    "BD": width,
                    "HAS_LSE": False,
                    "HAS_START": True,
                }
                constants |= {"UPCAST": False, "PRECISION": "tf32x3", **CONFIGS[0].kwargs}
                out.append(
                    kernel(
                        name=f"attention_stats/{function.fn.__name__}/{dtype}/{width}",
                        function=function,
                        types={name: NAMED.get(name, "*fp32") or f"*{dtype}" for name in function.arg_names},
                        constants={name: constants[name] for name in function.arg_names if name in constants},
                        num_warps=CONFIGS[0].num_warps,
                    )
                )
    return out
