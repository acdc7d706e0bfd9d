"""Kinds from outside the package: the modules that register them, and which of these a run's configuration may name.

A module is a plugin if an installed package names it as an entry point of the group `sparsezoo_jax.kinds`, or if the
user names it (`--plugins my_module`, `load(..., plugins=["my_module"])`). Importing a module runs it, so a name that a
run's config.json gives is imported only if it is one of these.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from sparsezoo_jax.errors import SparsezooWarning, UserError

GROUP = "sparsezoo_jax.kinds"


def installed() -> dict[str, str]:
    """The modules that installed packages name as plugins, each with the name of its entry point."""
    return {point.value.partition(":")[0]: point.name for point in entry_points(group=GROUP)}


def load_installed() -> None:
    """Import the plugins of installed packages; one that can't be imported is warned of and left out."""
    for module, name in installed().items():
        try:
            importlib.import_module(module)
        except Exception as error:
            # Of all commands only those that need this package would be stopped by its fault, so it stops none here.
            message = f"plugin {name} ({module}) is left out: {type(error).__name__}: {error}"
            warnings.warn(message, SparsezooWarning, stacklevel=2)


def load_named(names: Iterable[str]) -> None:
    """Import the plugins that the user names.

    Raises:
      UserError: one can't be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise UserError(f"--plugins={name}: can't be imported ({type(error).__name__}: {error})") from error


def load_stored(names: Any, source: object) -> None:
    """Import the plugins that a stored configuration names: those of installed packages, no others.

    A module that is loaded already, because the user named it or because the program imports it, is not imported again.

    Raises:
      UserError: no list of names, or one that is neither loaded nor installed.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{source}: plugins: must be a list of names of modules")
    for name in names:
        if name in sys.modules:
            continue
        if name not in installed():
            raise UserError(
                f"{source}: plugins={name!r}: is not installed as a plugin (entry point of {GROUP}); if you trust it, "
                f"name it yourself: --plugins {name}"
            )
        load_named([name])


def needed(parts: Iterable[tuple[str, type]], named: Iterable[str]) -> tuple[str, ...]:
    """The plugins that a configuration needs to be read again: those named, and installed ones that define its parts.

    Args:
      parts: what the configuration holds of open sets, as it is called in messages, and its class.
      named: modules that the user named.

    Raises:
      UserError: a part of another module, which nobody could find again.
    """
    own = __name__.partition(".")[0]
    plugins = list(dict.fromkeys(named))
    for part, defined in parts:
        module = defined.__module__
        package = module.partition(".")[0]
        if package == own or any(package == name.partition(".")[0] for name in plugins):
            continue
        found = next((name for name in installed() if name.partition(".")[0] == package), None)
        if found is None:
            raise UserError(
                f"{part} is defined in module {module}, which is no plugin: a run with it could not be "
                f"loaded; name the module (--plugins {module}), or make it an entry point of {GROUP}"
            )
        plugins.append(found)
    return tuple(plugins)
