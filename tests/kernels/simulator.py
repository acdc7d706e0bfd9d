"""The TPU simulator's race detection, whose report differs between versions of jax."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu


def races(kernel: Callable[[Any], Any]) -> bool:
    """Whether `kernel(interpret)`, run by the simulator, has memory accesses that no semaphore orders."""
    try:
        jax.block_until_ready(kernel(pltpu.InterpretParams(detect_races=True)))
    except Exception as error:  # jax 0.12 raises from a callback, in one of several types
        if "RACE DETECTED" not in str(error):
            raise
        return True
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # jax 0.10 keeps the answer to itself

    return bool(interpret_pallas_call.races.races_found)
