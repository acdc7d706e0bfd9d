"""Spark attention for GPUs (Triton): tiles of scores are made in registers, twice, and memory is linear in the lengths.

As on TPUs a first kernel takes the moments and the best of each query's visible scores, and a second one makes the
scores again and mixes the values. A program has one tile of queries of one head and loops over the tiles of keys that
they may see: from the first to the last of them, by positions and segments.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value head,
H head width, V width of values, I queries and J keys of a tile of scores, X = B * N heads of queries of all sequences,
Y = B * K heads of keys. The width of an array is filled up to a power of two. Numbers of a tile's queries and keys are
arrays [I] and [J], and become columns [I, 1] and lines [1, J] where they meet scores: kept as these, every thread would
hold as many copies as it has scores. The program's own tile makes the rows, the tiles of its loop the columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, plgpu
from sparsezoo_jax.pallas_kernels.spark_attention import common
from sparsezoo_jax.pallas_kernels.spark_attention.common import (
    ALL,
    LOWEST_BEST,
    Moments,
    accumulator_dtype,
    bounded,
    capped,
    chosen,
    from_heads,
    name_of,
    softplus_and_slope,
    threshold_of,
)
from sparsezoo_jax.pallas_kernels.spark_attention.reference import NEGATIVE, Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Bounds, Tiles, bounds, padded, padded_visibility
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


class Parts(NamedTuple):
    """Heads of queries or of keys as kernels read them, arrays [X or Y, T, width] or references to them or to results.

    Gradients have the same form.
    """

    predictor: Any
    """The dimensions that select."""
    rest: Any
    """The other dimensions; None where there is no softplus."""
    values: Any
    """Of keys their values; of queries the gradient of y, which meets the values in products (None in the forward pass
    and in the queries' gradient)."""


class Places(NamedTuple):
    """Positions and segments of queries or of keys, arrays [B, T] or references to them, or those of a tile."""

    positions: Any
    segments: Any


def tile_ref(ref, row, tile, size: int) -> Any:
    """The reference to a tile [size, width] of `ref` [rows, T, width], to load or store."""
    return ref.at[row, pl.ds(tile * size, size), pl.ds(jnp.int32(0), ref.shape[-1])]


def load_tiles(refs: Any, row, tile, size: int) -> Any:
    """A tile [size, width] of each of `refs` [rows, T, width]."""
    return jax.tree.map(lambda ref: plgpu.load(tile_ref(ref, row, tile, size)), refs)


def numbers_ref(ref, row, tile, size: int) -> Any:
    """The reference to a tile [size] of `ref` [rows, T]."""
    return ref.at[row, pl.ds(tile * size, size)]


def load_numbers(refs: Any, row, tile, size: int) -> Any:
    """A tile [size] of each of `refs` [rows, T]."""
    return jax.tree.map(lambda ref: plgpu.load(numbers_ref(ref, row, tile, size)), refs)


def columns(numbers: Any) -> Any:
    """Arrays [I] as columns [I, 1]."""
    return jax.tree.map(lambda x: x[:, None], numbers)


def lines(numbers: Any) -> Any:
    """Arrays [J] as lines [1, J]."""
    return jax.tree.map(lambda x: x[None, :], numbers)


def places_of(v: Visibility) -> tuple[Places, Places]:
    """Places of queries and of keys."""
    return Places(v.query_positions_BT, v.query_segments_BT), Places(v.key_positions_BS, v.key_segments_BS)


def over_tiles(bounds: Bounds, sequence, tile, step: Callable[..., Any], start: Any) -> Any:
    """What `step(j, carry, masked=...)` makes of `start`, over the tiles j that `tile` of this sequence may see.

    Those of which everything is visible come first, in a loop without a mask.
    """
    first, full, rest, stop = (ref[sequence, tile] for ref in bounds)
    run = rest - full

    def unmasked(n, carry):
        return step(full + n, carry, masked=False)

    def masked(n, carry):
        j = first + n
        return step(jnp.where(j < full, j, j + run), carry, masked=True)

    # Counted from 0, the loops take fewer registers.
    carry = jax.lax.fori_loop(jnp.int32(0), run, unmasked, start)
    return jax.lax.fori_loop(jnp.int32(0), stop - first - run, masked, carry)


def exp(x: jax.Array) -> jax.Array:
    """`jnp.exp` by a power of two: two instructions in place of eight."""
    return jnp.exp2(math.log2(math.e) * x)


def scores_of(rows: jax.Array, columns: jax.Array, cap: float | None) -> jax.Array:
    """The products of all rows [I, H] and columns [J, H], after their cap."""
    scores = product(rows, columns, (1, 1))
    if cap is None or rows.dtype != jnp.bfloat16:
        return capped(scores, cap)
    # tanh() to 1e-7, by half of the instructions of CUDA's, which is as exact near 0 as elsewhere.
    return cap - 2 * cap / (1 + exp((2 / cap) * scores))


def arrange(q, k, v, p: Problem) -> tuple[Parts, Parts]:
    """Queries and keys with their values in the layout that kernels read."""
    q1, q2, k1, k2, values = jax.tree.map(merge_heads, common.arrange(q, k, v, p, TILES))
    return Parts(q1, q2, None), Parts(k1, k2, values)


def merge_heads(x: jax.Array) -> jax.Array:
    """[..., T, width] as [X, T, width], with a width that matrix products take."""
    width = max(NARROWEST, pl.next_power_of_2(x.shape[-1]))
    return padded(x, width, x.ndim - 1).reshape(-1, x.shape[-2], width)


class Call(NamedTuple):
    """What a kernel is compiled for; it has one program for each tile of each head."""

    p: Problem
    window: int | None
    heads: int
    """Heads of queries of one sequence, N."""
    group: int
    """Heads of queries that share one of the keys', G."""
    launch: Launch
    all_heads: int
    """Heads of all sequences together: X where programs have tiles of queries, Y where they have tiles of keys."""
    of_queries: bool
    """Which of the two."""
    tiles: int
    """Tiles of one head."""
    pairs: float
    """Queries and keys of one head that see each other, as far as shapes tell."""

    @property
    def query_heads(self) -> int:
        """Heads of queries of all sequences, X."""
        return self.all_heads if self.of_queries else self.all_heads * self.group

    def program(self) -> tuple[jax.Array, jax.Array]:
        """The head, of those of all sequences, and the tile that are this program's."""
        # A grid of two dimensions would end at 65,535 tiles.
        index, heads = pl.program_id(0), jnp.int32(self.all_heads)
        return jax.lax.rem(index, heads), jax.lax.div(index, heads)

    def query_program(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Sequence, head of queries, head of keys and tile of a program that has a tile of queries."""
        head, tile = self.program()
        # Under a causal mask the last tile of queries has the longest loop: it starts first.
        tile = jnp.int32(self.tiles - 1) - tile
        return jax.lax.div(head, jnp.int32(self.heads)), head, jax.lax.div(head, jnp.int32(self.group)), tile

    def sees(self, queries: Places, keys: Places) -> jax.Array:
        """Whether queries see keys, of which some are columns and the others lines."""
        return sees(queries.positions, keys.positions, queries.segments, keys.segments, self.window)

    def run(
        self, kernel: Callable, inputs: Sequence[Any], outputs: Sequence[Any], products: int, interpret: Any
    ) -> Any:
        """The results of `kernel(*inputs, *outputs, call=self)` in all programs, with references in place of arrays.

        `products` are its multiply-adds for a query and a key of one head that see each other.
        """
        in_memory = pl.BlockSpec(memory_space=pl.ANY)
        scores = round(self.pairs) * self.query_heads
        arrays = [x for x in jax.tree.leaves((list(inputs), list(outputs))) if x is not None]
        return pl.pallas_call(
            partial(kernel, call=self),
            grid=(self.all_heads * self.tiles,),
            in_specs=jax.tree.map(lambda _: in_memory, list(inputs)),
            out_specs=jax.tree.map(lambda _: in_memory, list(outputs)),
            out_shape=list(outputs),
            compiler_params=plgpu.CompilerParams(num_warps=self.launch.warps, num_stages=self.launch.stages),
            # Each array is counted once: keys and values that are read again mostly come from the cache.
            cost_estimate=pl.CostEstimate(
                flops=2 * products * scores,
                transcendentals=2 * scores,
                bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
            ),
            interpret=interpret,
            name=f"{name_of(self.p)}{kernel.__name__}",
        )(*inputs)


# Forward ------------------------------------------------------------------------------------------------------------


def _moments_kernel(
    keys: Bounds, q_places: Places, k_places: Places, q1_ref, k1_ref, count_ref, moment_refs: Moments, *, call: Call
):
    """Count and moments of each query's visible scores, merged tile by tile over the tiles `keys` of keys."""
    size, k_size = call.launch.tiles
    sequence, head, k_head, tile = call.query_program()
    q1 = load_tiles(q1_ref, head, tile, size)
    of_queries = load_numbers(q_places, sequence, tile, size)

    def step(j, carry, masked):
        before, moments = carry
        k1 = load_tiles(k1_ref, k_head, j, k_size)
        scores = scores_of(q1, k1, call.p.softcap)
        visible, here = None, jnp.full_like(before, k_size)
        if masked:
            visible = call.sees(columns(of_queries), lines(load_numbers(k_places, sequence, j, k_size)))
            here = jnp.sum(visible.astype(before.dtype), axis=-1)
        count = before + here
        found = Moments.of_tile(scores, visible, here)
        return count, moments.merged(found, before, here / jnp.maximum(count, 1))

    zero = jnp.zeros(size, accumulator_dtype(q1_ref))
    start = (zero, Moments(zero, zero, jnp.full_like(zero, NEGATIVE)))
    count, moments = over_tiles(keys, sequence, tile, step, start)
    for ref, value in zip((count_ref, *moment_refs), (count, *moments), strict=True):
        plgpu.store(numbers_ref(ref, head, tile, size), value)


class Selection(NamedTuple):
    """Of each query the score from which on keys are selected, and the best score."""

    threshold: Any
    best: Any


def _mix_kernel(
    bounds: Bounds,
    q_places: Places,
    k_places: Places,
    selection: Selection,
    queries: Parts,
    keys: Parts,
    y_ref,
    total_ref,
    attended_ref,
    *,
    call: Call,
):
    """Values mixed by the selected keys' weights; the softmax's sum and the number of attended keys."""
    (size, k_size), p = call.launch.tiles, call.p
    sequence, head, k_head, tile = call.query_program()
    q = load_tiles(queries, head, tile, size)
    of_queries = load_numbers(q_places, sequence, tile, size)
    threshold, best = load_numbers(selection, head, tile, size)

    def step(j, carry, masked):
        total, attended, mixed = carry
        k = load_tiles(keys, k_head, j, k_size)
        scores = scores_of(q.predictor, k.predictor, p.softcap)
        visible = None
        if masked:
            visible = call.sees(columns(of_queries), lines(load_numbers(k_places, sequence, j, k_size)))
        selected = chosen(scores, visible, columns(threshold), p)
        weights = jnp.where(selected, exp(scores - columns(best)), 0)
        total += jnp.sum(weights, axis=-1)
        attended += jnp.sum(selected.astype(weights.dtype), axis=-1)
        if k.rest is not None:
            weights *= softplus_and_slope(scores_of(q.rest, k.rest, p.softcap_values))[0]
        return total, attended, mixed + product(weights.astype(k.values.dtype), k.values, (1, 0))

    zero = jnp.zeros_like(best)
    start = (zero, zero, jnp.zeros((size, keys.values.shape[-1]), best.dtype))
    total, attended, mixed = over_tiles(bounds, sequence, tile, step, start)
    # A query that sees nothing has a softmax over nothing: its values are zero.
    y = mixed / columns(jnp.where(total == 0, 1, total))
    plgpu.store(tile_ref(y_ref, head, tile, size), y.astype(y_ref.dtype))
    for ref, value in ((total_ref, total), (attended_ref, attended)):
        plgpu.store(numbers_ref(ref, head, tile, size), value.astype(ref.dtype))


def _all_keys_kernel(
    bounds: Bounds,
    q_places: Places,
    k_places: Places,
    queries: Parts,
    keys: Parts,
    y_ref,
    normaliser_ref,
    *,
    call: Call,
):
    """Values mixed by the weights of all visible keys, and the logarithm of the softmax's sum, in one pass.

    The best score so far stands for the best of all; sums are scaled down to a better one when it appears. Where a cap
    bounds the scores, exponentials are summed as they are.
    """
    (size, k_size), p = call.launch.tiles, call.p
    sequence, head, k_head, tile = call.query_program()
    q = load_tiles(queries, head, tile, size)
    of_queries = load_numbers(q_places, sequence, tile, size)

    def step(j, carry, masked):
        best, total, mixed = carry
        k = load_tiles(keys, k_head, j, k_size)
        scores = scores_of(q.predictor, k.predictor, p.softcap)
        if masked:
            visible = call.sees(columns(of_queries), lines(load_numbers(k_places, sequence, j, k_size)))
            scores = jnp.where(visible, scores, NEGATIVE)
        if best is not None:
            before, best = best, jnp.maximum(best, jnp.max(scores, axis=-1))
            shrunk, scores = exp(before - best), scores - columns(best)
            total, mixed = shrunk * total, columns(shrunk) * mixed
        weights = exp(scores)
        total += jnp.sum(weights, axis=-1)
        if k.rest is not None:
            weights *= softplus_and_slope(scores_of(q.rest, k.rest, p.softcap_values))[0]
        return best, total, mixed + product(weights.astype(k.values.dtype), k.values, (1, 0))

    zero = jnp.zeros(size, accumulator_dtype(queries.predictor))
    best = None if bounded(p) else jnp.full_like(zero, LOWEST_BEST)
    start = (best, zero, jnp.zeros((size, keys.values.shape[-1]), zero.dtype))
    best, total, mixed = over_tiles(bounds, sequence, tile, step, start)
    # A query that sees nothing has a softmax over nothing: its values are zero.
    total = jnp.where(total == 0, 1, total)
    normaliser = jnp.log(total) if best is None else best + jnp.log(total)
    plgpu.store(tile_ref(y_ref, head, tile, size), (mixed / columns(total)).astype(y_ref.dtype))
    plgpu.store(numbers_ref(normaliser_ref, head, tile, size), normaliser)


def forward(
    q, k, v, visibility: Visibility, p: Problem, interpret: Any
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Mixed values [B, T, N, V], attended keys [B, T, N], and for `backward` threshold and normaliser of each query.

    The normaliser is the logarithm of the softmax's sum; the two are [X, T].
    """
    (batch, length, heads, _), kv_heads = q.shape, k.shape[2]
    queries, keys = arrange(q, k, v, p)
    pairs = visibility.pairs
    seen_BT = visibility.keys_seen  # the compiler leaves it out where nothing asks for it
    visibility = padded_visibility(visibility, TILES)
    all_heads, padded_length, _ = queries.predictor.shape
    number = jax.ShapeDtypeStruct((all_heads, padded_length), accumulator_dtype(q))

    widths, values = (p.r, q.shape[-1] if p.weighting == "softplus" else p.r), v.shape[-1]

    def run(kernel, launch: Launch, inputs, outputs, products: int):
        tiles = Tiles(*launch.tiles)
        inputs = [bounds(visibility, tiles)[0], *places_of(visibility), *inputs]
        count = padded_length // tiles.queries
        call = Call(p, visibility.window, heads, heads // kv_heads, launch, all_heads, True, count, pairs)
        return call.run(kernel, inputs, outputs, products, interpret)

    def by_query(x_XTH: jax.Array) -> jax.Array:
        return from_heads(x_XTH.reshape(batch, kv_heads, -1, padded_length, x_XTH.shape[-1]), length)

    like_y = jax.ShapeDtypeStruct((all_heads, padded_length, keys.values.shape[-1]), v.dtype)
    if p.selection == "none":
        launch = launch_for("flash_attention_all_keys", q, queries, keys)
        y, normaliser = run(_all_keys_kernel, launch, [queries, keys], [like_y, number], widths[1] + values)
        attended = jnp.broadcast_to(seen_BT[:, :, None], (batch, length, heads))
        return by_query(y)[..., : v.shape[-1]], attended, (jnp.full_like(normaliser, ALL), normaliser)

    launch = launch_for("spark_attention_moments", q, [queries.predictor], [keys.predictor])
    outputs = [number, Moments(number, number, number)]
    count, moments = run(_moments_kernel, launch, [queries.predictor, keys.predictor], outputs, p.r)
    threshold = threshold_of(count, moments, p)
    y, total, attended = run(
        _mix_kernel,
        launch_for("spark_attention_mix", q, queries, keys),
        [Selection(threshold, moments.best), queries, keys],
        [like_y, number, jax.ShapeDtypeStruct(number.shape, jnp.int32)],
        widths[1] + values,
    )
    normaliser = moments.best + jnp.log(jnp.where(total == 0, 1, total))
    return by_query(y)[..., : v.shape[-1]], by_query(attended[..., None])[..., 0], (threshold, normaliser)


def launch_for(kernel: str, q: jax.Array, queries: Any, keys: Any) -> Launch:
    """How to launch a kernel that reads tiles of these arrays, for heads like those of `q`."""
    launch = launch_of(kernel, itemsize=q.dtype.itemsize, columns=q.shape[-1])
    row = [sum(x.shape[-1] * x.dtype.itemsize for x in jax.tree.leaves(arrays)) for arrays in (queries, keys)]
    fits = fitting(launch, *row, own=1 if kernel.endswith("attention_keys") else 0)
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
