"""The errors people see. Every message names the setting, the value seen, the value wanted and the way out."""

from __future__ import annotations


class CouturierError(Exception):
    """Something the person at the keyboard can mend. The command line prints it as one sentence, no traceback."""


class ConfigError(CouturierError):
    """A setting is unknown, of the wrong type or outside its range."""


class DataError(CouturierError):
    """The data handed in cannot be used: a missing column, an empty table, an unreadable file."""


class ContractError(DataError):
    """The data broke a rule of the contract beyond the share that the contract allows."""


class MissingExtraError(CouturierError):
    """A package is not installed that this verb needs."""

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install -e '.[{extra}]'"
        )


class UnknownUserError(CouturierError):
    """No history is known for a user id."""


class LineageError(CouturierError):
    """An artifact, a version or a record that was asked for does not exist, or is not whole."""


class TrainingError(CouturierError):
    """A loss or a reward stopped being a number. The ids of the batch are kept for replay."""
