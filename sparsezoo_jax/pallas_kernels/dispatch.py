"""Choice of an operation's implementation: `None` for the platform's default, or one by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sparsezoo_jax.errors import ConfigError


def choose(operation: str, implementation: str | None, available: Mapping[str, Callable], default: str) -> Callable:
    """Return the implementation called `implementation`, or `default` when it is None.

    Raises:
      ConfigError: no implementation of that name exists for the operation.
    """
    name = implementation or default
    if name not in available:
        raise ConfigError(f"{operation}.implementation", name, f"must be one of {', '.join(sorted(available))}")
    return available[name]
