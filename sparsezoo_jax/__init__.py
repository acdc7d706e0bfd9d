"""Transformers that are sparse from the first training step, in JAX and Flax NNX.

model, config, tokenizer = sparsezoo_jax.load("runs/spark-tiny")
out = model(tokens_BT)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsezoo_jax.run_dir import load as load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str):
    # Loaded on first use: `python -m sparsezoo_jax.train --help` should not wait for Orbax.
    if name == "load":
        from sparsezoo_jax.run_dir import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
