"""What the kernels for TPUs share: their grid over tiles of scores, its blocks, and how rows and columns are moved.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value head,
P steps of the walk over tiles, I queries and J keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, pltpu
from sparsezoo_jax.pallas_kernels.spark_attention.common import Operands, accumulator_dtype, name_of
from sparsezoo_jax.pallas_kernels.spark_attention.reference import Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import FIRST, LAST, Read, Tiles, Walk, reads, walk
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility, sees
from sparsezoo_jax.pallas_kernels.tuning import launch_of

#: Rows of the arrays [..., 8, T] in which one kernel leaves numbers of each query to the next: of a tile of float32.
ROWS = 8
#: Most steps over the tiles of all sequences: their list is in scalar memory, of 1 MiB.
STEPS = 2**17
#: Of VMEM for a kernel, in bytes.
VMEM = 64 * 2**20
#: Of that for a tile of queries, all heads that share the keys, and what is summed up for it.
QUERIES = 20 * 2**20


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


class Step(NamedTuple):
    """The step of the grid that a kernel is at: which tile of scores, and what it is to its tile of queries."""

    visible: jax.Array
    """Whether any query of the tile sees any of its keys."""
    full: jax.Array
    """Whether all its queries see all its keys."""
    first: jax.Array
    """Whether it is the first step of its tile of queries."""
    last: jax.Array
    """Whether it is the last step of its tile of queries."""
    start: jax.Array
    """Whether it is the first step of its head."""
    tile: jax.Array
    """The number of its tile of keys."""


def over_rows(
    step: Step,
    places: Places,
    tiles: Tiles,
    window: int | None,
    body: Callable[[list[tuple[Any, jax.Array | None]]], None],
    slices: int = 1,
) -> None:
    """Call `body` for `slices` slices of `tiles.rows` queries after another, if the step's tile is visible.

    It gets the queries and, as `visible`, booleans [rows, J] of each slice; None where all queries of the tile see all
    its keys, as in most tiles.
    """
    slices = math.gcd(slices, tiles.queries // tiles.rows)

    def loop(full: bool) -> None:
        def of_slice(i, carry):
            starts = [pl.multiple_of((i * slices + j) * tiles.rows, tiles.rows) for j in range(slices)]
            taken = [pl.ds(start, tiles.rows) for start in starts]
            body([(rows, None if full else places.visible(rows, window)) for rows in taken])
            return carry

        jax.lax.fori_loop(0, tiles.queries // (tiles.rows * slices), of_slice, 0)

    pl.when(step.full)(lambda: loop(True))
    pl.when(step.visible & ~step.full)(lambda: loop(False))


class Grid(NamedTuple):
    """A kernel's grid over sequences, key/value heads and the steps of a walk, and the block specs that go with it."""

    walk: Walk
    tiles: Tiles
    read_BP: jax.Array
    """The tile of keys that each step reads, as `reads` returns it."""
    steps: Any
    """How many steps of the walk are taken: its length, or a number that is known when the kernel starts."""
    estimated: float
    """As many as estimates of its work count."""

    @classmethod
    def over(cls, visibility: Visibility, tiles: Tiles, keys: range) -> Grid:
        """The grid over all queries and the tiles `keys` of keys; the visibility must be padded to whole tiles."""
        steps = walk(tiles, visibility.query_positions_BT.shape[1] // tiles.queries, keys, visibility)
        return cls.taking(steps, len(steps.key_P), len(steps.key_P), tiles, visibility)

    @classmethod
    def taking(cls, steps: Walk, count: Any, estimated: float, tiles: Tiles, visibility: Visibility) -> Grid:
        """The grid over the first `count` steps of a walk; the visibility must be padded to whole tiles."""
        return cls(steps, tiles, reads(steps, tiles, visibility), count, estimated)

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
        return Read.of(read[b * len(self.walk.key_P) + s]).tile

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
        listed, batch = len(self.walk.key_P), jax.tree.leaves(inputs)[0].shape[0]
        scores = round(batch * heads[1] * self.estimated * self.tiles.queries * self.tiles.keys)
        # Every step reads a tile of keys and values; everything else moves once.
        moved = 0
        for x, spec in zip(jax.tree.leaves(inputs), jax.tree.leaves(in_specs), strict=True):
            streamed = len(spec.block_shape) == 4
            size = round(batch * heads[0] * self.estimated * math.prod(spec.block_shape)) if streamed else x.size
            moved += size * x.dtype.itemsize
        moved += sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(out_shapes))

        def body(read_ref, query_ref, ends_ref, *refs):
            del query_ref  # the block specs have used it
            b, s = pl.program_id(0), pl.program_id(2)
            ends = ends_ref[s]
            read = Read.of(read_ref[b * listed + s])
            kernel(Step(read.visible, read.full, ends & FIRST != 0, ends & LAST != 0, s == 0, read.tile), *refs)

        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(batch, heads[0], self.steps),
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
            name=f"{name_of(kernel.keywords['p'])}{kernel.func.__name__.removesuffix('_kernel')}",
        )(self.read_BP, jnp.asarray(self.walk.query_P), jnp.asarray(self.walk.ends_P), *inputs)


def by_sequences(function: Callable[..., Any], p: Problem, q, k, v, *rest: Any) -> Any:
    """`function` of arrays [B, ...], called for as many sequences at a time as the list of their steps has room for."""
    batch, tiles = q.shape[0], tiles_for(p, q, k, v)
    steps = -(-q.shape[1] // tiles.queries) * -(-k.shape[1] // tiles.keys)
    size = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * steps <= STEPS))
    if size == batch:
        return function(q, k, v, *rest)
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (q, k, v, *rest))
    results = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)


def tiles_for(p: Problem, q: jax.Array, k: jax.Array, v: jax.Array) -> Tiles:
    """Tiles for queries [B, T, N, H], keys [B, S, K, H] and values [B, S, K, V].

    They are of the largest size, or all that there are rounded up, with fewer queries where many heads share the keys,
    and fewer keys where tiles that lie across the diagonal would be many of all.
    """
    largest = list(launch_of(f"{name_of(p)}_tpu", itemsize=q.dtype.itemsize, columns=q.shape[-1]).tiles)
    while largest[1] > max(512, k.shape[1] // 4):
        largest[1] //= 2
    queries, keys = (min(most, -(-x.shape[1] // 128) * 128) for most, x in zip(largest, (q, k), strict=False))
    # Of each query in VMEM, the most that a kernel has, which is the one for gradients: blocks of it and of the
    # gradients of y and of itself, twice, for one is computed while the next moves; their sum, and three columns.
    group, (width, values) = q.shape[2] // k.shape[2], (in_lanes(x.shape[-1]) for x in (q, v))
    row = group * (2 * (width + values) * q.dtype.itemsize + 4 * (3 * width + 3 * 128))
    while queries > 128 and queries * row > QUERIES:
        queries = max(128, queries // 2 // 128 * 128)
    rows = largest[2] if queries % largest[2] == 0 else 128
    return Tiles(queries, keys, rows)


def in_lanes(columns: int) -> int:
    """Columns that an array takes in VMEM: whole tiles of 128 lanes."""
    return -(-columns // 128) * 128
