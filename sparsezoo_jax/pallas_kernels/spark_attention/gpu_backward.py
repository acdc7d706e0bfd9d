"""The gradient of Spark attention for GPUs (Triton): two kernels, which both make the scores again.

One kernel has a tile of queries and loops over the keys, for the queries' gradient; the other has a tile of keys and
loops over the queries of all heads that share them, for those of keys and values. Sums stay in registers: added up by
atomic operations they would differ from run to run.

Shapes as in `gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import plgpu
from sparsezoo_jax.pallas_kernels.spark_attention.common import (
    accumulator_dtype,
    chosen,
    name_of,
    tile_gradients,
    where,
)
from sparsezoo_jax.pallas_kernels.spark_attention.gpu import Call, exp, launch_for, over_tiles, scores_of
from sparsezoo_jax.pallas_kernels.spark_attention.gpu_arrays import (
    TILES,
    Arrays,
    Parts,
    Places,
    arrange,
    columns,
    factors,
    joined_heads,
    lines,
    load_numbers,
    parts_of,
    places_of,
    whole_tiles,
    widths_of,
)
from sparsezoo_jax.pallas_kernels.spark_attention.reference import Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Bounds, Tiles, bounds, padded, padded_visibility
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility
from sparsezoo_jax.pallas_kernels.triton import product


class Statistics(NamedTuple):
    """Numbers of each query: arrays [B, N, T], references to them, or those of a tile, as columns or lines."""

    threshold: Any
    """The score from which on keys are selected; None: all are."""
    normaliser: Any
    """Logarithm of the softmax's sum."""
    delta: Any
    """The gradient of y times y."""


def _of_tile(own: Parts, others: Parts, of_queries: Statistics, visible, p: Problem) -> Parts:
    """Gradients of one tile of scores: of the products of each of the parts, and as `values` its weights.

    The program's `own` tile makes the rows of the scores, the `others` of its loop the columns: so the rows lie where
    the next product wants them.
    """
    scores = scores_of(own.predictor, others.predictor, p.softcap, p.predictor_scale)
    selected = chosen(scores, visible, of_queries.threshold, p)
    softmax = where(selected, exp(scores - of_queries.normaliser), 0)
    arguments = None
    if own.rest is not None:
        arguments = scores_of(own.rest, others.rest, p.softcap_values, p.value_scale)
    dweights = product(own.values, others.values, (1, 1))
    weights, dscores, darguments = tile_gradients(softmax, scores, arguments, dweights, of_queries.delta, p)
    dtype = own.predictor.dtype
    weights = weights.astype(dtype)
    return Parts(dscores.astype(dtype), None if darguments is None else darguments.astype(dtype), weights)


def _add_products(sums: Parts, left: Parts, right: Parts) -> Parts:
    """`sums + left right`, for each of the parts that there are sums of."""
    return Parts(*(s if s is None else s + product(a, b, (1, 0)) for s, a, b in zip(sums, left, right, strict=True)))


def _zeros(results: Parts) -> Parts:
    """What the sums of these results start from."""
    return jax.tree.map(lambda ref: jnp.zeros(ref.shape, accumulator_dtype(ref)), results)


def _store(results: Parts, sums: Parts, *scales: float) -> None:
    """Write sums, times their scale those of a head's two parts."""
    for ref, total, scale in zip(results, sums, (*scales, 1.0), strict=True):
        if ref is not None:
            plgpu.store(ref, (total if scale == 1 else scale * total).astype(ref.dtype))


def _queries_kernel(
    keys_seen: Bounds,
    q_places: Places,
    k_places: Places,
    statistics: Statistics,
    queries: Arrays,
    keys: Arrays,
    dq: Arrays,
    *,
    call: Call,
):
    """Gradients of a tile of queries."""
    (size, k_size), p = call.launch.tiles, call.p
    head, k_head, tile = call.query_program()
    own = call.load(queries, head, tile, size)
    of_queries, numbers = load_numbers(q_places, head[:1], tile, size), load_numbers(statistics, head, tile, size)

    def step(j, sums, masked):
        others = call.load(keys, k_head, j, k_size)
        visible = None
        if masked:
            visible = call.sees(columns(of_queries), lines(load_numbers(k_places, k_head[:1], j, k_size)))
        return _add_products(sums, _of_tile(own, others, columns(numbers), visible, p), others)

    results = parts_of(dq, head, tile, size, call.widths)
    sums = over_tiles(keys_seen, head.sequence, tile, step, _zeros(results))
    _store(results, sums, p.predictor_scale, p.value_scale)


def _keys_kernel(
    seen_by: Bounds,
    q_places: Places,
    k_places: Places,
    statistics: Statistics,
    queries: Arrays,
    keys: Arrays,
    gradients: Arrays,
    *,
    call: Call,
):
    """Gradients of a tile of keys and values."""
    q_size, size = call.launch.tiles
    head, tile = call.program()
    own = call.load(keys, head, tile, size)
    of_keys = load_numbers(k_places, head[:1], tile, size)

    def step(q_head, i, sums):
        others = call.load(queries, q_head, i, q_size)
        visible = call.sees(lines(load_numbers(q_places, q_head[:1], i, q_size)), columns(of_keys))
        numbers = lines(load_numbers(statistics, q_head, i, q_size))
        return _add_products(sums, _of_tile(own, others, numbers, visible, call.p), others)

    # Everything is masked: registers don't suffice for what a second loop keeps from one head to the next.
    def of_head(g, sums):
        of_one = partial(step, head._replace(number=head.number * call.group + g))
        loop = (seen_by.first[head.sequence, tile], seen_by.stop[head.sequence, tile])
        return jax.lax.fori_loop(*loop, of_one, sums)

    results = parts_of(gradients, head, tile, size, call.widths)
    sums = jax.lax.fori_loop(jnp.int32(0), jnp.int32(call.group), of_head, _zeros(results))
    # What queries were multiplied by before is in the sums.
    _store(results, sums, factors(call.p.predictor_scale)[1], factors(call.p.value_scale)[1])


def backward(
    q, k, v, visibility: Visibility, y, statistics: tuple[jax.Array | None, jax.Array], dy, p: Problem, interpret: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v from that of y [B, T, N, V] and the `statistics` that `forward` returned.

    `q` must be `scaled`; its gradient is that of the queries before.
    """
    (batch, _, heads, width), kv_heads = q.shape, k.shape[2]
    queries, keys = arrange(q, k, v, p)
    queries = queries._replace(values=whole_tiles(dy, TILES.queries))
    pairs = visibility.pairs
    visibility = padded_visibility(visibility, TILES)
    dtype = accumulator_dtype(y)
    delta_BTN = jnp.sum(dy.astype(dtype) * y.astype(dtype), -1)
    numbers = Statistics(*statistics, padded(delta_BTN.swapaxes(1, 2), TILES.queries, 2))
    widths, values = widths_of(width, p), queries.values.shape[-1]

    def run(kernel: Callable, like: Arrays, products: int, *, queries_own: bool) -> Arrays:
        columns = sum(widths) + values
        launch = launch_for(f"{name_of(p)}_{'queries' if queries_own else 'keys'}", q, columns, columns)
        tiles = Tiles(*launch.tiles)
        loops = bounds(visibility, tiles)[0 if queries_own else 1]
        inputs = [loops, *places_of(visibility), numbers, queries, keys]
        count = like.heads.shape[1] // (tiles.queries if queries_own else tiles.keys)
        call = Call(p, visibility.window, heads, heads // kv_heads, widths, launch, batch, queries_own, count, pairs)
        results = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)]
        (gradients,) = call.run(kernel, inputs, results, products, interpret)
        return gradients

    # Both make the scores and the gradients of weights; then follow those of queries, or of keys and values.
    read = p.r if p.weighting == "none" else width
    dq = run(_queries_kernel, queries._replace(values=None), 2 * read + v.shape[-1], queries_own=True)
    dk = run(_keys_kernel, keys, 2 * (read + v.shape[-1]), queries_own=False)
    dv = dk.values[:, : v.shape[1], :, : v.shape[-1]]
    return joined_heads(dq.heads, q, p), joined_heads(dk.heads, k, p), dv
