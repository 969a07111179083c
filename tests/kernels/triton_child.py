"""Triton in a process of its own: interpreted on the CPU, or compiled for sm_90 without a GPU.

Whether kernels are interpreted is settled when they are defined, so neither can happen inside the tests' own process.

*Interpreted*: ``interpret("interpret_<op>.py")`` runs that file's tests under ``TRITON_INTERPRET=1``.

*Compiled*: a file ``compile_<op>.py`` returns :class:`Kernel` entries from its function ``kernels()``; ``resources``
compiles them and reads registers, stack and shared memory. What was read is committed in
``kernels/resources_sm90.json``; after a deliberate change write it anew, one operator at a time, with

    python tests/kernels/triton_child.py target_attention --write
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "kernels" / "resources_sm90.json"

# What a block may ask for on an H100 or H200: 227 KB.
SHARED_LIMIT = 232_448


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel as it is launched for one dtype and width."""

    name: str
    """``op/kernel/dtype/D``, as in the table."""
    function: Any
    """The ``triton.jit`` function (not its autotuner)."""
    types: Mapping[str, str]
    """Triton type of each argument that is no constant: ``*bf16``, ``*i64``, ``i32``, ``fp32``."""
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 2
    products: bool = True
    """Whether it must run on tensor cores."""


def interpret(file: str) -> subprocess.CompletedProcess[str]:
    """Run the tests in ``tests/kernels/<file>`` with interpreted kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=HERE.parents[1])


def resources(op: str, cache: Path, only: str = "") -> dict[str, dict[str, int]]:
    """Compile the kernels of ``compile_<op>.py`` for sm_90, in a process of its own.

    Args:
        op: whose.
        cache: an empty folder.
        only: a regular expression that names must match.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "triton_child.py"), op, "--only", only]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def committed(op: str, only: str = "") -> dict[str, dict[str, int]]:
    """The table's lines of one operator."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: line for name, line in table.items() if name.startswith(f"{op}/") and re.search(only, name)}


def compile_sm90(kernel: Kernel) -> dict[str, int]:
    """Registers and stack bytes a thread, shared bytes a block, and matrix instructions of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.function.arg_names
    signature = {name: "constexpr" if name in kernel.constants else kernel.types[name] for name in names}
    constants = {(names.index(name),): value for name, value in kernel.constants.items()}
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}
    products = len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", compiled.asm["ptx"]))
    assert products or not kernel.products, f"{kernel.name} runs on scalar units"
    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": int(compiled.metadata.shared),
        "matrix_instructions": products,
    }


def _kernels(op: str) -> list[Kernel]:
    spec = importlib.util.spec_from_file_location(f"compile_{op}", HERE / f"compile_{op}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[Kernel] = module.kernels(Kernel)
    return found


def main() -> None:
    """Print the resources of an operator's kernels as one line of JSON; with ``--write`` put them into the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op")
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    chosen = [kernel for kernel in _kernels(wanted.op) if re.search(wanted.only, kernel.name)]
    found = {kernel.name: compile_sm90(kernel) for kernel in chosen}
    if wanted.write:
        table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
        kept = {name: line for name, line in table.items() if not name.startswith(f"{wanted.op}/")}
        lines = [f"  {json.dumps(name)}: {json.dumps(line)}" for name, line in sorted({**kept, **found}.items())]
        TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
