"""C for this processor, compiled when it is first wanted, where there is a compiler.

A file takes less than a second, so it is asked once a process and nothing is kept on disk.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILERS = ("cc", "gcc")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-Wno-psabi")
_PATIENCE_S = 120


def compiler() -> str | None:
    """The path of the C compiler that kernels are built with; None where there is none that is known to work."""
    return next(filter(None, map(shutil.which, COMPILERS)), None) if sys.platform == "linux" else None


@functools.cache
def library(source: str, **constants: int) -> ctypes.CDLL | None:
    """A C file of this folder with some constants; None where it cannot be compiled.

    Args:
        source: relative to this folder. It may include ``lanes.h``.
        constants: macros.
    """
    command = compiler()
    if command is None:
        return None
    here = Path(__file__).parent
    defined = [f"-D{name}={value}" for name, value in constants.items()]
    with tempfile.TemporaryDirectory(prefix="couturier-") as folder:
        made, linked = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        try:
            for words in (
                [*_FLAGS, *defined, f"-I{here}", "-c", str(here / source), "-o", str(made)],
                ["-shared", str(made), "-o", str(linked)],
            ):
                # Linked without OpenMP: its names are found in the one that PyTorch has loaded, with its threads.
                subprocess.run([command, *words], check=True, capture_output=True, timeout=_PATIENCE_S)
            return ctypes.CDLL(str(linked))
        except (subprocess.SubprocessError, OSError):
            return None
