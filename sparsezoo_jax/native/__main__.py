"""Compile the native CPU operations in place, for an installation that was made without a C++ compiler.

    python -m sparsezoo_jax.native

Uses $CXX, or else g++, clang++ or c++, and the headers of the installed jaxlib: the library runs on that version of
jaxlib and newer ones. Exit status 1 if there is no compiler or it fails.
"""

from __future__ import annotations

import argparse
import sys

from sparsezoo_jax.native.build import BuildError, build


def main() -> int:
    """Build the library, say where it is; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsezoo_jax.native", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    try:
        print(f"built {build()}")
    except (BuildError, OSError) as error:
        print(f"not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
