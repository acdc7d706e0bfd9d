"""Statistical top-k: keep about k entries of a row at the cost of a mean and a standard deviation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.checkpoint_names import STATISTICS
from sparsezoo_jax.pallas_kernels.dispatch import CustomVJP, dispatch, pallas, plain
from sparsezoo_jax.pallas_kernels.statistical_topk import gpu, reference, tpu
from sparsezoo_jax.pallas_kernels.statistical_topk.reference import (
    Problem,
    RowStatistics,
    normal_quantile,
    row_length,
    row_statistics,
    row_sum,
)

__all__ = ["RowStatistics", "normal_quantile", "row_statistics", "statistical_topk"]


def statistical_topk(
    x: jax.Array,
    k: float,
    *,
    axis: int = -1,
    ddof: int = 1,
    where: jax.Array | None = None,
    huber_delta: float = 0.0,
    shift: jax.Array | None = None,
    split_over: tuple[str, ...] = (),
    implementation: str | None = None,
) -> jax.Array:
    """Soft-threshold `x` so that about `k` entries along `axis` stay positive; all others become 0.

    `theta = mean(x) + std(x) * Q(1 - k/d)` and the result is `max(x - theta, 0)`: survivors are shifted down, large
    *positive* values survive, and for Gaussian rows the expected number of survivors is k. Gradients flow through the
    mean and the standard deviation, by the closed form of the operator rather than by differentiating the reductions.

    Args:
      x: any float array; statistics are float32 (float64 for float64 input) whatever its dtype.
      k: target number of survivors, 0 < k; may be fractional. `k >= d` returns `x` unchanged.
      axis: the axis of length d.
      ddof: the variance's divisor is d - ddof: 1 is the sample variance, 0 is what Gemma 3n's code has.
      where: booleans broadcastable to `x`: statistics and result cover only true entries, others are 0; a row with at
        most `k` true entries passes through.
      huber_delta: 0, or the width of the quadratic start that makes the result continuously differentiable.
      shift: float32, of size 1 along `axis`: a value near each row's mean, with which XLA takes both moments in one
        read, and can do so while it makes the row. Rounding grows with the squared distance from the mean over the
        variance: for the mean of n of the d entries that is less than d / n, whatever the data. It has no gradient,
        and can't be combined with `where`.
      split_over: within a `sharding.shard_map`, the mesh axes over which `axis` is split; mean
        and deviation are then those of whole rows, and d is their length.
      implementation: "xla", "pallas_tpu", "pallas_gpu", "pallas_tpu_interpret", "pallas_gpu_interpret" (see
        `dispatch`), or None: the kernel on TPUs and GPUs, but for rows with a mask or a shift, of other dtypes than
        bfloat16 and float32 or too long for VMEM or registers, and for arrays that the compiler partitions; "xla"
        elsewhere. With `split_over` the TPU kernel takes the statistics of the shards in one read, and XLA does the
        rest: the result and the gradient must wait for sums over the devices. On GPUs XLA does all of that.

    Returns:
      An array like `x`. Rows without an entry above the threshold (constant rows, say) are all 0.

    Raises:
      ConfigError: k or huber_delta out of range, no such implementation, or one that can't take these rows.

    Source: Spark Transformer (arXiv 2506.06644), section 3, equations of StatTop_k and Theorems 3.1 and 3.2.
    """
    require(k > 0, "statistical_topk.k", k, "must be above 0")
    require(huber_delta >= 0, "statistical_topk.huber_delta", huber_delta, "must be 0 or above")
    require(where is None or shift is None, "statistical_topk.shift", "given", "must be none with a mask")
    if where is not None:
        where = jnp.moveaxis(jnp.broadcast_to(where, x.shape), axis, -1)
    if shift is not None:
        shift = jnp.moveaxis(shift, axis, -1)
    x = jnp.moveaxis(x, axis, -1)
    p = Problem(float(k), ddof, float(huber_delta), split_over)
    # A mask has to exist in memory for a kernel, where XLA computes it in passing.
    default = where is None and shift is None
    implementations = [
        plain(CustomVJP(partial(_forward, p), partial(_backward, p))),
        *pallas(
            "tpu",
            CustomVJP(partial(_forward_on_tpu, p), partial(_backward_on_tpu, p)),
            lambda interpret: tpu.refusal(x, where, interpret=interpret),
            default=default,
        ),
        *pallas(
            "cuda",
            CustomVJP(partial(_forward_on_gpu, p), partial(_backward_on_gpu, p)),
            lambda interpret: gpu.refusal(x, split_over, interpret=interpret),
            default=default,
        ),
    ]
    apply = dispatch("statistical_topk", implementation, implementations)
    if where is None and k >= row_length(x, split_over):
        return jnp.moveaxis(x, -1, axis)
    return jnp.moveaxis(apply(x, where, shift), -1, axis)


def _forward(p: Problem, x, where, shift, statistics: RowStatistics | None = None):
    """Residuals are mean and deviation or, with a mask, all of `RowStatistics`."""
    if statistics is None:
        statistics = row_statistics(x, p.k, ddof=p.ddof, where=where, shift=shift, split_over=p.split_over)
    mean, std = (checkpoint_name(value, STATISTICS) for value in (statistics.mean, statistics.std))
    statistics = statistics._replace(mean=mean, std=std)
    y = reference.shrink(x.astype(statistics.mean.dtype), statistics.threshold, p.huber_delta)
    if where is not None:
        y = jnp.where(where, jnp.where(statistics.count > p.k, y, x), 0)
    # The count and quantile of unmasked rows are numbers, not arrays: they are made again in the backward pass.
    return y.astype(x.dtype), (statistics.mean, statistics.std) if where is None else tuple(statistics)


def _backward(p: Problem, arrays, statistics, g):
    """`g_i m_i - G (1/n + z (x_i - mean) / ((n - ddof) std))` with `G = sum_i g_i m_i` (m: slope)."""
    x, where, _ = arrays
    if where is None:
        d = row_length(x, p.split_over)
        mean, std = statistics
        s = RowStatistics(d, mean, std, normal_quantile(1 - p.k / d))
    else:
        s = RowStatistics(*statistics)
    dtype = s.mean.dtype
    g, x_upcast = g.astype(dtype), x.astype(dtype)
    above = x_upcast - s.threshold
    slope = (above > 0).astype(dtype) if p.huber_delta == 0 else jnp.clip(above / p.huber_delta, 0, 1)
    if where is not None:
        slope = jnp.where(where, slope, 0)
    direct = g * slope
    total = row_sum(direct, p.split_over)
    # A constant row has no direction in which its deviation grows: std = 0 gets the zero subgradient, not a NaN.
    inverse_std = jnp.where(s.std > 0, 1 / jnp.where(s.std > 0, s.std, 1), 0)
    a = total * s.quantile * inverse_std / jnp.maximum(s.count - p.ddof, 1)
    grad = direct - (total / jnp.maximum(s.count, 1) - a * s.mean) - a * x_upcast
    if where is not None:
        grad = jnp.where(where, jnp.where(s.count > p.k, grad, g), 0)
    return grad.astype(x.dtype), None, None


def _forward_on_tpu(p: Problem, x, where, shift, *, interpret):
    if p.split_over:
        statistics = tpu.split_statistics(x, where, p, interpret=interpret)
        return _forward(p, x, where, shift, statistics)
    return tpu.forward(x, where, p, interpret=interpret)


def _backward_on_tpu(p: Problem, arrays, statistics, g, *, interpret):
    if p.split_over:
        return _backward(p, arrays, statistics, g)
    x, where, _ = arrays
    return tpu.backward(x, where, statistics, g, p, interpret=interpret), None, None


def _forward_on_gpu(p: Problem, x, where, shift, *, interpret):
    return gpu.forward(x, where, p, interpret=interpret)


def _backward_on_gpu(p: Problem, arrays, statistics, g, *, interpret):
    x, where, _ = arrays
    return gpu.backward(x, where, statistics, g, p, interpret=interpret), None, None
