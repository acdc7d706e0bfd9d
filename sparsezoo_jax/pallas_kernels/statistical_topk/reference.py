"""Statistical top-k in plain JAX: the definition that every other implementation must agree with.

Spark Transformer (arXiv 2506.06644), section 3: model a row as Gaussian, put the threshold at the quantile that
leaves k of d entries above it, and subtract it: `max(x - theta, 0)`. Cost is one mean and one standard deviation.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp

MeshAxes = tuple[str, ...]


class Problem(NamedTuple):
    """The arguments of `statistical_topk` that are known when it is traced."""

    k: float
    ddof: int
    huber_delta: float
    split_over: MeshAxes = ()


class RowStatistics(NamedTuple):
    """Statistics along the last axis, kept as size 1; float32, or float64 for float64 input."""

    count: jax.Array | float  # entries that feed the statistics (visible entries when masked)
    mean: jax.Array
    std: jax.Array
    quantile: jax.Array | float  # Q(1 - k/count) of the standard normal distribution

    @property
    def threshold(self) -> jax.Array:
        return self.mean + self.std * self.quantile


def normal_quantile(p: float) -> float:
    """Quantile Q(p) of the standard normal distribution for a number known when tracing."""
    return NormalDist().inv_cdf(p)


def row_sum(x: jax.Array, split_over: MeshAxes = ()) -> jax.Array:
    """Sum along the last axis, kept as size 1; over all devices that hold a shard of the rows."""
    total = jnp.sum(x, axis=-1, keepdims=True)
    return jax.lax.psum(total, split_over) if split_over else total


def row_length(x: jax.Array, split_over: MeshAxes = ()) -> int:
    """Length of whole rows of which `x` is this device's shard."""
    return x.shape[-1] * math.prod(jax.lax.axis_size(axis) for axis in split_over)


def row_statistics(
    x: jax.Array,
    k: float,
    *,
    ddof: int = 1,
    where: jax.Array | None = None,
    shift: jax.Array | None = None,
    split_over: MeshAxes = (),
) -> RowStatistics:
    """Mean, standard deviation and quantile of rows `x` [..., d] for a target count `k`.

    The variance takes two passes, or one with a `shift` (without `where`; see the package's public function), and at
    least float32: a threshold computed in bfloat16 moves the count by about 3 %.
    With `where` [..., d], only true entries count, and the quantile follows each row's own number of them. Rows with
    no more than `k` visible entries get a quantile of 0, which their caller overrides (nothing is to be dropped there).

    Within a `sharding.shard_map` that splits the rows over mesh axes, `split_over` names these, and the statistics are
    those of the whole rows.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if where is None:
        d = row_length(x, split_over)
        if shift is None:
            mean = row_sum(x, split_over) / d
            squares = row_sum(jnp.square(x - mean), split_over)
        else:
            moved = x - shift
            distance = row_sum(moved, split_over) / d
            mean = shift + distance
            squares = jnp.maximum(row_sum(jnp.square(moved), split_over) - d * jnp.square(distance), 0)
        std = jnp.sqrt(squares / max(d - ddof, 1))
        return RowStatistics(d, mean, std, normal_quantile(1 - k / d) if k < d else 0.0)
    count = row_sum(where.astype(x.dtype), split_over)
    mean = row_sum(jnp.where(where, x, 0), split_over) / jnp.maximum(count, 1)
    squares = row_sum(jnp.where(where, jnp.square(x - mean), 0), split_over)
    std = jnp.sqrt(squares / jnp.maximum(count - ddof, 1))
    quantile = quantile_of_count(count, k)
    return RowStatistics(count, mean, std, quantile)


def quantile_of_count(count: jax.Array, k: float) -> jax.Array:
    """Q(1 - k/count) for rows of `count` entries; 0 for those of no more than `k`.

    Computed as -Q(k/count), for 1 - k/count loses the tail's digits in float32.
    """
    fraction = k / jnp.maximum(count, 1)
    # The guard keeps Q(1) = inf out of rows that are kept whole, where inf * 0 would make a NaN.
    quantile = jnp.where(count > k, -jax.scipy.special.ndtri(jnp.clip(fraction, 1e-6, 1 - 1e-6)), 0)
    # One number a row: XLA for GPUs otherwise weighs for minutes how to compute it again for every entry.
    return jax.lax.optimization_barrier(quantile)


def shrink(x: jax.Array, threshold: jax.Array, huber_delta: float) -> jax.Array:
    """One-sided soft threshold `s = max(x - threshold, 0)`, optionally Huber-smoothed.

    With `huber_delta` > 0 the result is `s^2 / (2 delta)` up to `s = delta` and `s - delta/2` beyond, which makes it
    continuously differentiable. (That there is such a form is Theorem 3.2; the formula is a reconstruction.)
    """
    s = jnp.maximum(x - threshold, 0)
    if huber_delta == 0:
        return s
    return jnp.where(s <= huber_delta, jnp.square(s) / (2 * huber_delta), s - huber_delta / 2)


def statistical_topk(
    x: jax.Array,
    k: float,
    *,
    ddof: int = 1,
    where: jax.Array | None = None,
    huber_delta: float = 0.0,
    split_over: MeshAxes = (),
) -> jax.Array:
    """The definition along the last axis, differentiable by plain autodiff; see the package's public function."""
    if where is None and k >= row_length(x, split_over):
        return x
    statistics = row_statistics(x, k, ddof=ddof, where=where, split_over=split_over)
    y = shrink(x.astype(statistics.mean.dtype), statistics.threshold, huber_delta)
    if where is not None:
        y = jnp.where(where, jnp.where(statistics.count > k, y, x), 0)
    return y.astype(x.dtype)
