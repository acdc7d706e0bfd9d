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
    from_heads,
    joined,
    name_of,
    tile_gradients,
    to_heads,
    where,
)
from sparsezoo_jax.pallas_kernels.spark_attention.gpu import (
    TILES,
    Call,
    Parts,
    Places,
    arrange,
    columns,
    exp,
    launch_for,
    lines,
    load_numbers,
    load_tiles,
    merge_heads,
    over_tiles,
    places_of,
    scores_of,
    tile_ref,
)
from sparsezoo_jax.pallas_kernels.spark_attention.reference import Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Bounds, Tiles, bounds, padded_visibility
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility
from sparsezoo_jax.pallas_kernels.triton import product
from sparsezoo_jax.pallas_kernels.tuning import Launch


class Statistics(NamedTuple):
    """Numbers of each query: arrays [X, T], references to them, or those of a tile, as columns or lines."""

    threshold: Any
    """The score from which on keys are selected."""
    normaliser: Any
    """Logarithm of the softmax's sum."""
    delta: Any
    """The gradient of y times y."""


def _of_tile(own: Parts, others: Parts, of_queries: Statistics, visible, p: Problem) -> Parts:
    """Gradients of one tile of scores: of the products of each of the parts, and as `values` its weights.

    The program's `own` tile makes the rows of the scores, the `others` of its loop the columns: so the rows lie where
    the next product wants them.
    """
    scores = scores_of(own.predictor, others.predictor, p.softcap)
    selected = chosen(scores, visible, of_queries.threshold, p)
    softmax = where(selected, exp(scores - of_queries.normaliser), 0)
    arguments = None
    if own.rest is not None:
        arguments = scores_of(own.rest, others.rest, p.softcap_values)
    dweights = product(own.values, others.values, (1, 1))
    weights, dscores, darguments = tile_gradients(softmax, scores, arguments, dweights, of_queries.delta, p)
    dtype = own.predictor.dtype
    weights = weights.astype(dtype)
    return Parts(dscores.astype(dtype), None if darguments is None else darguments.astype(dtype), weights)


def _add_products(sums: Parts, left: Parts, right: Parts) -> Parts:
    """`sums + left right`, for each of the parts that there are sums of."""
    return Parts(*(s if s is None else s + product(a, b, (1, 0)) for s, a, b in zip(sums, left, right, strict=True)))


def _queries_kernel(
    keys_seen: Bounds,
    q_places: Places,
    k_places: Places,
    statistics: Statistics,
    queries: Parts,
    keys: Parts,
    dq: Parts,
    *,
    call: Call,
):
    """Gradients of a tile of queries."""
    (size, k_size), p = call.launch.tiles, call.p
    sequence, head, k_head, tile = call.query_program()
    own = load_tiles(queries, head, tile, size)
    of_queries, numbers = load_numbers(q_places, sequence, tile, size), load_numbers(statistics, head, tile, size)

    def step(j, sums, masked):
        others = load_tiles(keys, k_head, j, k_size)
        visible = None
        if masked:
            visible = call.sees(columns(of_queries), lines(load_numbers(k_places, sequence, j, k_size)))
        return _add_products(sums, _of_tile(own, others, columns(numbers), visible, p), others)

    start = jax.tree.map(lambda ref: jnp.zeros((size, ref.shape[-1]), accumulator_dtype(ref)), dq)
    sums = over_tiles(keys_seen, sequence, tile, step, start)
    for ref, total, scale in zip(dq[:2], sums[:2], (p.predictor_scale, p.value_scale), strict=True):
        if ref is not None:
            plgpu.store(tile_ref(ref, head, tile, size), (scale * total).astype(ref.dtype))


def _keys_kernel(
    seen_by: Bounds,
    q_places: Places,
    k_places: Places,
    statistics: Statistics,
    queries: Parts,
    keys: Parts,
    gradients: Parts,
    *,
    call: Call,
):
    """Gradients of a tile of keys and values."""
    q_size, size = call.launch.tiles
    head, tile = call.program()
    sequence = jax.lax.div(head, jnp.int32(call.heads // call.group))
    own = load_tiles(keys, head, tile, size)
    of_keys = load_numbers(k_places, sequence, tile, size)

    def step(q_head, i, sums):
        others = load_tiles(queries, q_head, i, q_size)
        visible = call.sees(lines(load_numbers(q_places, sequence, i, q_size)), columns(of_keys))
        numbers = lines(load_numbers(statistics, q_head, i, q_size))
        return _add_products(sums, _of_tile(own, others, numbers, visible, call.p), others)

    # Everything is masked: registers don't suffice for what a second loop keeps from one head to the next.
    def of_head(g, sums):
        of_one = partial(step, head * call.group + g)
        return jax.lax.fori_loop(seen_by.first[sequence, tile], seen_by.stop[sequence, tile], of_one, sums)

    start = jax.tree.map(lambda ref: jnp.zeros((size, ref.shape[-1]), accumulator_dtype(ref)), gradients)
    sums = jax.lax.fori_loop(jnp.int32(0), jnp.int32(call.group), of_head, start)
    for ref, total in zip(gradients, sums, strict=True):
        if ref is not None:
            plgpu.store(tile_ref(ref, head, tile, size), total.astype(ref.dtype))


def backward(
    q, k, v, visibility: Visibility, y, statistics: tuple[jax.Array, jax.Array], dy, p: Problem, interpret: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v from that of y [B, T, N, V] and the `statistics` that `forward` returned."""
    (batch, length, heads, _), (_, k_length, kv_heads, _) = q.shape, k.shape
    queries, keys = arrange(q, k, v, p)
    queries = queries._replace(values=merge_heads(to_heads(dy, kv_heads, TILES)))
    pairs = visibility.pairs
    visibility = padded_visibility(visibility, TILES)
    dtype = accumulator_dtype(y)
    delta = jnp.sum(dy.astype(dtype) * y.astype(dtype), -1, keepdims=True)
    numbers = Statistics(*statistics, to_heads(delta, kv_heads, TILES).reshape(statistics[0].shape))

    def run(kernel: Callable, launch: Launch, like: Parts, *, queries_own: bool) -> Parts:
        tiles = Tiles(*launch.tiles)
        loops = bounds(visibility, tiles)[0 if queries_own else 1]
        inputs = [loops, *places_of(visibility), numbers, queries, keys]
        all_heads, padded_length, _ = like.predictor.shape
        count = padded_length // (tiles.queries if queries_own else tiles.keys)
        call = Call(p, visibility.window, heads, heads // kv_heads, launch, all_heads, queries_own, count, pairs)
        # Both make the scores and the gradients of weights; then follow those of queries, or of keys and values.
        width, values = p.r if p.weighting == "none" else q.shape[-1], v.shape[-1]
        products = 2 * width + values if queries_own else 2 * (width + values)
        results = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)]
        (gradients,) = call.run(kernel, inputs, results, products, interpret)
        return gradients

    launches = (launch_for(f"{name_of(p)}_{part}", q, queries, keys) for part in ("queries", "keys"))
    dq = run(_queries_kernel, next(launches), queries._replace(values=None), queries_own=True)
    dk = run(_keys_kernel, next(launches), keys, queries_own=False)

    def of_queries(x_XTH: jax.Array, width: int) -> jax.Array:
        return from_heads(x_XTH.reshape(batch, kv_heads, -1, *x_XTH.shape[1:])[..., :width], length)

    def of_keys(x_YSH: jax.Array, width: int) -> jax.Array:
        return x_YSH.reshape(batch, kv_heads, *x_YSH.shape[1:])[:, :, :k_length, :width].swapaxes(1, 2)

    widths = (p.r, q.shape[-1] - p.r)
    dq_parts = [of_queries(x, width) for x, width in zip(dq[:2], widths, strict=True) if x is not None]
    dk_parts = [of_keys(x, width) for x, width in zip(dk[:2], widths, strict=True) if x is not None]
    return joined(dq_parts, q), joined(dk_parts, k), of_keys(dk.values, v.shape[-1])
