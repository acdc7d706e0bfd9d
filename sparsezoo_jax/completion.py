"""Completion of `sparsezoo` for a shell: `eval "$(sparsezoo completion bash)"` in ~/.bashrc, or zsh in ~/.zshrc."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from sparsezoo_jax.configs import PRESETS, preset
from sparsezoo_jax.errors import ConfigError, require
from sparsezoo_jax.flag_text import ALIASES, COMMANDS

SHELLS = ("bash", "zsh")
SCRIPT = """\
_sparsezoo() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD - 1]}}" choices=""
  if [ "$COMP_CWORD" = 1 ]; then
    choices="{commands} completion --version --help"
  else
    case "$before" in
      --arch) choices="{archs}" ;;
      --size) choices="{sizes}" ;;
      *) if [ "${{word#-}}" != "$word" ]; then case "${{COMP_WORDS[1]}}" in
{flags}
      esac; fi ;;
    esac
  fi
  if [ -n "$choices" ]; then
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _sparsezoo sparsezoo
"""


def main(args: Sequence[str]) -> None:
    """Print the script of a shell."""
    shell = args[0] if args else ""
    require(len(args) == 1 and shell in SHELLS, "completion", shell, f"must be {' or '.join(SHELLS)}")
    if shell == "zsh":
        print("autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit")
    print(script(), end="")


def script() -> str:
    """The script for bash, which zsh takes as well."""
    lists = {name: " ".join(flags_of(name)) for name in COMMANDS}
    return SCRIPT.format(
        commands=" ".join(COMMANDS),
        archs=" ".join(PRESETS),
        sizes=" ".join(dict.fromkeys(size for sizes in PRESETS.values() for size in sizes)),
        flags="\n".join(f'        {name}) choices="{flags}" ;;' for name, flags in lists.items()),
    )


def flags_of(name: str) -> list[str]:
    """The flags of a command; of those with a preset, those of spark's."""
    module = importlib.import_module(f"sparsezoo_jax.{name}")
    found: dict[str, None] = {}
    for command in _dataclasses(module):
        if issubclass(command, type(preset("spark"))):
            given = {field.name: getattr(preset("spark"), field.name) for field in dataclasses.fields(preset("spark"))}
            try:
                paths = _paths(command(**given))
            except ConfigError:  # needs more than a preset
                continue
            found |= dict.fromkeys([*ALIASES, *paths])
        else:
            try:
                found |= dict.fromkeys(_paths(command()))
            except (TypeError, ValueError):  # it has fields without defaults, and none with fields within
                found |= dict.fromkeys(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(command))
    return [*found, "--help"]


def _dataclasses(module: Any) -> list[Any]:
    """The dataclasses of a command's module that are flags: those that its functions are not called with otherwise."""
    return [value for value in vars(module).values() if _is_own(value, module)]


def _is_own(value: Any, module: Any) -> bool:
    return isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__


def _paths(config: Any, prefix: str = "--") -> list[str]:
    found = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        found += _paths(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return found
