"""All commands by one name: `sparsezoo train --arch spark`, or `python -m sparsezoo_jax train --arch spark`."""

from __future__ import annotations

import difflib
import importlib
import sys

import sparsezoo_jax
from sparsezoo_jax.flag_text import COMMANDS


def main() -> None:
    """Run the command that the first argument names."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, (*COMMANDS, "completion")))
        lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
        print("usage: sparsezoo COMMAND [flags]\n\n" + (sparsezoo_jax.__doc__ or "").strip().splitlines()[0] + "\n")
        print(
            "\n".join([*lines, f"  {'completion':<{width}}  completion of commands and flags for a shell: bash or zsh"])
        )
        print("\nsparsezoo COMMAND --help says more of one; sparsezoo --version prints the version.")
        return
    name, rest = args[0], args[1:]
    if name in ("--version", "-V"):
        print(f"sparsezoo-jax {sparsezoo_jax.__version__}")
        return
    # The commands' own module sets what must be set before anything imports jax.
    from sparsezoo_jax import cli

    cli.PROGRAM = "sparsezoo "
    if name == "completion":
        from sparsezoo_jax.completion import main as completion

        cli.run(completion, rest)
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        print(f"error: {name}: must be one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        sys.exit(2)
    cli.run(importlib.import_module(f"sparsezoo_jax.{name}").main, rest)


if __name__ == "__main__":
    main()
