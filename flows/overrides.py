"""``--set sft.steps=10``: one value of a recipe replaced, its name and its type checked.

The words of a value are read by the type that the Config declares, so nothing is guessed and nothing is evaluated.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from couturier.components.errors import ConfigError

T = TypeVar("T")
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def override(recipe: T, settings: Iterable[str]) -> T:
    """A copy of a frozen dataclass with ``name.name=value`` settings applied in order.

    Raises:
        ConfigError: a setting has no ``=``, names nothing that exists, or has a value of the wrong type.

    Example:
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Config:
        ...     steps: int = 5
        >>> override(Config(), ["steps=10"]).steps
        10
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting!r} has no '='; write it as name=value, for example --set sft.steps=10.")
        recipe = _replaced(recipe, name.strip().split("."), text.strip(), setting)
    return recipe


def names(config: Any, prefix: str = "") -> list[str]:
    """Every dotted name that a setting may replace."""
    found: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += names(value, f"{prefix}{field.name}.")
        elif isinstance(value, Mapping):
            found += [f"{prefix}{field.name}.{key}" for key in value]
        else:
            found.append(prefix + field.name)
    return found


def _replaced(config: Any, path: list[str], text: str, setting: str) -> Any:
    hints = typing.get_type_hints(type(config))
    name, *rest = path
    known = [field.name for field in dataclasses.fields(config)]
    if name not in known:
        raise ConfigError(_unknown(setting, name, known, names(config)))
    value = getattr(config, name)
    if dataclasses.is_dataclass(value):
        if not rest:
            inside = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(value))
            raise ConfigError(f"--set {setting!r}: {name!r} is a group of settings; name one of {inside}.")
        return dataclasses.replace(config, **{name: _replaced(value, rest, text, setting)})
    if isinstance(value, Mapping) and rest:
        return dataclasses.replace(config, **{name: _entry(value, hints[name], ".".join(rest), text, setting)})
    if rest:
        raise ConfigError(f"--set {setting!r}: {name!r} is one value and has nothing inside; write {name}=VALUE.")
    return dataclasses.replace(config, **{name: _read(text, hints[name], setting)})


def _entry(values: Mapping[str, Any], hint: Any, key: str, text: str, setting: str) -> dict[str, Any]:
    if key not in values:
        raise ConfigError(_unknown(setting, key, list(values), list(values)))
    arguments = typing.get_args(hint)
    return {**values, key: _read(text, arguments[1] if len(arguments) == 2 else type(values[key]), setting)}


def _unknown(setting: str, name: str, known: list[str], everything: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if not near:  # the right leaf with the wrong or no group before it
        near = [full for full in everything if full.rpartition(".")[2] == name][:1]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"--set {setting!r}: there is no setting {name!r}.{hint} Valid here: {', '.join(known)}."


def _read(text: str, hint: Any, setting: str) -> Any:
    """``text`` as the declared type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        chosen = [choice for choice in arguments if str(choice) == text]
        if not chosen:
            raise ConfigError(f"--set {setting!r}: choose one of {', '.join(map(str, arguments))}.")
        return chosen[0]
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() in ("none", "null", ""):
            return None
        return _read(text, next(kind for kind in arguments if kind is not type(None)), setting)
    if origin in (tuple, list):
        inner = arguments[0] if arguments else str
        parts = json.loads(text) if text.startswith("[") else [part for part in text.split(",") if part.strip()]
        read = [_read(str(part).strip(), inner, setting) for part in parts]
        return tuple(read) if origin is tuple else read
    return _read_plain(text, hint, setting)


def _read_plain(text: str, hint: Any, setting: str) -> Any:
    if hint is bool:
        if text.lower() not in _WORDS:
            raise ConfigError(f"--set {setting!r}: {text!r} is no yes or no; write true or false.")
        return _WORDS[text.lower()]
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ConfigError(f"--set {setting!r}: {text!r} is not {kind}, and this setting wants one.") from None
    if hint is str:
        return text
    raise ConfigError(f"--set {setting!r}: a value of type {hint} has no form on the command line; set it in a recipe.")
