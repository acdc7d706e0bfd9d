"""The distribution of a count, from how often each of its values came up."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

PERCENTILES = (5, 25, 50, 75, 95)


@dataclasses.dataclass(frozen=True)
class Count:
    """Distribution of a count over tokens or queries."""

    mean: float
    std: float
    percentiles: dict[str, int]
    """Smallest count that at least this share (in %) of tokens or queries does not exceed."""


def tally(index: jax.Array, weight: jax.Array, length: int) -> jax.Array:
    """Sum of the weights at each index, int32 [length]; on the device."""
    return jnp.zeros(length, jnp.int32).at[index.reshape(-1)].add(weight.reshape(-1).astype(jnp.int32))


def count_of(times: np.ndarray) -> Count:
    """The distribution of a count that came up `times[i]` times with the value i."""
    values, rows = np.arange(len(times)), times.sum()
    mean = float(times @ values / rows)
    std = float(np.sqrt(times @ np.square(values - mean) / rows))
    below = np.cumsum(times)
    percentiles = {str(p): int(np.searchsorted(below, p / 100 * rows)) for p in PERCENTILES}
    return Count(mean, std, percentiles)
