"""Spark attention for GPUs (Triton): tiles of scores are made in registers, twice, and memory is linear in the lengths.

As on TPUs a first kernel takes the moments and the best of each query's visible scores, and a second one makes the
scores again and mixes the values. A program has one tile of queries of one head and loops over the tiles of keys that
they may see: from the first to the last of them, by positions and segments. Arrays are as the model has them
(`gpu_arrays`).

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value head,
H head width, V width of values, I queries and J keys of a tile of scores. The width of an array, or of each of a head's
two parts, is filled up to a power of two. Numbers of a tile's queries and keys are arrays [I] and [J], and become
columns [I, 1] and lines [1, J] where they meet scores: kept as these, every thread would hold as many copies as it has
scores. The program's own tile makes the rows, the tiles of its loop the columns.
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
    LOWEST_BEST,
    Moments,
    accumulator_dtype,
    bounded,
    capped,
    chosen,
    name_of,
    softplus_and_slope,
    threshold_of,
)
from sparsezoo_jax.pallas_kernels.spark_attention.gpu_arrays import (
    TILES,
    Arrays,
    Head,
    Parts,
    Places,
    arrange,
    columns,
    factors,
    lines,
    load_numbers,
    numbers_ref,
    parts_of,
    places_of,
    tile_ref,
    widths_of,
)
from sparsezoo_jax.pallas_kernels.spark_attention.reference import NEGATIVE, Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Bounds, Tiles, bounds, padded_visibility
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility, sees
from sparsezoo_jax.pallas_kernels.triton import product
from sparsezoo_jax.pallas_kernels.tuning import SMALLEST, Launch, fitting, launch_of

#: Most columns of a head: its sums are in registers.
WIDEST = 256


# What kernels share -------------------------------------------------------------------------------------------------


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


def scores_of(rows: jax.Array, columns: jax.Array, cap: float | None, scale: float) -> jax.Array:
    """The products of all rows [I, H] and columns [J, H], times what is left of the `scale`, and after their cap."""
    scores, factor = product(rows, columns, (1, 1)), factors(scale)[1]
    if cap is None or rows.dtype != jnp.bfloat16:
        return capped(scores if factor == 1 else factor * scores, cap)
    # tanh() to 1e-7, by half of the instructions of CUDA's, which is as exact near 0 as elsewhere.
    return cap - 2 * cap / (1 + exp((2 / cap * factor) * scores))


class Call(NamedTuple):
    """What a kernel is compiled for; it has one program for each tile of each head."""

    p: Problem
    window: int | None
    heads: int
    """Heads of queries of one sequence, N."""
    group: int
    """Heads of queries that share one of the keys', G."""
    widths: tuple[int, int]
    """Columns of a head's two parts."""
    launch: Launch
    sequences: int
    of_queries: bool
    """Whether programs have tiles of queries, rather than of keys."""
    tiles: int
    """Tiles of one head."""
    pairs: float
    """Queries and keys of one head that see each other, as far as shapes tell."""

    @property
    def programs(self) -> int:
        """How many there are."""
        return self.sequences * self.own_heads * self.tiles

    @property
    def own_heads(self) -> int:
        """Heads of a sequence, of queries or of keys as programs have them."""
        return self.heads if self.of_queries else self.heads // self.group

    def program(self) -> tuple[Head, jax.Array]:
        """The head and the tile that are this program's."""
        # A grid of two dimensions would end at 65,535 tiles.
        index, heads = pl.program_id(0), jnp.int32(self.sequences * self.own_heads)
        head, own = jax.lax.rem(index, heads), jnp.int32(self.own_heads)
        return Head(jax.lax.div(head, own), jax.lax.rem(head, own)), jax.lax.div(index, heads)

    def query_program(self) -> tuple[Head, Head, jax.Array]:
        """Head of queries, head of keys and tile of a program that has a tile of queries."""
        head, tile = self.program()
        # Under a causal mask the last tile of queries has the longest loop: it starts first.
        tile = jnp.int32(self.tiles - 1) - tile
        return head, head._replace(number=jax.lax.div(head.number, jnp.int32(self.group))), tile

    def load(self, refs: Arrays, head: Head, tile, size: int) -> Parts:
        """A tile of each part."""
        return jax.tree.map(plgpu.load, parts_of(refs, head, tile, size, self.widths))

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
        scores = round(self.pairs) * self.sequences * self.heads
        arrays = [x for x in jax.tree.leaves((list(inputs), list(outputs))) if x is not None]
        return pl.pallas_call(
            partial(kernel, call=self),
            grid=(self.programs,),
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
    bounds: Bounds,
    q_places: Places,
    k_places: Places,
    queries: Arrays,
    keys: Arrays,
    count_ref,
    moment_refs: Moments,
    *,
    call: Call,
):
    """Count and moments of each query's visible scores, merged tile by tile over the tiles of keys; no values."""
    (size, k_size), p = call.launch.tiles, call.p
    head, k_head, tile = call.query_program()
    q = call.load(queries, head, tile, size)
    of_queries = load_numbers(q_places, head[:1], tile, size)

    def step(j, carry, masked):
        before, moments = carry
        k = call.load(keys, k_head, j, k_size)
        scores = scores_of(q.predictor, k.predictor, p.softcap, p.predictor_scale)
        visible, here = None, jnp.full_like(before, k_size)
        if masked:
            visible = call.sees(columns(of_queries), lines(load_numbers(k_places, k_head[:1], j, k_size)))
            here = jnp.sum(visible.astype(before.dtype), axis=-1)
        count = before + here
        found = Moments.of_tile(scores, visible, here)
        return count, moments.merged(found, before, here / jnp.maximum(count, 1))

    zero = jnp.zeros(size, accumulator_dtype(queries.heads))
    start = (zero, Moments(zero, zero, jnp.full_like(zero, NEGATIVE)))
    count, moments = over_tiles(bounds, head.sequence, tile, step, start)
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
    queries: Arrays,
    keys: Arrays,
    y_ref,
    total_ref,
    attended_ref,
    *,
    call: Call,
):
    """Values mixed by the selected keys' weights; the softmax's sum and the number of attended keys."""
    (size, k_size), p = call.launch.tiles, call.p
    head, k_head, tile = call.query_program()
    q = call.load(queries, head, tile, size)
    of_queries = load_numbers(q_places, head[:1], tile, size)
    threshold, best = load_numbers(selection, head, tile, size)

    def step(j, carry, masked):
        total, attended, mixed = carry
        k = call.load(keys, k_head, j, k_size)
        scores = scores_of(q.predictor, k.predictor, p.softcap, p.predictor_scale)
        visible = None
        if masked:
            visible = call.sees(columns(of_queries), lines(load_numbers(k_places, k_head[:1], j, k_size)))
        selected = chosen(scores, visible, columns(threshold), p)
        weights = jnp.where(selected, exp(scores - columns(best)), 0)
        total += jnp.sum(weights, axis=-1)
        attended += jnp.sum(selected.astype(weights.dtype), axis=-1)
        if k.rest is not None:
            weights *= softplus_and_slope(scores_of(q.rest, k.rest, p.softcap_values, p.value_scale))[0]
        return total, attended, mixed + product(weights.astype(k.values.dtype), k.values, (1, 0))

    zero = jnp.zeros_like(best)
    start = (zero, zero, jnp.zeros((size, keys.values.shape[-1]), best.dtype))
    total, attended, mixed = over_tiles(bounds, head.sequence, tile, step, start)
    # A query that sees nothing has a softmax over nothing: its values are zero.
    y = mixed / columns(jnp.where(total == 0, 1, total))
    plgpu.store(tile_ref(y_ref, head, tile, size), y.astype(y_ref.dtype))
    for ref, value in ((total_ref, total), (attended_ref, attended)):
        plgpu.store(numbers_ref(ref, head, tile, size), value.astype(ref.dtype))


def _all_keys_kernel(
    bounds: Bounds,
    q_places: Places,
    k_places: Places,
    queries: Arrays,
    keys: Arrays,
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
    head, k_head, tile = call.query_program()
    q = call.load(queries, head, tile, size)
    of_queries = load_numbers(q_places, head[:1], tile, size)

    def step(j, carry, masked):
        best, total, mixed = carry
        k = call.load(keys, k_head, j, k_size)
        scores = scores_of(q.predictor, k.predictor, p.softcap, p.predictor_scale)
        if masked:
            visible = call.sees(columns(of_queries), lines(load_numbers(k_places, k_head[:1], j, k_size)))
            scores = jnp.where(visible, scores, NEGATIVE)
        if best is not None:
            before, best = best, jnp.maximum(best, jnp.max(scores, axis=-1))
            shrunk, scores = exp(before - best), scores - columns(best)
            total, mixed = shrunk * total, columns(shrunk) * mixed
        weights = exp(scores)
        total += jnp.sum(weights, axis=-1)
        if k.rest is not None:
            weights *= softplus_and_slope(scores_of(q.rest, k.rest, p.softcap_values, p.value_scale))[0]
        return best, total, mixed + product(weights.astype(k.values.dtype), k.values, (1, 0))

    zero = jnp.zeros(size, accumulator_dtype(queries.heads))
    best = None if bounded(p) else jnp.full_like(zero, LOWEST_BEST)
    start = (best, zero, jnp.zeros((size, keys.values.shape[-1]), zero.dtype))
    best, total, mixed = over_tiles(bounds, head.sequence, tile, step, start)
    # A query that sees nothing has a softmax over nothing: its values are zero.
    total = jnp.where(total == 0, 1, total)
    normaliser = jnp.log(total) if best is None else best + jnp.log(total)
    plgpu.store(tile_ref(y_ref, head, tile, size), (mixed / columns(total)).astype(y_ref.dtype))
    plgpu.store(numbers_ref(normaliser_ref, head, tile, size), normaliser)


def forward(
    q, k, v, visibility: Visibility, p: Problem, interpret: Any
) -> tuple[jax.Array, jax.Array, tuple[jax.Array | None, jax.Array]]:
    """Mixed values [B, T, N, V], attended keys [B, T, N], and for `backward` threshold and normaliser of each query.

    Queries must be `scaled`.
    The normaliser is the logarithm of the softmax's sum; the two are [B, N, T], and a threshold that selects all None.
    """
    (batch, length, heads, width), kv_heads = q.shape, k.shape[2]
    queries, keys = arrange(q, k, v, p)
    pairs = visibility.pairs
    seen_BT = visibility.keys_seen  # the compiler leaves it out where nothing asks for it
    visibility = padded_visibility(visibility, TILES)
    padded_length, widths = queries.heads.shape[1], widths_of(width, p)
    number = jax.ShapeDtypeStruct((batch, heads, padded_length), accumulator_dtype(q))
    products = (width if p.weighting == "softplus" else p.r) + v.shape[-1]

    def run(kernel, launch: Launch, widths: tuple[int, int], inputs, outputs, products: int):
        tiles = Tiles(*launch.tiles)
        inputs = [bounds(visibility, tiles)[0], *places_of(visibility), *inputs]
        count = padded_length // tiles.queries
        call = Call(p, visibility.window, heads, heads // kv_heads, widths, launch, batch, True, count, pairs)
        return call.run(kernel, inputs, outputs, products, interpret)

    like_y = jax.ShapeDtypeStruct((batch, padded_length, heads, keys.values.shape[-1]), v.dtype)
    if p.selection == "none":
        launch = launch_for("flash_attention_all_keys", q, sum(widths), sum(widths) + like_y.shape[-1])
        y, normaliser = run(_all_keys_kernel, launch, widths, [queries, keys], [like_y, number], products)
        attended = jnp.broadcast_to(seen_BT[:, :, None], (batch, length, heads))
        return y[:, :length, :, : v.shape[-1]], attended, (None, normaliser)

    predictor, outputs = (widths[0], 0), [number, Moments(number, number, number)]
    launch = launch_for("spark_attention_moments", q, *predictor[:1] * 2)
    keys_alone = keys._replace(values=None)
    count, moments = run(_moments_kernel, launch, predictor, [queries, keys_alone], outputs, p.r)
    threshold = threshold_of(count, moments, p)
    y, total, attended = run(
        _mix_kernel,
        launch_for("spark_attention_mix", q, sum(widths), sum(widths) + like_y.shape[-1]),
        widths,
        [Selection(threshold, moments.best), queries, keys],
        [like_y, number, jax.ShapeDtypeStruct(number.shape, jnp.int32)],
        products,
    )
    normaliser = moments.best + jnp.log(jnp.where(total == 0, 1, total))
    attended_BTN = attended.swapaxes(1, 2)[:, :length]
    return y[:, :length, :, : v.shape[-1]], attended_BTN, (threshold, normaliser)


def launch_for(kernel: str, q: jax.Array, queries: int, keys: int) -> Launch:
    """How to launch a kernel that reads so many columns of queries and of keys, for heads like those of `q`."""
    size = q.dtype.itemsize
    launch = launch_of(kernel, itemsize=size, columns=q.shape[-1])
    fits = fitting(launch, size * queries, size * keys, own=1 if kernel.endswith("attention_keys") else 0)
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
