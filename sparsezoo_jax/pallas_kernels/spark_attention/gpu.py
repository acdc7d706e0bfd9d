"""Spark attention for GPUs (Triton): tiles of scores are made in registers, twice, and memory is linear in the lengths.

As on TPUs a first kernel takes the moments and the best of each query's visible scores, and a second one makes the
scores again and mixes the values. A program has one tile of queries of one head and loops over the tiles of keys that
they may see: from the first to the last of them, by positions and segments.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value head,
H head width, V width of values, I queries and J keys of a tile, X = B * N heads of queries, Y = B * K heads of keys. A
head's width is filled up to a power of two. Columns are [I, 1], lines [1, J].
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
from sparsezoo_jax.pallas_kernels.triton import product
from sparsezoo_jax.pallas_kernels.tuning import SMALLEST, Launch, fitting, launch_of

#: What arrays are filled up to multiples of: the largest tiles of any kernel.
TILES = Tiles(128, 128)
#: The narrowest operand of a matrix product.
NARROWEST = 16
#: Most columns of a head: its sums are in registers.
WIDEST = 256


# What kernels share -------------------------------------------------------------------------------------------------


def block(ref, row, tile, size: int) -> Any:
    """A tile [size, width] of `ref` [rows, T, width], to load or store."""
    return ref.at[row, pl.ds(tile * size, size), pl.ds(jnp.int32(0), ref.shape[-1])]


def blocks(refs: Sequence[Any], row, tile, size: int) -> list[jax.Array]:
    """A tile [size, width] of each of `refs` [rows, T, width]."""
    return [plgpu.load(block(ref, row, tile, size)) for ref in refs]


def lines(refs: Sequence[Any], row, tile, size: int) -> list[jax.Array]:
    """A tile [1, size] of each of `refs` [rows, 1, T]."""
    return [plgpu.load(ref.at[row, pl.ds(jnp.int32(0), 1), pl.ds(tile * size, size)]) for ref in refs]


def places(v: Visibility, *, queries_own: bool) -> list[jax.Array]:
    """Positions and segments of queries, then of keys: a program's own as columns, others as lines."""
    q_axis, k_axis = (2, 1) if queries_own else (1, 2)
    queries = [jnp.expand_dims(x, q_axis) for x in (v.query_positions_BT, v.query_segments_BT)]
    return queries + [jnp.expand_dims(x, k_axis) for x in (v.key_positions_BS, v.key_segments_BS)]


def seen(of_queries: list[jax.Array], of_keys: list[jax.Array], p: Problem) -> jax.Array:
    """Booleans of all pairs, from positions and segments of both."""
    return sees(of_queries[0], of_keys[0], of_queries[1], of_keys[1], p.window)


def arrange(q, k, v, p: Problem) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Parts of queries [X, T, width] and of keys [Y, S, width], and values [Y, S, V], in whole tiles."""
    o = prepare(q, k, v, p)
    queries = [o.q1_BKGTR] if o.q2_BKGTH is None else [o.q1_BKGTR, o.q2_BKGTH]
    keys = [o.k1_BKSR] if o.k2_BKSH is None else [o.k1_BKSR, o.k2_BKSH]
    return [rows_of_heads(x) for x in queries], [rows_of_heads(x) for x in keys], rows_of_heads(o.v_BKSV)


def rows_of_heads(x: jax.Array) -> jax.Array:
    """[..., T, width] with the dimensions before as one, and a width that products take."""
    width = max(NARROWEST, pl.next_power_of_2(x.shape[-1]))
    return padded(x, width, x.ndim - 1).reshape(-1, x.shape[-2], width)


class Call(NamedTuple):
    """What a kernel knows of its call beside its arrays, of which the first are the bounds of its loops."""

    p: Problem
    heads: int
    """Of the queries."""
    group: int
    """Those that share one of the keys'."""
    launch: Launch
    rows: int
    """Heads of all sequences, of whichever the programs have tiles of."""
    tiles: int
    """Of each."""

    def program(self) -> tuple[jax.Array, jax.Array]:
        """A program's row of heads, and tile."""
        # A grid of two dimensions would end at 65,535 tiles.
        index, rows = pl.program_id(0), jnp.int32(self.rows)
        return jax.lax.rem(index, rows), jax.lax.div(index, rows)

    def place(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Of a program that has a tile of queries: its sequence, head of queries, head of keys, and tile."""
        row, tile = self.program()
        # Causal attention's longest loops start first.
        tile = jnp.int32(self.tiles - 1) - tile
        return jax.lax.div(row, jnp.int32(self.heads)), row, jax.lax.div(row, jnp.int32(self.group)), tile

    def run(self, kernel: Callable, arrays: Sequence[Any], outputs: Any, interpret: Any) -> Any:
        """`kernel(*refs, call=self)` over all tiles."""
        whole = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(
            partial(kernel, call=self),
            grid=(self.rows * self.tiles,),
            in_specs=[whole] * len(arrays),
            out_specs=[whole] * len(outputs),
            out_shape=outputs,
            compiler_params=plgpu.CompilerParams(num_warps=self.launch.warps, num_stages=self.launch.stages),
            interpret=interpret,
            name=f"spark_attention{kernel.__name__}",
        )(*arrays)


# Forward ------------------------------------------------------------------------------------------------------------


def _moments_kernel(first_ref, stop_ref, *refs, call: Call):
    """Count and moments of each query's visible scores, merged tile by tile."""
    q_where, k_where, (q1_ref, k1_ref), out_refs = refs[:2], refs[2:4], refs[4:6], refs[6:]
    (size, k_size), p = call.launch.tiles, call.p
    sequence, row, k_row, tile = call.place()
    (q1,) = blocks([q1_ref], row, tile, size)
    of_queries = blocks(q_where, sequence, tile, size)

    def step(j, carry):
        before, moments = carry
        (k1,) = blocks([k1_ref], k_row, j, k_size)
        visible = seen(of_queries, lines(k_where, sequence, j, k_size), p)
        scores = capped(product(q1, k1, (1, 1)), p.softcap)
        here = jnp.sum(visible.astype(before.dtype), axis=-1, keepdims=True)
        count = before + here
        found = Moments.of_tile(scores, visible, here)
        return count, moments.merged(found, before, here / jnp.maximum(count, 1))

    zero = jnp.zeros((size, 1), wide(q1_ref))
    start = (zero, Moments(zero, zero, jnp.full_like(zero, NEGATIVE)))
    count, moments = jax.lax.fori_loop(first_ref[sequence, tile], stop_ref[sequence, tile], step, start)
    for ref, value in zip(out_refs, (count, *moments), strict=True):
        plgpu.store(block(ref, row, tile, size), value)


def _mix_kernel(first_ref, stop_ref, *refs, call: Call):
    """Values mixed by the selected keys' weights; normaliser and number of attended keys."""
    q_where, k_where, kept_refs = refs[:2], refs[2:4], refs[4:6]
    *part_refs, v_ref, y_ref, total_ref, attended_ref = refs[6:]
    q_refs, k_refs = part_refs[: len(part_refs) // 2], part_refs[len(part_refs) // 2 :]
    (size, k_size), p = call.launch.tiles, call.p
    sequence, row, k_row, tile = call.place()
    queries = blocks(q_refs, row, tile, size)
    of_queries, (threshold, best) = blocks(q_where, sequence, tile, size), blocks(kept_refs, row, tile, size)

    def step(j, carry):
        total, attended, mixed = carry
        *keys, v = blocks([*k_refs, v_ref], k_row, j, k_size)
        scores = capped(product(queries[0], keys[0], (1, 1)), p.softcap)
        keep = seen(of_queries, lines(k_where, sequence, j, k_size), p) & (scores >= threshold)
        weights = jnp.where(keep, jnp.exp(scores - best), 0)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        attended += jnp.sum(keep.astype(weights.dtype), axis=-1, keepdims=True)
        if len(keys) == 2:
            weights *= softplus_and_slope(capped(product(queries[1], keys[1], (1, 1)), p.softcap_values))[0]
        return total, attended, mixed + product(weights.astype(v.dtype), v, (1, 0))

    zero = jnp.zeros_like(best)
    start = (zero, zero, jnp.zeros((size, v_ref.shape[-1]), best.dtype))
    total, attended, mixed = jax.lax.fori_loop(first_ref[sequence, tile], stop_ref[sequence, tile], step, start)
    # A query that sees nothing has a softmax over nothing: its values are zero.
    y = mixed / jnp.where(total == 0, 1, total)
    for ref, value in ((y_ref, y), (total_ref, total), (attended_ref, attended)):
        plgpu.store(block(ref, row, tile, size), value.astype(ref.dtype))


def forward(q, k, v, visibility: Visibility, p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array, Any]:
    """Mixed values [B, T, N, V], attended keys [B, T, N], and what the backward kernels want of each query."""
    (batch, length, heads, _), kv_heads = q.shape, k.shape[2]
    queries, keys, values = arrange(q, k, v, p)
    seen_by = padded_visibility(visibility, p.tiles)
    rows, padded_length, _ = queries[0].shape
    column = jax.ShapeDtypeStruct((rows, padded_length, 1), wide(q))

    def run(kernel, launch: Launch, arrays, outputs):
        tiles = Tiles(*launch.tiles)
        arrays = [*bounds(seen_by, tiles)[0], *places(seen_by, queries_own=True), *arrays]
        call = Call(p, heads, heads // kv_heads, launch, rows, padded_length // tiles.queries)
        return call.run(kernel, arrays, outputs, interpret)

    launch = launch_for("moments", q, queries[:1], keys[:1])
    count, *moments = run(_moments_kernel, launch, [queries[0], keys[0]], [column] * 4)
    moments = Moments(*moments)
    threshold = threshold_of(count, moments, p)
    y, total, attended = run(
        _mix_kernel,
        launch_for("mix", q, queries, [*keys, values]),
        [threshold, moments.best, *queries, *keys, values],
        [
            jax.ShapeDtypeStruct((rows, padded_length, values.shape[-1]), v.dtype),
            column,
            jax.ShapeDtypeStruct(column.shape, jnp.int32),
        ],
    )

    def by_query(x_XTH: jax.Array) -> jax.Array:
        return from_heads(x_XTH.reshape(batch, kv_heads, -1, *x_XTH.shape[1:]), length)

    # Best and normaliser in one number.
    normaliser = moments.best + jnp.log(jnp.where(total == 0, 1, total))
    return by_query(y)[..., : v.shape[-1]], by_query(attended)[..., 0], (threshold, normaliser)


def launch_for(kernel: str, q: jax.Array, queries: Sequence[jax.Array], keys: Sequence[jax.Array]) -> Launch:
    """How to launch a kernel that reads tiles of these arrays, for heads like those of `q`."""
    launch = launch_of(f"spark_attention_{kernel}", itemsize=q.dtype.itemsize, columns=q.shape[-1])
    row = [sum(x.shape[-1] * x.dtype.itemsize for x in arrays) for arrays in (queries, keys)]
    fits = fitting(launch, *row, own=1 if kernel == "keys" else 0)
    assert fits is not None, "`refusal` refuses heads for which no tiles fit"
    return fits


def refusal(q, k, v, visibility: Any, selection: str, *, interpret: bool = False) -> str | None:
    """Why the kernels can't take these arrays, or None if they can."""
    if (shared := common.refusal(q, k, v, visibility, selection, interpret=interpret)) is not None:
        return shared
    width = max(q.shape[-1], v.shape[-1])
    if width > WIDEST:
        return f"holds whole heads in registers, and {width} columns are too many"
    # A head's two parts are filled up to half as much again as the whole.
    queries, values = 3 * pl.next_power_of_2(q.shape[-1]) // 2, pl.next_power_of_2(v.shape[-1])
    row = (queries + values) * min(q.dtype.itemsize, 4)
    smallest = Launch((SMALLEST, SMALLEST))
    return None if fitting(smallest, row, row) else f"has no tiles of {width} columns that fit into shared memory"
