"""Statistical top-k: keep about k entries of a row at the cost of a mean and a standard deviation."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.dispatch import run, settle
from sparsezoo_jax.pallas_kernels.statistical_topk import gpu, reference, tpu
from sparsezoo_jax.pallas_kernels.statistical_topk.reference import (
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
      ddof: the variance's divisor is d - ddof: 1 as in the paper, 0 as in Gemma 3n.
      where: booleans broadcastable to `x`: statistics and result cover only true entries, others are 0; a row with at
        most `k` true entries passes through.
      huber_delta: 0, or the width of the quadratic start that makes the result continuously differentiable.
      shift: float32, of size 1 along `axis`: a value near each row's mean, with which XLA takes both moments in one
        read, and can do so while it makes the row. Rounding grows with the squared distance from the mean over the
        variance: for the mean of n of the d entries that is less than d / n, whatever the data. It has no gradient,
        and can't be combined with `where`.
      split_over: inside a per-device function (`sharding.per_device`), the mesh axes over which `axis` is split; mean
        and deviation are then those of whole rows, and d is their length.
      implementation: "xla", "pallas_tpu", "pallas_gpu", "pallas_tpu_interpret", "pallas_gpu_interpret" (see
        `dispatch`), or None: the kernel on TPUs and GPUs, but for rows with a mask or a shift, of other dtypes than
        bfloat16 and float32 or too long for VMEM or registers, and for arrays that the compiler partitions; "xla"
        elsewhere. With `split_over` the TPU kernel takes the statistics of the pieces in one read, and XLA does the
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
    form = settle(
        "statistical_topk",
        implementation,
        lambda interpret: tpu.why_not(x, where, interpret=interpret),
        # A mask has to exist in memory for the kernel, where XLA computes it in passing.
        kernel_by_default=where is None and shift is None,
        gpu_why_not=lambda interpret: gpu.why_not(x, split_over, interpret=interpret),
        gpu_by_default=where is None and shift is None,
    )
    if where is None and k >= row_length(x, split_over):
        return jnp.moveaxis(x, -1, axis)
    return jnp.moveaxis(_topk(x, where, shift, _Call(float(k), ddof, float(huber_delta), split_over, form)), -1, axis)


class _Call(NamedTuple):
    """What a call is besides its arrays."""

    k: float
    ddof: int
    huber_delta: float
    split_over: tuple[str, ...]
    form: str


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _topk(x, where, shift, call):
    return _topk_forward(x, where, shift, call)[0]


def _topk_forward(x, where, shift, call):
    k, ddof, huber_delta, split_over, form = call

    def xla(x, where, shift, statistics=None):
        if statistics is None:
            statistics = row_statistics(x, k, ddof=ddof, where=where, shift=shift, split_over=split_over)
        y = reference.shrink(x.astype(statistics.mean.dtype), statistics.threshold, huber_delta)
        if where is not None:
            y = jnp.where(where, jnp.where(statistics.count > k, y, x), 0)
        # The count and quantile of unmasked rows are numbers, not arrays: they are made again in the backward pass.
        kept = (statistics.mean, statistics.std) if where is None else tuple(statistics)
        return y.astype(x.dtype), kept

    def kernel(x, where, shift, *, interpret):
        if split_over:
            return xla(x, where, shift, tpu.split_statistics(x, where, k, ddof, split_over, interpret=interpret))
        return tpu.forward(x, where, k, ddof, huber_delta, interpret=interpret)

    def on_gpu(x, where, shift, *, interpret):
        return gpu.forward(x, where, k, ddof, huber_delta, interpret=interpret)

    y, kept = run(form, xla, kernel, x, where, shift, gpu=on_gpu)
    return y, (x, where, kept)


def _topk_backward(call, residuals, g):
    """`g_i m_i - G (1/n + z (x_i - mean) / ((n - ddof) std))` with `G = sum_i g_i m_i` (m: slope)."""
    k, ddof, huber_delta, split_over, form = call

    def xla(x, where, kept, g):
        if where is None:
            d = row_length(x, split_over)
            mean, std = kept
            statistics = RowStatistics(d, mean, std, normal_quantile(1 - k / d))
        else:
            statistics = RowStatistics(*kept)
        count, mean, std, z = statistics
        g = g.astype(mean.dtype)
        wide_x = x.astype(mean.dtype)
        s = wide_x - statistics.threshold
        slope = (s > 0).astype(mean.dtype) if huber_delta == 0 else jnp.clip(s / huber_delta, 0, 1)
        if where is not None:
            slope = jnp.where(where, slope, 0)
        direct = g * slope
        total = row_sum(direct, split_over)
        # A constant row has no direction in which its deviation grows: std = 0 gets the zero subgradient, not a NaN.
        inverse_std = jnp.where(std > 0, 1 / jnp.where(std > 0, std, 1), 0)
        a = total * z * inverse_std / jnp.maximum(count - ddof, 1)
        grad = direct - (total / jnp.maximum(count, 1) - a * mean) - a * wide_x
        if where is not None:
            grad = jnp.where(where, jnp.where(count > k, grad, g), 0)
        return grad.astype(x.dtype)

    def kernel(x, where, kept, g, *, interpret):
        if split_over:
            return xla(x, where, kept, g)
        return tpu.backward(x, where, kept, g, k, ddof, huber_delta, interpret=interpret)

    def on_gpu(x, where, kept, g, *, interpret):
        return gpu.backward(x, where, kept, g, k, ddof, huber_delta, interpret=interpret)

    return run(form, xla, kernel, *residuals, g, gpu=on_gpu), None, None


_topk.defvjp(_topk_forward, _topk_backward)
