"""Spark attention for TPUs: tiles of scores are made in VMEM, twice, and memory is linear in the lengths.

The threshold of a query needs the moments of all its scores, so a first kernel takes those, and a second one makes the
scores again and mixes the values. The first also finds each query's best score, which the selection always keeps: the
second needs no running maximum. Tiles in which nothing is visible are neither read nor computed.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value head,
H head width, R = r of it the predictor's, V width of values, P steps of the walk over tiles, I queries and J keys of a
tile.
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
    Operands,
    accumulator_dtype,
    arrange,
    capped,
    from_heads,
    softplus_and_slope,
    threshold_of,
)
from sparsezoo_jax.pallas_kernels.spark_attention.reference import NEGATIVE, Problem
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

#: Rows of the arrays [..., 8, T] in which one kernel leaves numbers of each query to the next: of a tile of float32.
ROWS = 8
#: Queries of a tile that a kernel works on at a time, so that what it holds of them fits into registers.
SUB = 128
#: Most steps over the tiles of all sequences: their list is in scalar memory, of 1 MiB.
STEPS = 2**17
#: Of VMEM for a kernel, in bytes.
VMEM = 64 * 2**20


class Places(NamedTuple):
    """Positions and segments of queries [B, T, 2] and keys [B, 2, S], of which a kernel sees the blocks of its tile."""

    queries: Any
    keys: Any

    @classmethod
    def of(cls, v: Visibility) -> Places:
        """Those of a visibility."""
        queries = jnp.stack([v.query_positions_BT, v.query_segments_BT], axis=-1)
        return cls(queries, jnp.stack([v.key_positions_BS, v.key_segments_BS], axis=1))

    def visible(self, rows: Any, window: int | None) -> jax.Array:
        """Which keys of the tile its queries `rows` see, booleans [rows, J]."""
        positions = self.queries[0, rows, pl.ds(0, 1)], self.keys[0, pl.ds(0, 1), :]
        segments = self.queries[0, rows, pl.ds(1, 1)], self.keys[0, pl.ds(1, 1), :]
        return sees(*positions, *segments, window)


# What kernels share -------------------------------------------------------------------------------------------------


def product(a, b, contract: tuple[int, int]) -> jax.Array:
    """The matrix product over the given axes of both, accumulated and returned in at least float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulator_dtype(a))


def to_rows(columns: list[jax.Array]) -> jax.Array:
    """Columns [I, 1] as rows [8, I], of which those left over are 0.

    In memory, columns would take 128 times their size: an array's last axis is filled up to the 128 lanes of a tile.
    """
    lanes = jax.lax.broadcasted_iota(jnp.int32, (columns[0].shape[0], 128), 1)
    packed = jnp.zeros(lanes.shape, columns[0].dtype)
    for i, column in enumerate(columns):
        packed = jnp.where(lanes == i, column, packed)
    return packed.T[:ROWS]


def to_columns(rows: jax.Array) -> jax.Array:
    """Rows [8, I] as columns [I, 8]."""
    return rows.T


def over_rows(tiles: Tiles, body: Callable[[Any], None]) -> None:
    """Call `body(rows)` for one slice of `SUB` queries of the tile after another."""

    def step(i, carry):
        body(pl.ds(pl.multiple_of(i * SUB, SUB), SUB))
        return carry

    jax.lax.fori_loop(0, tiles.queries // SUB, step, 0)


class Step(NamedTuple):
    """The step of the grid that a kernel is at: which tile of scores, and what it is to its tile of queries."""

    visible: jax.Array
    """Whether any query of the tile sees any of its keys."""
    first: jax.Array
    """Whether it is the first step of its tile of queries."""
    last: jax.Array
    """Whether it is the last step of its tile of queries."""
    start: jax.Array
    """Whether it is the first step of its head."""
    tile: jax.Array
    """The number of its tile of keys."""


class Grid(NamedTuple):
    """A kernel's grid over sequences, key/value heads and the steps of a walk, and the block specs that go with it."""

    walk: Walk
    tiles: Tiles
    read_BP: jax.Array
    """The tile of keys that each step reads, as `reads` returns it."""

    @classmethod
    def over(cls, visibility: Visibility, tiles: Tiles, keys: range) -> Grid:
        """The grid over all queries and the tiles `keys` of keys; the visibility must be padded to whole tiles."""
        steps = walk(tiles, visibility.query_positions_BT.shape[1] // tiles.queries, keys, visibility)
        return cls(steps, tiles, reads(steps, tiles, visibility))

    def queries(self, group: int, width: int) -> pl.BlockSpec:
        """The block of an array [B, K, G, T, width]: the step's tile of queries, of all heads that share the keys."""
        return pl.BlockSpec((1, 1, group, self.tiles.queries, width), lambda b, h, s, *steps: (b, h, 0, steps[1][s], 0))

    def rows(self, group: int) -> pl.BlockSpec:
        """The block of an array [B, K, G, 8, T], numbers of the step's tile of queries."""
        return pl.BlockSpec((1, 1, group, ROWS, self.tiles.queries), lambda b, h, s, *steps: (b, h, 0, 0, steps[1][s]))

    def keys(self, width: int) -> pl.BlockSpec:
        """The block of an array [B, K, S, width]: the step's tile of keys."""
        return pl.BlockSpec(
            (1, 1, self.tiles.keys, width), lambda b, h, s, *steps: (b, h, self._tile(b, s, steps[0]), 0)
        )

    def places(self) -> Places:
        """The blocks of `Places`."""
        return Places(
            pl.BlockSpec((1, self.tiles.queries, 2), lambda b, h, s, *steps: (b, steps[1][s], 0)),
            pl.BlockSpec((1, 2, self.tiles.keys), lambda b, h, s, *steps: (b, 0, self._tile(b, s, steps[0]))),
        )

    def operands(self, operands: Operands) -> Operands:
        """The blocks of the arrays that there are of `operands`."""
        q1, q2 = (x if x is None else self.queries(x.shape[2], x.shape[-1]) for x in operands[:2])
        k1, k2, v = (x if x is None else self.keys(x.shape[-1]) for x in operands[2:])
        return Operands(q1, q2, k1, k2, v)

    def _tile(self, b, s, read):
        tile = read[b * len(self.walk.key_P) + s]
        return jnp.where(tile < 0, -1 - tile, tile)

    def call(
        self, kernel, inputs, in_specs, out_shapes, out_specs, scratch, heads, products: int, interpret, aliases=None
    ) -> Any:
        """Call `kernel(step, *inputs, *outputs, *scratch)`, with references in their places, for all steps.

        Args:
          kernel: a partial application of the function that names it in profiles.
          inputs, in_specs: a list of pytrees of arrays, and of the same pytrees of their blocks.
          out_shapes, out_specs: likewise of the results.
          scratch: a list of pytrees of memory in VMEM.
          heads: of keys and of queries.
          products: multiply-adds for each score.
          interpret: as in `pl.pallas_call`.
          aliases: inputs that become outputs, by their numbers among all arrays of the inputs and outputs.
        """
        steps, batch = len(self.walk.key_P), jax.tree.leaves(inputs)[0].shape[0]
        scores = batch * heads[1] * steps * self.tiles.queries * self.tiles.keys
        # Every step reads a tile of keys and values; everything else moves once.
        moved = 0
        for x, spec in zip(jax.tree.leaves(inputs), jax.tree.leaves(in_specs), strict=True):
            streamed = len(spec.block_shape) == 4
            size = batch * heads[0] * steps * math.prod(spec.block_shape) if streamed else x.size
            moved += size * x.dtype.itemsize
        moved += sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(out_shapes))

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


def _moments_kernel(
    step: Step,
    places: Places,
    q1_ref,
    k1_ref,
    out_ref,
    count_ref,
    moments: Moments,
    *,
    p: Problem,
    tiles: Tiles,
    window,
):
    """Count and moments of each query's visible scores, merged tile by tile into `count_ref` and `moments`."""
    heads = range(q1_ref.shape[2])

    @pl.when(step.first)
    def _():
        for ref in (count_ref, moments.mean, moments.squares):
            ref[...] = jnp.zeros_like(ref)
        moments.best[...] = jnp.full_like(moments.best, NEGATIVE)

    @pl.when(step.visible)
    def _():
        def work(rows):
            visible = places.visible(rows, window)
            here = jnp.sum(visible.astype(count_ref.dtype), axis=-1, keepdims=True)
            before = count_ref[rows, :]
            count = before + here
            share = here / jnp.maximum(count, 1)
            count_ref[rows, :] = count
            for g in heads:
                scores = capped(product(q1_ref[0, 0, g, rows, :], k1_ref[0, 0], (1, 1)), p.softcap)
                so_far = Moments(*(ref[g, rows, :] for ref in moments))
                merged = so_far.merged(Moments.of_tile(scores, visible, here), before, share)
                for ref, value in zip(moments, merged, strict=True):
                    ref[g, rows, :] = value

        over_rows(tiles, work)

    @pl.when(step.last)
    def _():
        for g in heads:
            out_ref[0, 0, g] = to_rows([count_ref[...], *(ref[g] for ref in moments)])


def _threshold(moments_BKG8T: jax.Array, p: Problem) -> jax.Array:
    """Rows [B, K, G, 8, T] that hold each query's threshold and best score."""
    count, mean, squares, best = (moments_BKG8T[..., i, :] for i in range(4))
    threshold = threshold_of(count, Moments(mean, squares, best), p)
    return jnp.stack([threshold, best] + [jnp.zeros_like(best)] * (ROWS - 2), axis=-2)


def selected(q1, k1, visible, threshold, p: Problem) -> tuple[jax.Array, jax.Array]:
    """Scores [I, J] and booleans of the selected keys."""
    scores = capped(product(q1, k1, (1, 1)), p.softcap)
    return scores, visible & (scores >= threshold)


class MixScratch(NamedTuple):
    """What the kernel holds of a tile of queries while it goes through the keys: [G, I, 1], and `mixed` [G, I, V]."""

    threshold: Any
    best: Any
    total: Any
    """Sum of the softmax's exponentials so far."""
    attended: Any
    """Keys selected so far."""
    mixed: Any
    """Weighted sum of their values so far."""


def _mix_kernel(
    step: Step,
    places: Places,
    rows_ref,
    operands: Operands,
    y_ref,
    out_ref,
    scratch: MixScratch,
    *,
    p: Problem,
    tiles: Tiles,
    window,
):
    """Values mixed by the selected keys' weights; the softmax's sum and the number of attended keys."""
    q1_ref, q2_ref, k1_ref, k2_ref, v_ref = operands
    threshold_ref, best_ref, total_ref, attended_ref, mixed_ref = scratch
    heads = range(q1_ref.shape[2])

    @pl.when(step.first)
    def _():
        for g in heads:
            columns = to_columns(rows_ref[0, 0, g])
            threshold_ref[g], best_ref[g] = columns[:, 0:1], columns[:, 1:2]
        for ref in (total_ref, attended_ref, mixed_ref):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(step.visible)
    def _():
        def work(rows):
            visible = places.visible(rows, window)
            for g in heads:
                scores, keep = selected(q1_ref[0, 0, g, rows, :], k1_ref[0, 0], visible, threshold_ref[g, rows, :], p)
                weights = jnp.where(keep, jnp.exp(scores - best_ref[g, rows, :]), 0)
                total_ref[g, rows, :] += jnp.sum(weights, axis=-1, keepdims=True)
                attended_ref[g, rows, :] += jnp.sum(keep.astype(weights.dtype), axis=-1, keepdims=True)
                if q2_ref is not None:
                    arguments = capped(product(q2_ref[0, 0, g, rows, :], k2_ref[0, 0], (1, 1)), p.softcap_values)
                    weights = weights * softplus_and_slope(arguments)[0]
                mixed_ref[g, rows, :] += product(weights.astype(v_ref.dtype), v_ref[0, 0], (1, 0))

        over_rows(tiles, work)

    @pl.when(step.last)
    def _():
        for g in heads:
            total = total_ref[g]
            # A query that sees nothing has a softmax over nothing: its values are zero.
            y_ref[0, 0, g] = (mixed_ref[g] / jnp.where(total == 0, 1, total)).astype(y_ref.dtype)
            out_ref[0, 0, g] = to_rows([total, attended_ref[g]])


def by_sequences(function: Callable[..., Any], q, k, v, *rest: Any) -> Any:
    """`function` of arrays [B, ...], called for as many sequences at a time as the list of their steps has room for."""
    batch, tiles = q.shape[0], tiles_for(q, k)
    steps = -(-q.shape[1] // tiles.queries) * -(-k.shape[1] // tiles.keys)
    size = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * steps <= STEPS))
    if size == batch:
        return function(q, k, v, *rest)
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (q, k, v, *rest))
    results = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)


def forward(q, k, v, visibility: Visibility, p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mixed values [B, T, N, V], attended keys [B, T, N], and for `backward` rows of threshold, best score and sum.

    The rows are [B, K, G, 3, T].
    """
    (batch, queries, heads, _), kv_heads = q.shape, k.shape[2]
    group, dtype, tiles = heads // kv_heads, accumulator_dtype(q), tiles_for(q, k)
    operands = arrange(q, k, v, p, tiles)
    q1, k1, values = operands.q1, operands.k1, operands.v
    visibility = padded_visibility(visibility, tiles)
    grid = Grid.over(visibility, tiles, range(k1.shape[2] // tiles.keys))
    places = Places.of(visibility)
    static: dict[str, Any] = {"p": p, "tiles": tiles, "window": visibility.window}
    rows = jax.ShapeDtypeStruct((batch, kv_heads, group, ROWS, q1.shape[3]), dtype)

    def column(*leading: int) -> Any:
        return pltpu.VMEM((*leading, tiles.queries, 1), dtype)

    moments = grid.call(
        partial(_moments_kernel, **static),
        [places, q1, k1],
        [grid.places(), grid.queries(group, p.r), grid.keys(p.r)],
        rows,
        grid.rows(group),
        [column(), Moments(*[column(group)] * 3)],
        (kv_heads, heads),
        p.r,
        interpret,
    )
    thresholds = _threshold(moments, p)
    mixed = pltpu.VMEM((group, tiles.queries, values.shape[-1]), dtype)
    scratch = MixScratch(column(group), column(group), column(group), column(group), mixed)
    y, sums = grid.call(
        partial(_mix_kernel, **static),
        [places, thresholds, operands],
        [grid.places(), grid.rows(group), grid.operands(operands)],
        [jax.ShapeDtypeStruct((*q1.shape[:-1], values.shape[-1]), v.dtype), rows],
        [grid.queries(group, values.shape[-1]), grid.rows(group)],
        [scratch],
        (kv_heads, heads),
        p.r + (0 if p.weighting == "none" else q.shape[-1] - p.r) + v.shape[-1],
        interpret,
    )
    y = from_heads(y, queries)
    attended = from_heads(sums[..., 1, :, None], queries)[..., 0].astype(jnp.int32)
    return y, attended, jnp.stack([thresholds[..., 0, :], thresholds[..., 1, :], sums[..., 0, :]], axis=-2)


def tiles_for(q: jax.Array, k: jax.Array) -> Tiles:
    """Tiles for queries [B, T, N, H] and keys [B, S, K, H]: of the largest size, or all that there are rounded up."""
    largest = launch_of("spark_attention_tpu", itemsize=q.dtype.itemsize, columns=q.shape[-1]).tiles
    return Tiles(*(min(most, -(-x.shape[1] // 128) * 128) for most, x in zip(largest, (q, k), strict=True)))


def refusal(q, k, v, visibility: Any, selection: str, *, interpret: bool = False) -> str | None:
    """Why the kernels can't take these arrays, or None if they can."""
    if (shared := common.refusal(q, k, v, visibility, selection, interpret=interpret)) is not None:
        return shared
    tiles = tiles_for(q, k)
    steps = -(-q.shape[1] // tiles.queries) * -(-k.shape[1] // tiles.keys)
    return None if steps <= STEPS else f"walks over {steps} tiles of a head, more than {STEPS}"
