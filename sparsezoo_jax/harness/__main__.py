"""The harness' own command, which then knows runs: `python -m sparsezoo_jax.harness --model sparsezoo ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sparsezoo_jax import cli
from sparsezoo_jax.harness.tasks import import_model


def main(args: Sequence[str]) -> None:
    """Run `lm_eval` with the model `sparsezoo` registered."""
    import_model()
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    sys.argv = ["python -m sparsezoo_jax.harness", *args]
    cli_evaluate()


if __name__ == "__main__":
    cli.run(main)
