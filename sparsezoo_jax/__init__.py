"""Transformers that are sparse from the first training step, in JAX and Flax NNX.

model, config, tokenizer = sparsezoo_jax.load("runs/spark-tiny")
out = model(tokens_BT)

run = sparsezoo_jax.Run("runs/mine")
run.train(sparsezoo_jax.preset("spark", "tiny", {"train.steps": 100}))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsezoo_jax.api import Run as Run
    from sparsezoo_jax.api import Trained as Trained
    from sparsezoo_jax.api import metrics as metrics
    from sparsezoo_jax.api import preset as preset
    from sparsezoo_jax.run_dir import load as load
    from sparsezoo_jax.training.writers import MetricWriter as MetricWriter

__version__ = "0.1.0"
__all__ = ["MetricWriter", "Run", "Trained", "load", "metrics", "preset"]

_HOMES = {
    "MetricWriter": "training.writers",
    "Run": "api",
    "Trained": "api",
    "load": "run_dir",
    "metrics": "api",
    "preset": "api",
}


def __getattr__(name: str):
    # Loaded on first use: `python -m sparsezoo_jax.train --help` should not wait for Orbax.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
