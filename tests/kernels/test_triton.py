"""Every Triton kernel: interpreted on the CPU it computes what the reference does; compiled for sm_90 it fits.

What neither sees: races between programs, the rounding of real tensor cores, uninitialised shared memory. Those are for
a run on a GPU (``python -m couturier.kernels.verify``).
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from couturier.kernels import dispatch

from . import triton_child

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not dispatch.triton_is_installed(), reason="triton is not installed: pip install -e '.[dev]' on Linux x86_64"
)

INTERPRETED = sorted(path.name for path in Path(__file__).parent.glob("interpret_*.py"))
COMPILED = sorted(path.stem.removeprefix("compile_") for path in Path(__file__).parent.glob("compile_*.py"))
# One width a kernel in the fast tests, all of them in the slow ones.
FEW = {
    "attention_stats": "bf16/64",
    "hash_sampling": "(bf16|lookup.*)/64",
    "linear_attention": "bf16/64$",
    "target_attention": "bf16/64",
    "topk_search": "bf16/64k16",
}


def test_every_operator_is_here() -> None:
    assert {name.removeprefix("interpret_").removesuffix(".py") for name in INTERPRETED} == set(dispatch.OPS)
    assert set(COMPILED) == set(dispatch.OPS)


@pytest.mark.parametrize("file", INTERPRETED)
def test_interpreted(file: str) -> None:
    done = triton_child.interpret(file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def _compare(op: str, cache: Path, only: str) -> None:
    found = triton_child.resources(op, cache, only)
    assert found
    for name, line in found.items():
        assert line["shared_bytes"] <= triton_child.SHARED_LIMIT, name
    pinned = (ROOT / "constraints.lock").read_text(encoding="utf-8")
    if f"triton=={metadata.version('triton')}\n" not in pinned:
        pytest.skip(f"triton {metadata.version('triton')} is not the one that resources_sm90.json was written with")
    assert found == triton_child.committed(op, only), f"python tests/kernels/triton_child.py {op} --write"


@pytest.mark.parametrize("op", COMPILED)
def test_compiled_for_sm_90(op: str, tmp_path: Path) -> None:
    _compare(op, tmp_path, FEW.get(op, ""))


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(FEW))
def test_every_width_compiled_for_sm_90(op: str, tmp_path: Path) -> None:
    _compare(op, tmp_path, "")


def test_importing_the_operators_imports_no_triton() -> None:
    names = ", ".join(f"couturier.kernels.{op}" for op in dispatch.OPS)
    check = f"import sys, {names}\nassert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
