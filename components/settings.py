"""A config out of plain values: what a JSON file or a line of settings says, for commands that know no recipe."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from couturier.components.errors import ConfigError

T = TypeVar("T")


def settings_of(of: type[T], values: Mapping[str, Any], *, within: str = "") -> T:
    """A frozen config out of plain values as JSON has them; what is not named keeps its default.

    Raises:
        ConfigError: a name that the config lacks, or a value where a group belongs.

    Example:
        >>> from couturier.components.alignment.sft import Config
        >>> settings_of(Config, {"steps": 7, "generator": {"heads": 2}}).generator.heads
        2
    """
    hints, known = typing.get_type_hints(of), {field.name for field in dataclasses.fields(of)}  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"setting {within}{name} does not exist; choose among {', '.join(sorted(known))}.")
        group = dataclasses.is_dataclass(hints[name])
        if group != isinstance(value, Mapping):
            wanted = "a group of settings" if group else "one value"
            raise ConfigError(f"setting {within}{name} is {value!r}, wanted {wanted}.")
        if isinstance(value, list) and typing.get_origin(hints[name]) is tuple:
            value = tuple(value)
        found[name] = settings_of(hints[name], value, within=f"{within}{name}.") if group else value
    return of(**found)


def with_lines(values: Mapping[str, Any], lines: Iterable[str]) -> dict[str, Any]:
    """``values`` with ``name.name=value`` lines applied in order; a value is JSON, or else text.

    Raises:
        ConfigError: a line without ``=``, or one that names a place inside a single value.

    Example:
        >>> with_lines({"steps": 3}, ["steps=5", "generator.base=somewhere"])
        {'steps': 5, 'generator': {'base': 'somewhere'}}
    """
    found = json.loads(json.dumps(dict(values)))
    for line in lines:
        name, equals, text = line.partition("=")
        if not equals:
            raise ConfigError(f"--set {line!r} has no '='; write it as name=value, for example --set steps=10.")
        *path, last = name.strip().split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {line!r}: {part!r} is one value and has nothing inside.")
        try:
            place[last] = json.loads(text)
        except json.JSONDecodeError:
            place[last] = text
    return found
