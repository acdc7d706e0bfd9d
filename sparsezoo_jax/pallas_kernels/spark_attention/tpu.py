"""Spark attention for TPUs: tiles of scores are made in VMEM, twice, and memory is linear in the lengths.

The threshold of a query needs the moments of all its scores, so a first kernel takes those, and a second one makes the
scores again and mixes the values. The first also finds each query's best score, which the selection always keeps: the
second needs no running maximum. Tiles in which nothing is visible are neither read nor computed.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value head,
H head width, R = r predictor's part of it, V width of values, P steps of the walk over tiles, I queries of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import (
    FIRST,
    LAST,
    Tiles,
    Walk,
    padded_visibility,
    reads,
    walk,
)
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility, sees
from sparsezoo_jax.pallas_kernels.tuning import launch_of

#: Numbers of a query that kernels hand on, in rows of 8: the height of a tile of float32.
ROWS = 8
#: Queries worked on at a time.
SUB = 128
#: Most steps over the tiles of all sequences: their list is in scalar memory, of 1 MiB.
STEPS = 2**17
#: Of VMEM for a kernel, in bytes.
VMEM = 64 * 2**20


def where_arrays(v: Visibility) -> list[jax.Array]:
    """Positions and segments, of queries [B, T, 2] and of keys [B, 2, S]."""
    queries = jnp.stack([v.query_positions_BT, v.query_segments_BT], axis=-1)
    return [queries, jnp.stack([v.key_positions_BS, v.key_segments_BS], axis=1)]


# What kernels share -------------------------------------------------------------------------------------------------


def seen(where_q, where_k, rows: Any, window: int | None) -> jax.Array:
    """Booleans [rows, keys of the tile] from positions and segments of queries [I, 2] and keys [2, J]."""
    places = where_q[0, rows, pl.ds(0, 1)], where_k[0, pl.ds(0, 1), :]
    segments = where_q[0, rows, pl.ds(1, 1)], where_k[0, pl.ds(1, 1), :]
    return sees(*places, *segments, window)


def product(a, b, contract: tuple[int, int]) -> jax.Array:
    """The matrix product over the given axes of both, in the dtype of sums."""
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=wide(a))


def to_rows(columns: list[jax.Array]) -> jax.Array:
    """Columns [I, 1] as rows [8, I]: an array with one number in a tile of 128 lanes would be 128 times as large."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (columns[0].shape[0], 128), 1)
    packed = jnp.zeros(lanes.shape, columns[0].dtype)
    for i, column in enumerate(columns):
        packed = jnp.where(lanes == i, column, packed)
    return packed.T[:ROWS]


def to_columns(rows: jax.Array) -> jax.Array:
    """Rows [8, I] as columns [I, 8]."""
    return rows.T


def over_rows(p: Problem, body: Callable[[Any], None]) -> None:
    """`body(rows)` for slices of a tile's queries."""

    def step(i, carry):
        body(pl.ds(pl.multiple_of(i * SUB, SUB), SUB))
        return carry

    jax.lax.fori_loop(0, p.tiles.queries // SUB, step, 0)


class Step(NamedTuple):
    """Where a kernel stands."""

    visible: jax.Array
    """Whether anything in this tile of scores is."""
    first: jax.Array
    """Whether it is the first of its queries."""
    last: jax.Array
    start: jax.Array
    """Whether it is the first of all."""
    tile: jax.Array
    """Of keys."""


class Grid(NamedTuple):
    """How a kernel walks over heads and tiles, and where its arrays' blocks lie."""

    walk: Walk
    tiles: Tiles
    read_BP: jax.Array

    @classmethod
    def over(cls, visibility: Visibility, tiles: Tiles, keys: range) -> Grid:
        """Over all queries and the tiles `keys` of keys, of a visibility in whole tiles."""
        steps = walk(tiles, visibility.query_positions_BT.shape[1] // tiles.queries, keys, visibility)
        return cls(steps, tiles, reads(steps, tiles, visibility))

    def queries(self, group: int, width: int) -> pl.BlockSpec:
        """Of an array [B, K, G, T, width]."""
        return pl.BlockSpec((1, 1, group, self.tiles.queries, width), lambda b, h, s, *steps: (b, h, 0, steps[1][s], 0))

    def rows(self, group: int) -> pl.BlockSpec:
        """Of an array [B, K, G, 8, T]."""
        return pl.BlockSpec((1, 1, group, ROWS, self.tiles.queries), lambda b, h, s, *steps: (b, h, 0, 0, steps[1][s]))

    def keys(self, width: int) -> pl.BlockSpec:
        """Of an array [B, K, S, width]."""
        return pl.BlockSpec(
            (1, 1, self.tiles.keys, width), lambda b, h, s, *steps: (b, h, self._tile(b, s, steps[0]), 0)
        )

    def where(self) -> list[pl.BlockSpec]:
        """Of positions and segments, of queries [B, T, 2] and of keys [B, 2, S]."""
        return [
            pl.BlockSpec((1, self.tiles.queries, 2), lambda b, h, s, *steps: (b, steps[1][s], 0)),
            pl.BlockSpec((1, 2, self.tiles.keys), lambda b, h, s, *steps: (b, 0, self._tile(b, s, steps[0]))),
        ]

    def _tile(self, b, s, read):
        tile = read[b * len(self.walk.key_P) + s]
        return jnp.where(tile < 0, -1 - tile, tile)

    def call(
        self, kernel, inputs, in_specs, out_shapes, out_specs, scratch, heads, products: int, interpret, aliases=None
    ) -> Any:
        """Run `kernel(step, *refs)` over all steps.

        Args:
          kernel: a partial application of the function that names it in profiles.
          heads: of keys and of queries.
          products: multiply-adds for each score.
          aliases: inputs that become outputs, by their numbers.
        """
        steps, batch = len(self.walk.key_P), inputs[0].shape[0]
        scores = batch * heads[1] * steps * self.tiles.queries * self.tiles.keys
        outputs = jax.tree.leaves(out_shapes)
        # Every step reads a tile of keys and values; everything else moves once.
        streamed = [spec for spec in in_specs if len(spec.block_shape) == 4]
        sizes = {id(spec): math.prod(spec.block_shape) for spec in streamed}
        moved = sum(
            (batch * heads[0] * steps * sizes[id(spec)] if id(spec) in sizes else math.prod(x.shape)) * x.dtype.itemsize
            for x, spec in zip([*inputs, *outputs], [*in_specs, *jax.tree.leaves(out_specs)], strict=True)
        )

        def body(read_ref, query_ref, ends_ref, *refs):
            del query_ref  # the block specs have used it
            b, s = pl.program_id(0), pl.program_id(2)
            ends = ends_ref[s]
            read = read_ref[b * steps + s]
            tile = jnp.where(read < 0, -1 - read, read)
            kernel(Step(read >= 0, ends & FIRST != 0, ends & LAST != 0, s == 0, tile), *refs)

        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(batch, heads[0], steps),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=out_shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * scores, transcendentals=4 * scores, bytes_accessed=moved
            ),
            # Counted with the prefetched arrays.
            input_output_aliases={3 + i: o for i, o in (aliases or {}).items()},
            interpret=interpret,
            name=f"spark_attention{kernel.func.__name__.removesuffix('_kernel')}",
        )(self.read_BP, jnp.asarray(self.walk.query_P), jnp.asarray(self.walk.ends_P), *inputs)


# Forward ------------------------------------------------------------------------------------------------------------


def _moments_kernel(step, where_q, where_k, q1_ref, k1_ref, out_ref, count_ref, mean_ref, squares_ref, best_ref, *, p):
    """Count and moments of each query's visible scores, merged tile by tile."""
    heads = range(q1_ref.shape[2])
    refs = (mean_ref, squares_ref, best_ref)

    @pl.when(step.first)
    def _():
        for ref in (count_ref, mean_ref, squares_ref):
            ref[...] = jnp.zeros_like(ref)
        best_ref[...] = jnp.full_like(best_ref, NEGATIVE)

    @pl.when(step.visible)
    def _():
        def work(rows):
            visible = seen(where_q, where_k, rows, p.window)
            here = jnp.sum(visible.astype(count_ref.dtype), axis=-1, keepdims=True)
            before = count_ref[rows, :]
            count = before + here
            share = here / jnp.maximum(count, 1)
            count_ref[rows, :] = count
            for g in heads:
                scores = capped(product(q1_ref[0, 0, g, rows, :], k1_ref[0, 0], (1, 1)), p.softcap)
                moments = Moments(*(ref[g, rows, :] for ref in refs))
                moments = moments.merged(Moments.of_tile(scores, visible, here), before, share)
                for ref, value in zip(refs, moments, strict=True):
                    ref[g, rows, :] = value

        over_rows(p, work)

    @pl.when(step.last)
    def _():
        for g in heads:
            out_ref[0, 0, g] = to_rows([count_ref[...], mean_ref[g], squares_ref[g], best_ref[g]])


def _threshold(moments_BKG8T: jax.Array, p: Problem) -> jax.Array:
    """Rows [B, K, G, 8, T] that hold each query's threshold and best score."""
    count, mean, squares, best = (moments_BKG8T[..., i, :] for i in range(4))
    threshold = threshold_of(count, Moments(mean, squares, best), p)
    return jnp.stack([threshold, best] + [jnp.zeros_like(best)] * (ROWS - 2), axis=-2)


def selected(q1, k1, visible, threshold, p: Problem) -> tuple[jax.Array, jax.Array]:
    """Scores [I, J] and booleans of the selected keys."""
    scores = capped(product(q1, k1, (1, 1)), p.softcap)
    return scores, visible & (scores >= threshold)


def _mix_kernel(step, where_q, where_k, rows_ref, *refs, p: Problem):
    """Values mixed by the selected keys' weights; normaliser and number of attended keys."""
    weighted = p.weighting != "none"
    q1_ref, *refs = refs
    q2_ref, *refs = refs if weighted else (None, *refs)
    k1_ref, *refs = refs
    k2_ref, *refs = refs if weighted else (None, *refs)
    v_ref, y_ref, out_ref, threshold_ref, best_ref, sum_ref, attended_ref, mixed_ref = refs
    heads = range(q1_ref.shape[2])

    @pl.when(step.first)
    def _():
        for g in heads:
            columns = to_columns(rows_ref[0, 0, g])
            threshold_ref[g], best_ref[g] = columns[:, 0:1], columns[:, 1:2]
        for ref in (sum_ref, attended_ref, mixed_ref):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(step.visible)
    def _():
        def work(rows):
            visible = seen(where_q, where_k, rows, p.window)
            for g in heads:
                scores, keep = selected(q1_ref[0, 0, g, rows, :], k1_ref[0, 0], visible, threshold_ref[g, rows, :], p)
                weights = jnp.where(keep, jnp.exp(scores - best_ref[g, rows, :]), 0)
                sum_ref[g, rows, :] += jnp.sum(weights, axis=-1, keepdims=True)
                attended_ref[g, rows, :] += jnp.sum(keep.astype(weights.dtype), axis=-1, keepdims=True)
                if q2_ref is not None and k2_ref is not None:
                    arguments = capped(product(q2_ref[0, 0, g, rows, :], k2_ref[0, 0], (1, 1)), p.softcap_values)
                    weights = weights * softplus_and_slope(arguments)[0]
                mixed_ref[g, rows, :] += product(weights.astype(v_ref.dtype), v_ref[0, 0], (1, 0))

        over_rows(p, work)

    @pl.when(step.last)
    def _():
        for g in heads:
            total = sum_ref[g]
            # A query that sees nothing has a softmax over nothing: its values are zero.
            y_ref[0, 0, g] = (mixed_ref[g] / jnp.where(total == 0, 1, total)).astype(y_ref.dtype)
            out_ref[0, 0, g] = to_rows([total, attended_ref[g]])


def by_sequences(function: Callable[..., Any], p: Problem, q, k, v, *rest: Any) -> Any:
    """`function` of arrays [B, ...], of as many sequences at a time as the list of their steps has room for."""
    batch = q.shape[0]
    steps = -(-q.shape[1] // p.tiles.queries) * -(-k.shape[1] // p.tiles.keys)
    size = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * steps <= STEPS))
    if size == batch:
        return function(q, k, v, *rest)
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (q, k, v, *rest))
    results = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)


def forward(q, k, v, visibility: Visibility, p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mixed values [B, T, N, V], attended keys [B, T, N], and rows [B, K, G, 8, T] for the backward kernel."""
    (batch, queries, heads, _), kv_heads = q.shape, k.shape[2]
    group, dtype = heads // kv_heads, wide(q)
    operands = prepare(q, k, v, p)
    q1, q2, k1, k2, values = operands
    seen_by = padded_visibility(visibility, p.tiles)
    grid = Grid.over(seen_by, p.tiles, range(k1.shape[2] // p.tiles.keys))
    where = where_arrays(seen_by)
    rows = jax.ShapeDtypeStruct((batch, kv_heads, group, ROWS, q1.shape[3]), dtype)

    def column(*leading: int) -> Any:
        return pltpu.VMEM((*leading, p.tiles.queries, 1), dtype)

    moments = grid.call(
        partial(_moments_kernel, p=p),
        [*where, q1, k1],
        [*grid.where(), grid.queries(group, p.r), grid.keys(p.r)],
        rows,
        grid.rows(group),
        [column(), column(group), column(group), column(group)],
        (kv_heads, heads),
        p.r,
        interpret,
    )
    thresholds = _threshold(moments, p)
    weighted = [] if q2 is None or k2 is None else [(q2, k2)]
    y, sums = grid.call(
        partial(_mix_kernel, p=p),
        [*where, thresholds, q1, *(a for a, _ in weighted), k1, *(b for _, b in weighted), values],
        [
            *grid.where(),
            grid.rows(group),
            grid.queries(group, p.r),
            *(grid.queries(group, a.shape[-1]) for a, _ in weighted),
            grid.keys(p.r),
            *(grid.keys(b.shape[-1]) for _, b in weighted),
            grid.keys(values.shape[-1]),
        ],
        [jax.ShapeDtypeStruct((*q1.shape[:-1], values.shape[-1]), v.dtype), rows],
        [grid.queries(group, values.shape[-1]), grid.rows(group)],
        [*[column(group)] * 4, pltpu.VMEM((group, p.tiles.queries, values.shape[-1]), dtype)],
        (kv_heads, heads),
        p.r + (0 if p.weighting == "none" else q.shape[-1] - p.r) + v.shape[-1],
        interpret,
    )
    y = from_heads(y, queries)
    attended = from_heads(sums[..., 1, :, None], queries)[..., 0].astype(jnp.int32)
    kept = jnp.stack([thresholds[..., 0, :], thresholds[..., 1, :], sums[..., 0, :]], axis=-2)
    return y, attended, kept


def tiles_for(q: jax.Array, k: jax.Array) -> Tiles:
    """Tiles for queries [B, T, N, H] and keys [B, S, K, H]: few of them, or what there are rounded up."""
    largest = launch_of("spark_attention_tpu", itemsize=q.dtype.itemsize, columns=q.shape[-1]).tiles
    return Tiles(*(min(most, -(-x.shape[1] // 128) * 128) for most, x in zip(largest, (q, k), strict=True)))


def refusal(q, k, v, visibility: Any, selection: str, *, interpret: bool = False) -> str | None:
    """Why the kernels can't take these arrays, or None if they can."""
    if (shared := common.refusal(q, k, v, visibility, selection, interpret=interpret)) is not None:
        return shared
    tiles = tiles_for(q, k)
    steps = -(-q.shape[1] // tiles.queries) * -(-k.shape[1] // tiles.keys)
    return None if steps <= STEPS else f"walks over {steps} tiles of a head, more than {STEPS}"
