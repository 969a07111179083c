"""Every kernel of target attention, for each dtype and width that it claims, as ``triton_child`` compiles it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from couturier.kernels.target_attention import triton_dot, triton_mlp

INDEX = ("tile_user", "tile_first", "row_of", "row_first", "offsets", "starts", "row_user")
FLOAT = ("out", "score", "lse", "delta", "d_score", "weight", "d_bias", "d_wp", "d_w2", "d_b2", "d_w3")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _types(function: Any, dtype: str) -> dict[str, str]:
    named = dict.fromkeys(INDEX, "*i64") | dict.fromkeys(FLOAT, "*fp32") | {"R": "i32", "scale": "fp32"}
    return {name: named.get(name, f"*{dtype}") for name in function.arg_names}


def kernels(kernel: Callable[..., Any]) -> list[Any]:
    """One entry a kernel, dtype and width of query, key and value."""
    out = []

    def add(function: Any, dtype: str, width: int, constants: Mapping[str, object], warps: int) -> None:
        name = f"target_attention/{function.__name__}/{dtype}/{width}"
        types = _types(function, dtype)
        out.append(kernel(name=name, function=function, types=types, constants=constants, num_warps=warps))

    for dtype, torch_dtype in DTYPES.items():
        for width in (32, 64, 128):
            sizes = {"H": width, "E": width, "BH": width, "BE": width, "UPCAST": False, "PRECISION": "tf32x3"}
            dot = {**sizes, "C": triton_dot.TILE_C, "L": triton_dot.tile_l(torch_dtype, width)}
            warps = triton_dot.CONFIGS[0].num_warps
            add(triton_dot.dot_fwd_kernel, dtype, width, {**dot, "HAS_BB": True, "HAS_PB": True}, warps)
            flags = {"HAS_GW": True, "SOFTMAX": True, "WANT_DQ": True}
            add(triton_dot.dot_dq_kernel, dtype, width, {**dot, **flags}, warps)
            add(triton_dot.dot_dkv_kernel, dtype, width, dot, warps)
            if dtype == "fp32" and width > 64:
                continue
            hidden = {"F": 80, "G": 40, "BF": 128, "BG": 64, "L": triton_mlp.tile_l(torch_dtype)}
            mlp = {**sizes, **hidden, "RELOAD": triton_mlp.reload(torch_dtype)}
            warps = triton_mlp.CONFIGS[0].num_warps
            add(triton_mlp.mlp_fwd_kernel, dtype, width, {**mlp, "SOFTMAX": True}, warps)
            add(triton_mlp.mlp_dkv_kernel, dtype, width, mlp, warps)
            rows = {name: value for name, value in mlp.items() if name not in ("E", "BE")}
            add(triton_mlp.mlp_dq_kernel, dtype, width, rows, warps)
    return out
