"""Grouped matrix products for GPUs (Triton), whose work is that of the rows and not of rows times groups.

A product of rows has a program for each tile of rows of one group and each tile of columns; that for the gradient of
the weights one for each tile of a group's matrix, which loops over the group's rows. Sums are float32, in registers.

Shapes: A rows, sorted by group; E groups; I columns of the rows, O of the result; M tiles of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, plgpu
from sparsezoo_jax.pallas_kernels.triton import height, load, product, store
from sparsezoo_jax.pallas_kernels.tuning import SMALLEST, Launch, launch_of, target


class RowTiles(NamedTuple):
    """Tiles of rows, each of one group: arrays [M] of int32 or references to them. Those at the end may be empty."""

    group: Any
    """In [0, E]; E for rows of no group."""
    first: Any
    """Its first row."""
    stop: Any
    """One past the last row of its group: the tile may reach beyond."""


def row_tiles(sizes_E: jax.Array, rows: int, size: int) -> RowTiles:
    """Tiles of `size` rows for groups of these sizes, then those of the rows that are left."""
    sizes_E = sizes_E.astype(jnp.int32)
    sizes = jnp.append(sizes_E, rows - jnp.sum(sizes_E))
    last = sizes.size - 1
    # Only the last tile of a group has room left.
    most = pl.cdiv(rows, size) + min(sizes.size, rows)
    stop, tiles = jnp.cumsum(sizes), -(-sizes // size)
    tiles_stop = jnp.cumsum(tiles)
    index_M = jnp.arange(most, dtype=jnp.int32)
    # All comparisons are one operation on a GPU, a binary search is a loop of small ones.
    group_M = jnp.minimum(jnp.sum(tiles_stop <= index_M[:, None], axis=1, dtype=jnp.int32), last)
    first_M = (stop - sizes)[group_M] + (index_M - (tiles_stop - tiles)[group_M]) * size
    return RowTiles(group_M, first_M, stop[group_M])


def _place(index: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder."""
    return jax.lax.div(index, jnp.int32(count)), jax.lax.rem(index, jnp.int32(count))


def _range(start: Any, size: int) -> jax.Array:
    return start + jnp.arange(size, dtype=jnp.int32)


def _rows_kernel(tiles: RowTiles, x_ref, w_ref, y_ref, *, sizes: tuple[int, ...], inner: int, transposed: bool):
    """A tile of rows times a tile of columns of their group's matrix [I, O], or of its transpose.

    The matrices lie below each other.
    """
    size, width, depth = sizes
    outer = y_ref.shape[1]
    matrix = outer if transposed else inner
    tile, across = _place(pl.program_id(0), pl.cdiv(outer, width))
    group, first, stop = (ref[tile] for ref in tiles)
    rows, columns = _range(first, size), _range(across * width, width)
    filled, own = rows < stop, columns < outer

    def step(i, sums):
        here = _range(i * depth, depth)
        more = here < inner
        x = load(x_ref, rows, here, filled[:, None] & more[None])
        if transposed:
            return sums + product(x, load(w_ref, group * matrix + columns, here, own[:, None] & more[None]), (1, 1))
        return sums + product(x, load(w_ref, group * matrix + here, columns, more[:, None] & own[None]), (1, 0))

    # Rows of no group are 0; empty tiles have nothing to do.
    steps = jnp.where((first < stop) & (group < w_ref.shape[0] // matrix), jnp.int32(pl.cdiv(inner, depth)), 0)
    sums = jax.lax.fori_loop(jnp.int32(0), steps, step, jnp.zeros((size, width), jnp.float32))
    store(y_ref, rows, columns, filled[:, None] & own[None], sums)


def _weights_kernel(first_ref, stop_ref, x_ref, g_ref, dw_ref, *, sizes: tuple[int, ...]):
    """A tile of the product of a group's rows of x, transposed, and of g; 0 for a group without rows."""
    height, width, depth = sizes
    inner, outer = x_ref.shape[1], g_ref.shape[1]
    index, across = _place(pl.program_id(0), pl.cdiv(outer, width))
    group, down = _place(index, pl.cdiv(inner, height))
    inputs, outputs = _range(down * height, height), _range(across * width, width)
    first, stop = first_ref[group], stop_ref[group]

    def step(i, sums):
        rows = _range(first + i * depth, depth)
        filled = (rows < stop)[:, None]
        x = load(x_ref, rows, inputs, filled & (inputs < inner)[None])
        return sums + product(x, load(g_ref, rows, outputs, filled & (outputs < outer)[None]), (0, 0))

    steps = jax.lax.div(stop - first + (depth - 1), jnp.int32(depth))
    sums = jax.lax.fori_loop(jnp.int32(0), steps, step, jnp.zeros((height, width), jnp.float32))
    store(dw_ref, group * inner + inputs, outputs, (inputs < inner)[:, None] & (outputs < outer)[None], sums)


def fitted(kernel: str, dtype: jnp.dtype, sizes: Sequence[int]) -> Launch:
    """How to launch a kernel with tiles no larger than `sizes` ask for, and which the target's shared memory holds."""
    launch = launch_of(kernel, itemsize=dtype.itemsize)
    a, b, depth = (min(tile, height(size)) for tile, size in zip(launch.tiles, sizes, strict=True))
    stages, limit = launch.stages, target().shared
    while 4096 + stages * (a + b) * depth * dtype.itemsize > limit and (stages > 1 or depth > SMALLEST):
        stages, depth = (stages - 1, depth) if stages > 1 else (stages, depth // 2)
    return Launch((a, b, depth), launch.warps, stages)


def _run(
    name: str,
    kernel: Callable,
    launch: Launch,
    programs: int,
    inputs: Sequence[Any],
    result: Any,
    flops: int,
    interpret,
):
    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    moved = sum(array.size * array.dtype.itemsize for array in (*jax.tree.leaves(list(inputs)), result))
    return pl.pallas_call(
        partial(kernel, sizes=launch.tiles),
        grid=(programs,),
        in_specs=jax.tree.map(lambda _: in_memory, list(inputs)),
        out_specs=in_memory,
        out_shape=result,
        compiler_params=plgpu.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name=f"{name}_kernel",
    )(*inputs)


def times_groups(
    x_AI: jax.Array, w: jax.Array, sizes_E: jax.Array, dtype: Any, *, transposed: bool = False, interpret: Any = False
) -> jax.Array:
    """Rows times the matrix of their group, of w [E, I, O], or `transposed` [E, O, I]; 0 for rows past all groups."""
    rows, inner = x_AI.shape
    groups, outer = w.shape[0], w.shape[1 if transposed else 2]
    # Of a group's last tile half is empty on average: tiles are no taller than a group of mean size.
    launch = fitted("ragged_rows", x_AI.dtype, (pl.cdiv(rows, groups), outer, inner))
    tiles = row_tiles(sizes_E, rows, launch.tiles[0])
    kernel = partial(_rows_kernel, inner=inner, transposed=transposed)
    programs = tiles.group.size * pl.cdiv(outer, launch.tiles[1])
    inputs = [tiles, x_AI, w.reshape(-1, w.shape[2])]
    result = jax.ShapeDtypeStruct((rows, outer), dtype)
    flops = 2 * rows * inner * outer
    return _run("ragged_rows", kernel, launch, programs, inputs, result, flops, interpret)


def weight_gradient(x_AI: jax.Array, g_AO: jax.Array, sizes_E: jax.Array, *, interpret: Any = False) -> jax.Array:
    """`x_e^T g_e` of the rows of each group, [E, I, O] in the dtype of x."""
    (rows, inner), outer, groups = x_AI.shape, g_AO.shape[1], sizes_E.size
    launch = fitted("ragged_weights", x_AI.dtype, (inner, outer, rows))
    stop = jnp.cumsum(sizes_E.astype(jnp.int32))
    programs = groups * pl.cdiv(inner, launch.tiles[0]) * pl.cdiv(outer, launch.tiles[1])
    result = jax.ShapeDtypeStruct((groups * inner, outer), x_AI.dtype)
    inputs = [stop - sizes_E.astype(jnp.int32), stop, x_AI, g_AO]
    flops = 2 * rows * inner * outer
    found = _run("ragged_weights", _weights_kernel, launch, programs, inputs, result, flops, interpret)
    return found.reshape(groups, inner, outer)
