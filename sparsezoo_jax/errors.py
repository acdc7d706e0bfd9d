"""The errors a user can cause, and the settings base that every configuration dataclass shares.

A command turns a `UserError` into one line on stderr and its `exit_status`; anything else is a bug and keeps its
traceback. `UserError` is deliberately no `ValueError`: pydantic and tyro would wrap a `ValueError` in several lines of
their own.
"""

from __future__ import annotations

from pydantic import ConfigDict

#: The pydantic settings of every configuration dataclass: unknown fields are errors, not typos that pass.
STRICT = ConfigDict(extra="forbid")


class UserError(Exception):
    """Bad input; the message is shown as it is. Exit status 2."""

    exit_status = 2


class ConfigError(UserError):
    """A configuration field with a value that is not allowed."""

    def __init__(self, field: str, value: object, allowed: str):
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}={value}: {allowed}")


class DataError(UserError):
    """A corpus, file or tokenizer that can't be used as given."""


class StorageError(UserError):
    """Reading or writing failed (disk full, permission, damaged file). Exit status 1."""

    exit_status = 1


class NumericsError(UserError):
    """A model that computes what is no number. Exit status 1."""

    exit_status = 1


class SparsezooWarning(UserWarning):
    """Something a user should know that does not stop the run."""


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` unless `condition` holds; `allowed` completes the sentence '<field>=<value>: ...'."""
    if not condition:
        raise ConfigError(field, value, allowed)
