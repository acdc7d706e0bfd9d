"""Spark attention for GPUs (Triton): tiles of scores are made in registers, twice, and memory is linear in the lengths.

As on TPUs a first kernel takes the moments and the best of each query's visible scores, and a second one makes the
scores again and mixes the values. A program has one tile of queries of one head and loops over the tiles of keys that
they may see: from the first to the last of them, by positions and segments.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value head,
H head width, R = r predictor's part of it, V width of values, I queries and J keys of a tile, X = B * N rows of heads.
Widths are filled up to powers of two. Columns are [I, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sparsezoo_jax.pallas_kernels.spark_attention import common
from sparsezoo_jax.pallas_kernels.spark_attention.common import (
    Moments,
    Problem,
    capped,
    from_heads,
    prepare,
    softplus_and_slope,
    threshold_of,
    wide,
)
from sparsezoo_jax.pallas_kernels.spark_attention.reference import NEGATIVE
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Tiles, bounds, padded, padded_visibility
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility, sees

#: What arrays are filled up to multiples of: the largest tiles of any kernel.
TILES = Tiles(128, 128)
#: The narrowest operand of a matrix product.
NARROWEST = 16
#: Most columns of a head: its sums are in registers.
WIDEST = 256


class Launch(NamedTuple):
    """How a kernel runs."""

    tiles: Tiles
    warps: int
    stages: int
    """Tiles that a loop loads ahead."""


#: By bytes of an element; chosen by what the assembler says of registers and shared memory (docs/kernels.md).
MOMENTS = {2: Launch(Tiles(128, 64), 8, 3), 4: Launch(Tiles(64, 32), 8, 2)}
MIX = {2: Launch(Tiles(128, 32), 8, 2), 4: Launch(Tiles(32, 32), 8, 1)}


# What kernels share -------------------------------------------------------------------------------------------------


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """The matrix product over the given axes of both, in the dtype of sums."""
    # Triton would round float32 operands to 10 bits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=wide(a))


def block(ref, row, tile, size: int) -> Any:
    """Rows `tile` * size and on of `ref` [rows of heads, T, width], to load or store."""
    return ref.at[row, pl.ds(tile * size, size), pl.ds(jnp.int32(0), ref.shape[-1])]


class Where(NamedTuple):
    """Positions and segments of queries [B, T, 1] and of keys [B, 1, S]."""

    q_positions: Any
    q_segments: Any
    k_positions: Any
    k_segments: Any

    @classmethod
    def of(cls, v: Visibility) -> Where:
        queries, keys = (v.query_positions_BT, v.query_segments_BT), (v.key_positions_BS, v.key_segments_BS)
        return cls(*(x[:, :, None] for x in queries), *(x[:, None] for x in keys))

    def queries(self, sequence, tile, size: int) -> list[jax.Array]:
        """Columns [I, 1] of a tile."""
        return [plgpu.load(block(ref, sequence, tile, size)) for ref in (self.q_positions, self.q_segments)]

    def keys(self, sequence, tile, size: int) -> list[jax.Array]:
        """Rows [1, J] of a tile."""
        refs = (self.k_positions, self.k_segments)
        return [plgpu.load(r.at[sequence, pl.ds(jnp.int32(0), 1), pl.ds(tile * size, size)]) for r in refs]


def seen(queries: list[jax.Array], keys: list[jax.Array], window: int | None) -> jax.Array:
    """Booleans [I, J] of positions and segments of both."""
    return sees(queries[0], keys[0], queries[1], keys[1], window)


def selected(q1, k1, visible, threshold, p: Problem) -> tuple[jax.Array, jax.Array]:
    """Scores [I, J] and booleans of the selected keys."""
    scores = capped(product(q1, k1, (1, 1)), p.softcap)
    return scores, visible & (scores >= threshold)


def arrange(q, k, v, p: Problem) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Parts of queries [B * N, T, width] and keys [B * K, S, width], and values [B * K, S, width], in whole tiles."""
    o = prepare(q, k, v, p)
    queries = [o.q1_BKGTR] if o.q2_BKGTH is None else [o.q1_BKGTR, o.q2_BKGTH]
    keys = [o.k1_BKSR] if o.k2_BKSH is None else [o.k1_BKSR, o.k2_BKSH]
    return [rows_of_heads(x) for x in queries], [rows_of_heads(x) for x in keys], rows_of_heads(o.v_BKSV)


def rows_of_heads(x: jax.Array) -> jax.Array:
    """[..., T, width] with the dimensions before as one, and the width that products want."""
    return padded(x, padded_width(x.shape[-1]), x.ndim - 1).reshape(-1, x.shape[-2], padded_width(x.shape[-1]))


def padded_width(width: int) -> int:
    return max(NARROWEST, pl.next_power_of_2(width))


class Call(NamedTuple):
    """What all kernels of a call read first, and how they find their place in it."""

    p: Problem
    heads: int
    """Of the queries."""
    group: int
    launch: Launch

    def place(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """A program's sequence, row of heads of queries and of keys, and tile, of kernels with a row for each head."""
        row = pl.program_id(0)
        # Causal attention's longest loops start first.
        tile = pl.num_programs(1) - 1 - pl.program_id(1)
        return jax.lax.div(row, jnp.int32(self.heads)), row, jax.lax.div(row, jnp.int32(self.group)), tile

    def run(self, kernel: Callable, name: str, grid: tuple[int, int], arrays: Sequence[Any], outputs, interpret) -> Any:
        """`kernel(*refs, call=self)` over a grid of rows of heads and tiles."""
        whole = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(
            partial(kernel, call=self),
            grid=grid,
            in_specs=[whole] * len(arrays),
            out_specs=[whole] * len(outputs),
            out_shape=outputs,
            compiler_params=plgpu.CompilerParams(num_warps=self.launch.warps, num_stages=self.launch.stages),
            interpret=interpret,
            name=f"spark_attention_{name}_kernel",
        )(*arrays)


# Forward ------------------------------------------------------------------------------------------------------------


def _moments_kernel(first_ref, stop_ref, *refs, call: Call):
    """Count and moments of each query's visible scores, merged tile by tile."""
    *where_refs, q1_ref, k1_ref, count_ref, mean_ref, squares_ref, best_ref = refs
    where, tiles, p = Where(*where_refs), call.launch.tiles, call.p
    sequence, row, kv_row, tile = call.place()
    q1 = plgpu.load(block(q1_ref, row, tile, tiles.queries))
    of_queries = where.queries(sequence, tile, tiles.queries)

    def step(j, carry):
        before, moments = carry
        k1 = plgpu.load(block(k1_ref, kv_row, j, tiles.keys))
        visible = seen(of_queries, where.keys(sequence, j, tiles.keys), p.window)
        scores = capped(product(q1, k1, (1, 1)), p.softcap)
        here = jnp.sum(visible.astype(before.dtype), axis=-1, keepdims=True)
        count = before + here
        found = Moments.of_tile(scores, visible, here)
        return count, moments.merged(found, before, here / jnp.maximum(count, 1))

    zero = jnp.zeros((tiles.queries, 1), wide(q1_ref))
    start = (zero, Moments(zero, zero, jnp.full_like(zero, NEGATIVE)))
    count, moments = jax.lax.fori_loop(first_ref[sequence, tile], stop_ref[sequence, tile], step, start)
    for ref, value in zip((count_ref, mean_ref, squares_ref, best_ref), (count, *moments), strict=True):
        plgpu.store(block(ref, row, tile, tiles.queries), value)


def _mix_kernel(first_ref, stop_ref, *refs, call: Call):
    """Values mixed by the selected keys' weights; normaliser and number of attended keys."""
    *where_refs, threshold_ref, best_ref = refs[:6]
    *parts, v_ref, y_ref, total_ref, attended_ref = refs[6:]
    q_refs, k_refs = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    where, tiles, p = Where(*where_refs), call.launch.tiles, call.p
    sequence, row, kv_row, tile = call.place()
    queries = [plgpu.load(block(ref, row, tile, tiles.queries)) for ref in q_refs]
    of_queries = where.queries(sequence, tile, tiles.queries)
    threshold, best = (plgpu.load(block(ref, row, tile, tiles.queries)) for ref in (threshold_ref, best_ref))

    def step(j, carry):
        total, attended, mixed = carry
        k1, *k2 = (plgpu.load(block(ref, kv_row, j, tiles.keys)) for ref in k_refs)
        visible = seen(of_queries, where.keys(sequence, j, tiles.keys), p.window)
        scores, keep = selected(queries[0], k1, visible, threshold, p)
        weights = jnp.where(keep, jnp.exp(scores - best), 0)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        attended += jnp.sum(keep.astype(weights.dtype), axis=-1, keepdims=True)
        if k2:
            weights *= softplus_and_slope(capped(product(queries[1], k2[0], (1, 1)), p.softcap_values))[0]
        v = plgpu.load(block(v_ref, kv_row, j, tiles.keys))
        return total, attended, mixed + product(weights.astype(v.dtype), v, (1, 0))

    zero = jnp.zeros_like(best)
    start = (zero, zero, jnp.zeros((tiles.queries, v_ref.shape[-1]), best.dtype))
    total, attended, mixed = jax.lax.fori_loop(first_ref[sequence, tile], stop_ref[sequence, tile], step, start)
    # A query that sees nothing has a softmax over nothing: its values are zero.
    y = mixed / jnp.where(total == 0, 1, total)
    plgpu.store(block(y_ref, row, tile, tiles.queries), y.astype(y_ref.dtype))
    plgpu.store(block(total_ref, row, tile, tiles.queries), total)
    plgpu.store(block(attended_ref, row, tile, tiles.queries), attended.astype(jnp.int32))


def forward(q, k, v, visibility: Visibility, p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array, Any]:
    """Mixed values [B, T, N, V], attended keys [B, T, N], and what the backward kernels want of each query."""
    (batch, length, heads, _), kv_heads = q.shape, k.shape[2]
    queries, keys, values = arrange(q, k, v, p)
    seen_by = padded_visibility(visibility, p.tiles)
    where, size = Where.of(seen_by), q.dtype.itemsize
    rows, padded_length, _ = queries[0].shape
    column = jax.ShapeDtypeStruct((rows, padded_length, 1), wide(q))

    def run(kernel, name, launch: Launch, arrays, outputs):
        own, _ = bounds(seen_by, launch.tiles)
        grid = (rows, padded_length // launch.tiles.queries)
        call = Call(p, heads, heads // kv_heads, launch)
        return call.run(kernel, name, grid, [*own, *where, *arrays], outputs, interpret)

    moments = run(_moments_kernel, "moments", launch_for(MOMENTS, size), [queries[0], keys[0]], [column] * 4)
    count, moments = moments[0], Moments(*moments[1:])
    threshold = threshold_of(count, moments, p)
    y, total, attended = run(
        _mix_kernel,
        "mix",
        launch_for(MIX, size),
        [threshold, moments.best, *queries, *keys, values],
        [
            jax.ShapeDtypeStruct((rows, padded_length, values.shape[-1]), v.dtype),
            column,
            jax.ShapeDtypeStruct(column.shape, jnp.int32),
        ],
    )

    def by_query(x_XTH: jax.Array) -> jax.Array:
        return from_heads(x_XTH.reshape(batch, kv_heads, -1, *x_XTH.shape[1:]), length)

    # As a logarithm, best and normaliser are one number.
    normaliser = moments.best + jnp.log(jnp.where(total == 0, 1, total))
    return by_query(y)[..., : v.shape[-1]], by_query(attended)[..., 0], (threshold, normaliser)


def launch_for(sizes: dict[int, Launch], size: int) -> Launch:
    """For elements of `size` bytes; those of 8 are interpreted only."""
    return sizes[min(size, 4)]


def why_not(q, k, v, visibility: Any, selection: str, *, interpret: bool = False) -> str | None:
    """Why the kernels can't take these arrays, or None if they can."""
    if (why := common.why_not(q, k, v, visibility, selection, interpret=interpret)) is not None:
        return why
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"holds a tile of whole heads in registers, and {max(q.shape[-1], v.shape[-1])} columns are too many"
    return None
