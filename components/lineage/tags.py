"""Names and values in the form MLflow takes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_REFUSED = re.compile(r"[^\w\-./ :]")


def clean_name(name: str) -> str:
    """A name MLflow takes: ``@`` becomes ``_at_``, any other sign it refuses ``_``.

    Example:
        >>> clean_name("grpo/hit@10")
        'grpo/hit_at_10'
    """
    return _REFUSED.sub("_", name.replace("@", "_at_"))[:250]


def tag_text(value: Any, limit: int) -> str:
    """A value as text: words as they are, the rest as JSON; cut at ``limit`` characters."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def flatten(values: Any, *, joint: str, intervals: bool = False) -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and dataclasses with joined names.

    Example:
        >>> list(flatten({"a": {"b": 1}, "c": [0.5, 0.4, 0.6]}, joint="/", intervals=True))
        [('a/b', 1), ('c/mean', 0.5), ('c/low', 0.4), ('c/high', 0.6)]
    """
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = dataclasses.asdict(values)
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, Mapping):
            for inner, leaf in flatten(value, joint=joint, intervals=intervals):
                yield f"{name}{joint}{inner}", leaf
        elif intervals and _is_interval(value):
            for part, number in zip(("mean", "low", "high"), value, strict=True):
                yield f"{name}{joint}{part}", number
        else:
            yield str(name), value


def _is_interval(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(v, int | float) for v in value)
    return numbers and value[1] <= value[0] <= value[2]
