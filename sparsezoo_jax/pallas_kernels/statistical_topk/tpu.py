"""Statistical top-k for TPUs: a block of whole rows is read once, and all passes over it run in VMEM.

XLA reads the rows for the mean, for the variance and for the threshold; here both statistics and the result cost one
read and one write, and the gradient two reads and one write. Rows are taken `Tiles.sub` at a time and columns
`Tiles.chunk` at a time, so that what a loop holds fits into the registers.

Shapes: M rows, d columns. Statistics are [M, 2] (mean, std) or, masked, [M, 4] (count, mean, std, quantile).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, pltpu
from sparsezoo_jax.pallas_kernels.statistical_topk.quantile import normal_quantile_of
from sparsezoo_jax.pallas_kernels.statistical_topk.reference import (
    Problem,
    RowStatistics,
    normal_quantile,
    row_length,
    shrink,
)

#: VMEM that the double-buffered blocks may take: with the compiler's own needs below the 16 MiB of v5e and v5p.
_BLOCKS = 12 * 2**20
#: For rows so long that not even the smallest block fits into that.
_LONG_BLOCKS = 48 * 2**20
#: Chunks of columns between branches: a branch costs as many cycles as several chunks.
_UNROLLED = 32


class Tiles(NamedTuple):
    """How a kernel cuts its rows [M, d]."""

    block: int
    """Rows of a grid step, a multiple of `sub`."""
    sub: int
    """Rows worked on at a time."""
    chunk: int
    """Columns worked on at a time, a multiple of the 128 lanes."""
    vmem_limit: int | None
    """Bytes; None: the compiler's default."""


def _tiles(rows: int, d: int, arrays: list[Any]) -> Tiles | None:
    """Tiles for blocks of `arrays`, those read or written whole; None if rows are too long for VMEM."""
    masked = any(a.dtype == jnp.int8 for a in arrays)
    # A tile of registers holds 8 rows of 32 bits, 16 of 16 bits, 32 of 8 bits.
    sub, chunk = (32, 256) if masked else (16, 512)
    padded = -(-d // 128) * 128
    per_row = 2 * sum(padded * a.dtype.itemsize for a in arrays)
    fitting = _BLOCKS // per_row // sub * sub
    limit = None
    if not fitting:
        fitting = _LONG_BLOCKS // per_row // sub * sub
        limit = _LONG_BLOCKS + 8 * 2**20
    if not fitting:
        return None
    # Eight steps or more, where there are rows for them, so that reading, working and writing overlap.
    wanted = -(-rows // 8 // sub) * sub
    return Tiles(max(sub, min(fitting, wanted, 256)), sub, chunk, limit)


def refusal(x: jax.Array, where: jax.Array | None, *, interpret: bool = False) -> str | None:
    """Why the kernels can't take these rows [..., d], or None if they can."""
    allowed = [jnp.bfloat16, jnp.float32] + [jnp.float64] * interpret
    if x.dtype not in allowed:
        return f"takes bfloat16 and float32, not {x.dtype}"
    if x.ndim == 0 or x.size == 0:
        return "needs at least one row"
    arrays = [x, x, x] + ([] if where is None else [jax.ShapeDtypeStruct(x.shape, jnp.int8)])
    if _tiles(1, x.shape[-1], arrays) is None:
        return f"holds whole rows in VMEM, and {x.shape[-1]} columns are too many"
    return None


def _over_chunks(d: int, chunk: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`carry = body(columns, carry)` over slices of the columns, up to `_UNROLLED` of them without a branch between."""
    full = d // chunk
    groups = full // _UNROLLED if full > _UNROLLED else 0

    def group(j, carry):
        start = j * _UNROLLED * chunk
        for i in range(_UNROLLED):
            carry = body(pl.ds(pl.multiple_of(start + i * chunk, chunk), chunk), carry)
        return carry

    if groups:
        carry = jax.lax.fori_loop(0, groups, group, carry)
    for i in range(groups * _UNROLLED, full):
        carry = body(pl.ds(i * chunk, chunk), carry)
    return body(pl.ds(full * chunk, d % chunk), carry) if d % chunk else carry


def _over_rows(tiles: Tiles, body: Callable[[Any], None]) -> None:
    def step(i, carry):
        body(pl.ds(pl.multiple_of(i * tiles.sub, tiles.sub), tiles.sub))
        return carry

    jax.lax.fori_loop(0, tiles.block // tiles.sub, step, 0)


def _total(d: int, tiles: Tiles, term: Callable[[Any], jax.Array], dtype: Any) -> jax.Array:
    """Sum of `term(columns)` [sub, width] over all columns, [sub, 1] in `dtype`.

    Chunks add up elementwise and are summed along the lanes once: such a sum takes a hundred cycles to come back.
    """
    total = jnp.zeros((tiles.sub, 1), dtype)
    full = d // tiles.chunk
    if full:
        partial_sums = _over_chunks(
            full * tiles.chunk, tiles.chunk, lambda c, t: t + term(c), jnp.zeros((tiles.sub, tiles.chunk), dtype)
        )
        total = jnp.sum(partial_sums, axis=-1, keepdims=True)
    if d % tiles.chunk:
        total = total + jnp.sum(term(pl.ds(full * tiles.chunk, d % tiles.chunk)), axis=-1, keepdims=True)
    return total


def _moments(tiles: Tiles, rows, x_ref, mask_ref) -> tuple[Any, jax.Array, jax.Array]:
    """Count, mean and sum of squared distances from it, [sub, 1] each (the count a number without a mask)."""
    d, read, visible = x_ref.shape[-1], _reader(x_ref), _mask_reader(mask_ref)
    dtype = read(rows, pl.ds(0, 1)).dtype
    if visible is None:
        count = divisor = d
    else:
        count = _total(d, tiles, lambda c: visible(rows, c).astype(dtype), dtype)
        divisor = jnp.maximum(count, 1)

    def of_visible(values, columns):
        return values if visible is None else jnp.where(visible(rows, columns), values, 0)

    mean = _total(d, tiles, lambda c: of_visible(read(rows, c), c), dtype) / divisor
    squares = _total(d, tiles, lambda c: of_visible(jnp.square(read(rows, c) - mean), c), dtype)
    return count, mean, squares


def _statistics(p: Problem, tiles: Tiles, rows, x_ref, mask_ref) -> RowStatistics:
    count, mean, squares = _moments(tiles, rows, x_ref, mask_ref)
    if mask_ref is None:
        return RowStatistics(count, mean, jnp.sqrt(squares / max(count - p.ddof, 1)), normal_quantile(1 - p.k / count))
    std = jnp.sqrt(squares / jnp.maximum(count - p.ddof, 1))
    fraction = jnp.clip(p.k / jnp.maximum(count, 1), 1e-6, 1 - 1e-6)
    return RowStatistics(count, mean, std, jnp.where(count > p.k, -normal_quantile_of(fraction), 0))


def _reader(x_ref) -> Callable[[Any, Any], jax.Array]:
    dtype = jnp.promote_types(x_ref.dtype, jnp.float32)
    return lambda rows, columns: x_ref[rows, columns].astype(dtype)


def _mask_reader(mask_ref) -> Callable[[Any, Any], jax.Array] | None:
    # Not every generation compares 8-bit integers.
    return None if mask_ref is None else lambda rows, columns: mask_ref[rows, columns].astype(jnp.int32) != 0


def _store_columns(ref, rows, columns) -> None:
    for i, column in enumerate(columns):
        ref[rows, pl.ds(i, 1)] = column


def _forward_kernel(x_ref, mask_ref, y_ref, statistics_ref, *, p: Problem, tiles: Tiles):
    read, visible = _reader(x_ref), _mask_reader(mask_ref)

    def work(rows):
        s = _statistics(p, tiles, rows, x_ref, mask_ref)
        threshold = s.threshold

        def write(columns, carry):
            x = read(rows, columns)
            y = shrink(x, threshold, p.huber_delta)
            if visible is not None:
                y = jnp.where(visible(rows, columns), jnp.where(s.count > p.k, y, x), 0)
            y_ref[rows, columns] = y.astype(y_ref.dtype)
            return carry

        _over_chunks(x_ref.shape[-1], tiles.chunk, write, 0)
        _store_columns(statistics_ref, rows, (s.mean, s.std) if visible is None else s)

    _over_rows(tiles, work)


def _moments_kernel(x_ref, mask_ref, out_ref, *, p: Problem, tiles: Tiles):
    del p  # moments are the same for every call

    def work(rows):
        count, mean, squares = _moments(tiles, rows, x_ref, mask_ref)
        _store_columns(out_ref, rows, (mean, squares) if mask_ref is None else (mean, squares, count))

    _over_rows(tiles, work)


def _backward_kernel(x_ref, g_ref, mask_ref, statistics_ref, dx_ref, *, p: Problem, tiles: Tiles):
    read, incoming, visible = _reader(x_ref), _reader(g_ref), _mask_reader(mask_ref)
    d = x_ref.shape[-1]

    def work(rows):
        if mask_ref is not None:
            s = RowStatistics(*(statistics_ref[rows, pl.ds(i, 1)] for i in range(4)))
            divisor, free = jnp.maximum(s.count, 1), jnp.maximum(s.count - p.ddof, 1)
        else:
            mean, std = (statistics_ref[rows, pl.ds(i, 1)] for i in range(2))
            s = RowStatistics(d, mean, std, normal_quantile(1 - p.k / d))
            divisor, free = d, max(d - p.ddof, 1)
        threshold = s.threshold

        def direct(columns):
            above = read(rows, columns) - threshold
            g = incoming(rows, columns)
            if p.huber_delta:
                g = g * jnp.clip(above / p.huber_delta, 0, 1)
            else:
                # As a product, for a gradient that is not a number must show even where the slope is 0.
                g = g * (above > 0).astype(g.dtype)
            return g if visible is None else jnp.where(visible(rows, columns), g, 0)

        total = _total(d, tiles, direct, s.mean.dtype)
        a = total * s.quantile * jnp.where(s.std > 0, 1 / jnp.where(s.std > 0, s.std, 1), 0) / free
        offset = total / divisor - a * s.mean

        def write(columns, carry):
            grad = direct(columns) - offset - a * read(rows, columns)
            if visible is not None:
                passed = jnp.where(s.count > p.k, grad, incoming(rows, columns))
                grad = jnp.where(visible(rows, columns), passed, 0)
            dx_ref[rows, columns] = grad.astype(dx_ref.dtype)
            return carry

        _over_chunks(d, tiles.chunk, write, 0)

    _over_rows(tiles, work)


def _call(kernel, inputs: list[jax.Array | None], outputs: list[Any], p: Problem, passes: int, interpret: Any):
    """Run `kernel` over blocks of rows of all arrays (the first of them rows [M, d]); returns a list of outputs."""
    rows, d = jax.tree.leaves(inputs)[0].shape
    arrays = jax.tree.leaves((inputs, outputs))
    tiles = _tiles(rows, d, [a for a in arrays if a.shape[-1] == d])
    assert tiles is not None, "`refusal` was not asked"

    def spec(a):
        return pl.BlockSpec((tiles.block, a.shape[-1]), lambda i: (i, 0))

    return pl.pallas_call(
        partial(kernel, p=p, tiles=tiles),
        grid=(-(-rows // tiles.block),),
        in_specs=jax.tree.map(spec, inputs),
        out_specs=[spec(a) for a in outputs],
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=tiles.vmem_limit),
        cost_estimate=pl.CostEstimate(
            flops=passes * rows * d,
            transcendentals=0,
            bytes_accessed=sum(rows * a.shape[-1] * a.dtype.itemsize for a in arrays),
        ),
        interpret=interpret,
        name=f"statistical_topk{kernel.__name__.removesuffix('_kernel')}",
    )(*inputs)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _flat_mask(where: jax.Array | None) -> jax.Array | None:
    return None if where is None else _flat(where).astype(jnp.int8)


def _statistics_of(x: jax.Array, columns: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.size // x.shape[-1], columns), jnp.promote_types(x.dtype, jnp.float32))


def _columns(statistics: jax.Array, leading: tuple[int, ...]) -> tuple[jax.Array, ...]:
    return tuple(statistics[:, i].reshape(*leading, 1) for i in range(statistics.shape[-1]))


def forward(x, where, p: Problem, *, interpret: Any = False) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`statistical_topk` of rows [..., d], and the statistics that `backward` wants, [..., 1] each."""
    flat = _flat(x)
    outputs = [jax.ShapeDtypeStruct(flat.shape, x.dtype), _statistics_of(x, 2 if where is None else 4)]
    y, statistics = _call(_forward_kernel, [flat, _flat_mask(where)], outputs, p, 7, interpret)
    return y.reshape(x.shape), _columns(statistics, x.shape[:-1])


def backward(x, where, statistics, g, p: Problem, *, interpret: Any = False) -> jax.Array:
    """Gradient at `x` from the gradient `g` of the result and the statistics that `forward` returned."""
    flat = _flat(x)
    inputs = [flat, _flat(g), _flat_mask(where), _flat(jnp.concatenate(statistics, axis=-1))]
    (dx,) = _call(_backward_kernel, inputs, [jax.ShapeDtypeStruct(flat.shape, x.dtype)], p, 8, interpret)
    return dx.reshape(x.shape)


def split_statistics(x, where, p: Problem, *, interpret: Any = False) -> RowStatistics:
    """Statistics of whole rows of which each device holds a shard [..., d]: one read, and sums over the devices.

    Each device takes the moments of its shard in two passes; the distances between the shards' means are added to the
    squares, so that nothing cancels. (Chan, Golub and LeVeque, The American Statistician 37, 1983.)
    """
    outputs = [_statistics_of(x, 2 if where is None else 3)]
    (found,) = _call(_moments_kernel, [_flat(x), _flat_mask(where)], outputs, p, 5, interpret)
    mean, squares, *counts = _columns(found, x.shape[:-1])
    k, ddof, over = p.k, p.ddof, p.split_over
    here = counts[0] if counts else x.shape[-1]
    d = row_length(x, over)
    count = jax.lax.psum(here, over) if counts else d
    total_mean = jax.lax.psum(here * mean, over) / jnp.maximum(count, 1)
    squares = jax.lax.psum(squares + here * jnp.square(mean - total_mean), over)
    std = jnp.sqrt(squares / jnp.maximum(count - ddof, 1))
    if not counts:
        return RowStatistics(d, total_mean, std, normal_quantile(1 - k / d))
    fraction = jnp.clip(k / jnp.maximum(count, 1), 1e-6, 1 - 1e-6)
    return RowStatistics(count, total_mean, std, jnp.where(count > k, -normal_quantile_of(fraction), 0))
