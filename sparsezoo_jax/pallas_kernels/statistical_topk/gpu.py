"""Statistical top-k for GPUs (Triton): a program holds one row in its registers, read once and written once.

Shapes: M rows, d columns. Statistics are vectors [M]: mean and std or, masked, count, mean, std and quantile.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, plgpu
from sparsezoo_jax.pallas_kernels.statistical_topk.quantile import normal_quantile_of
from sparsezoo_jax.pallas_kernels.statistical_topk.reference import (
    MeshAxes,
    Problem,
    RowStatistics,
    normal_quantile,
    shrink,
)
from sparsezoo_jax.pallas_kernels.tuning import launch_of

#: Most columns: 64 numbers for each of the 1,024 threads of a block, whose registers hold 64.
_LONGEST = 32_768


def refusal(x: jax.Array, split_over: MeshAxes = (), *, interpret: bool = False) -> str | None:
    """Why the kernels can't take these rows [..., d], or None if they can."""
    if split_over:
        return "takes whole rows, not the shards of several devices"
    allowed = [jnp.bfloat16, jnp.float32] + [jnp.float64] * interpret
    if x.dtype not in allowed:
        return f"takes bfloat16 and float32, not {x.dtype}"
    if x.ndim == 0 or x.size == 0:
        return "needs at least one row"
    if x.shape[-1] > _LONGEST:
        return f"holds whole rows in registers, and {x.shape[-1]} columns are too many"
    return None


def _forward_kernel(x_ref, mask_ref, y_ref, *statistics_refs, p: Problem):
    d, k = x_ref.shape[-1], p.k
    row, columns = pl.program_id(0), _columns(d)
    there = columns < d
    x = _read(x_ref, row, there)
    seen = there if mask_ref is None else _read(mask_ref, row, there) != 0
    if mask_ref is not None:
        # 32-bit integers: Triton sums neither booleans nor what float32 could not count.
        count = jnp.sum(seen.astype(jnp.int32)).astype(x.dtype)
        divisor, free = jnp.maximum(count, 1), jnp.maximum(count - p.ddof, 1)
        fraction = jnp.clip(k / divisor, 1e-6, 1 - 1e-6)
        quantile = jnp.where(count > k, -normal_quantile_of(fraction), 0)
    else:
        count, divisor, free, quantile = d, d, max(d - p.ddof, 1), normal_quantile(1 - k / d)
    mean = jnp.sum(jnp.where(seen, x, 0)) / divisor
    squares = jnp.sum(jnp.where(seen, jnp.square(x - mean), 0))
    s = RowStatistics(count, mean, jnp.sqrt(squares / free), quantile)
    y = shrink(x, s.threshold, p.huber_delta)
    if mask_ref is not None:
        y = jnp.where(seen, jnp.where(s.count > k, y, x), 0)
    plgpu.store(y_ref.at[row, columns], y.astype(y_ref.dtype), mask=there)
    for ref, value in zip(statistics_refs, (s.mean, s.std) if mask_ref is None else s, strict=True):
        ref[row] = value


def _backward_kernel(x_ref, g_ref, mask_ref, statistics_refs, dx_ref, *, p: Problem):
    d, k, huber_delta = x_ref.shape[-1], p.k, p.huber_delta
    row, columns = pl.program_id(0), _columns(d)
    there = columns < d
    x, g = _read(x_ref, row, there), _read(g_ref, row, there)
    statistics = [ref[row] for ref in statistics_refs]
    if mask_ref is not None:
        s = RowStatistics(*statistics)
        divisor, free = jnp.maximum(s.count, 1), jnp.maximum(s.count - p.ddof, 1)
    else:
        mean, std = statistics
        s = RowStatistics(d, mean, std, normal_quantile(1 - k / d))
        divisor, free = d, max(d - p.ddof, 1)
    above = x - s.threshold
    slope = jnp.clip(above / huber_delta, 0, 1) if huber_delta else (above > 0).astype(x.dtype)
    direct = g * slope
    if mask_ref is not None:
        seen = _read(mask_ref, row, there) != 0
        direct = jnp.where(seen, direct, 0)
    total = jnp.sum(direct)  # columns past the end have a gradient of 0
    a = total * s.quantile * jnp.where(s.std > 0, 1 / jnp.where(s.std > 0, s.std, 1), 0) / free
    grad = direct - (total / divisor - a * s.mean) - a * x
    if mask_ref is not None:
        grad = jnp.where(seen, jnp.where(s.count > k, grad, g), 0)
    plgpu.store(dx_ref.at[row, columns], grad.astype(dx_ref.dtype), mask=there)


def _columns(d: int) -> jax.Array:
    return jnp.arange(pl.next_power_of_2(d))


def _read(ref, row, there) -> jax.Array:
    found = plgpu.load(ref.at[row, _columns(there.size)], mask=there, other=0)
    return found if ref.dtype == jnp.int8 else found.astype(jnp.promote_types(ref.dtype, jnp.float32))


def _call(kernel, inputs: list[Any], outputs: list[Any], p: Problem, interpret: Any):
    """Run `kernel` with a program for each row of the first input [M, d]; returns a list of outputs."""
    rows, d = inputs[0].shape
    (of_thread,) = launch_of("statistical_topk", itemsize=inputs[0].dtype.itemsize, columns=d).tiles
    # More columns a thread where there are not so many threads.
    warps = min(32, max(1, pl.next_power_of_2(d) // (32 * of_thread)))
    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(kernel, p=p),
        grid=(rows,),
        in_specs=jax.tree.map(lambda _: in_memory, inputs),
        out_specs=[in_memory] * len(outputs),
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
    )(*inputs)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _flat_mask(where: jax.Array | None) -> jax.Array | None:
    return None if where is None else _flat(where).astype(jnp.int8)


def forward(x, where, p: Problem, *, interpret: Any = False) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`statistical_topk` of rows [..., d], and the statistics that `backward` wants, [..., 1] each."""
    flat = _flat(x)
    statistic = jax.ShapeDtypeStruct(flat.shape[:1], jnp.promote_types(x.dtype, jnp.float32))
    outputs = [jax.ShapeDtypeStruct(flat.shape, x.dtype)] + [statistic] * (2 if where is None else 4)
    y, *statistics = _call(_forward_kernel, [flat, _flat_mask(where)], outputs, p, interpret)
    return y.reshape(x.shape), tuple(s.reshape(*x.shape[:-1], 1) for s in statistics)


def backward(x, where, statistics, g, p: Problem, *, interpret: Any = False) -> jax.Array:
    """Gradient at `x` from the gradient `g` of the result and the statistics that `forward` returned."""
    flat = _flat(x)
    inputs = [flat, _flat(g), _flat_mask(where), [s.reshape(-1) for s in statistics]]
    (dx,) = _call(_backward_kernel, inputs, [jax.ShapeDtypeStruct(flat.shape, x.dtype)], p, interpret)
    return dx.reshape(x.shape)
