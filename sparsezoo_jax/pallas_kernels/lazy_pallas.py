"""Pallas as `pl`, `pltpu` and `plgpu`, imported with its first use.

Importing it takes a tenth of the time in which a command shows its `--help`, and on a CPU nothing needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas import triton as plgpu
else:

    class _Later:
        def __init__(self, module: str):
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._module), name)

    pl = _Later("jax.experimental.pallas")
    pltpu = _Later("jax.experimental.pallas.tpu")
    plgpu = _Later("jax.experimental.pallas.triton")

__all__ = ["pl", "plgpu", "pltpu"]
