"""Which of our own files a function depends on, so that editing one of them gives a stage a new manifest id."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from pathlib import Path

# Bookkeeping shared by every stage: it says where bytes go and what people see, never what they are.
_IGNORED = ("couturier.components.lineage", "couturier.components.console")


@functools.cache
def source_digests(module: str) -> tuple[tuple[str, str], ...]:
    """``(module name, sha256 of its file)`` for ``module`` and every couturier module it imports, directly or not.

    Imports inside functions count too. Read with ``ast``: nothing is executed.

    Example:
        >>> names = [name for name, _ in source_digests("couturier.components.files")]
        >>> names
        ['couturier.components.files']
    """
    seen: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name.startswith(_IGNORED):
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        text = Path(spec.origin).read_bytes()
        seen[name] = hashlib.sha256(text).hexdigest()
        package = name if spec.submodule_search_locations else name.rpartition(".")[0]
        waiting.extend(_imports(ast.parse(text), package))
    return tuple(sorted(seen.items()))


def _imports(tree: ast.AST, package: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{parent}.{base}".rstrip(".")
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for name in found if name.startswith("couturier.") and _exists(name)]


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
