"""The gradient of Spark attention for GPUs (Triton): scores are made twice more from what the forward kernel kept.

One kernel has a tile of queries and loops over the keys, for the queries' gradient; the other has a tile of keys and
loops over the queries of all heads that share them, for those of keys and values. Sums stay in registers: added up by
atomic operations they would differ from run to run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sparsezoo_jax.pallas_kernels.spark_attention.common import (
    Problem,
    by_head,
    capped,
    from_heads,
    joined,
    tile_gradients,
    wide,
)
from sparsezoo_jax.pallas_kernels.spark_attention.gpu import (
    Call,
    Launch,
    Where,
    arrange,
    block,
    launch_for,
    product,
    rows_of_heads,
    seen,
    selected,
)
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Tiles, bounds, padded_visibility
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility

#: As in `gpu`.
QUERIES = {2: Launch(Tiles(64, 32), 8, 2), 4: Launch(Tiles(32, 32), 8, 1)}
KEYS = {2: Launch(Tiles(32, 64), 8, 2), 4: Launch(Tiles(32, 32), 8, 1)}


def _of_tile(queries, keys, values, dy, columns, visible, p: Problem) -> tuple[jax.Array, list[jax.Array]]:
    """Weights of a tile [I, J], and the gradients of the products of each part of queries and keys, for products."""
    threshold, normaliser, delta = columns
    scores, keep = selected(queries[0], keys[0], visible, threshold, p)
    softmax = jnp.where(keep, jnp.exp(scores - normaliser), 0)
    dweights = product(dy, values, (1, 1))
    arguments = capped(product(queries[1], keys[1], (1, 1)), p.softcap_values) if len(keys) == 2 else None
    weights, dscores, darguments = tile_gradients(softmax, scores, arguments, dweights, delta, p)
    products = [dscores] if darguments is None else [dscores, darguments]
    return weights.astype(dy.dtype), [x.astype(dy.dtype) for x in products]


def _load(refs, row, tile, size: int) -> list[jax.Array]:
    return [plgpu.load(block(ref, row, tile, size)) for ref in refs]


def _queries_kernel(first_ref, stop_ref, *refs, call: Call):
    """Gradients of a tile of queries."""
    where, columns, parts = Where(*refs[:4]), refs[4:7], (len(refs) - 9) // 3
    q_refs, k_refs = refs[7 : 7 + parts], refs[7 + parts : 7 + 2 * parts]
    v_ref, dy_ref = refs[7 + 2 * parts : 9 + 2 * parts]
    dq_refs, tiles, p = refs[9 + 2 * parts :], call.launch.tiles, call.p
    sequence, row, kv_row, tile = call.place()
    queries, columns = (_load(some, row, tile, tiles.queries) for some in (q_refs, columns))
    (dy,) = _load([dy_ref], row, tile, tiles.queries)
    of_queries = where.queries(sequence, tile, tiles.queries)

    def step(j, sums):
        *keys, values = _load([*k_refs, v_ref], kv_row, j, tiles.keys)
        visible = seen(of_queries, where.keys(sequence, j, tiles.keys), p.window)
        _, gradients = _of_tile(queries, keys, values, dy, columns, visible, p)
        return [s + product(g, k, (1, 0)) for s, g, k in zip(sums, gradients, keys, strict=True)]

    start = [jnp.zeros((tiles.queries, ref.shape[-1]), wide(dy)) for ref in q_refs]
    sums = jax.lax.fori_loop(first_ref[sequence, tile], stop_ref[sequence, tile], step, start)
    for ref, s, scale in zip(dq_refs, sums, (p.predictor_scale, p.value_scale), strict=False):
        plgpu.store(block(ref, row, tile, tiles.queries), (scale * s).astype(ref.dtype))


def _keys_kernel(first_ref, stop_ref, *refs, call: Call):
    """Gradients of a tile of keys and values, from the queries of all their heads."""
    where, columns, parts = Where(*refs[:4]), refs[4:7], (len(refs) - 10) // 3
    q_refs, k_refs = refs[7 : 7 + parts], refs[7 + parts : 7 + 2 * parts]
    v_ref, dy_ref = refs[7 + 2 * parts : 9 + 2 * parts]
    gradient_refs, tiles, p = refs[9 + 2 * parts :], call.launch.tiles, call.p
    kv_row, tile = pl.program_id(0), pl.program_id(1)
    sequence = jax.lax.div(kv_row, jnp.int32(call.heads // call.group))
    *keys, values = _load([*k_refs, v_ref], kv_row, tile, tiles.keys)
    of_keys = where.keys(sequence, tile, tiles.keys)

    def of_head(row, i, sums):
        *queries, dy = _load([*q_refs, dy_ref], row, i, tiles.queries)
        visible = seen(where.queries(sequence, i, tiles.queries), of_keys, p.window)
        here = _load(columns, row, i, tiles.queries)
        weights, gradients = _of_tile(queries, keys, values, dy, here, visible, p)
        factors = zip(sums, [*gradients, weights], [*queries, dy], strict=True)
        return [s + product(g, x, (0, 0)) for s, g, x in factors]

    def step(g, sums):
        row = kv_row * call.group + g
        return jax.lax.fori_loop(first_ref[sequence, tile], stop_ref[sequence, tile], partial(of_head, row), sums)

    start = [jnp.zeros((tiles.keys, ref.shape[-1]), wide(values)) for ref in gradient_refs]
    sums = jax.lax.fori_loop(jnp.int32(0), jnp.int32(call.group), step, start)
    for ref, s in zip(gradient_refs, sums, strict=True):
        plgpu.store(block(ref, kv_row, tile, tiles.keys), s.astype(ref.dtype))


def backward(q, k, v, visibility: Visibility, y, kept, dy, p: Problem, interpret: Any) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v from that of y [B, T, N, V] and what `forward` kept."""
    (batch, length, heads, _), (_, k_length, kv_heads, _) = q.shape, k.shape
    queries, keys, values = arrange(q, k, v, p)
    seen_by = padded_visibility(visibility, p.tiles)
    where, group = Where.of(seen_by), heads // kv_heads
    delta = jnp.sum(dy.astype(wide(y)) * y.astype(wide(y)), -1, keepdims=True)
    delta = by_head(delta, kv_heads, p.tiles).reshape(kept[0].shape)
    arrays = [*where, *kept, delta, *queries, *keys, values, rows_of_heads(by_head(dy, kv_heads, p.tiles))]

    def run(kernel, name, launch: Launch, limits, grid, like):
        outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
        call = Call(p, heads, group, launch)
        return call.run(kernel, name, grid, [*limits, *arrays], outputs, interpret)

    launch = launch_for(QUERIES, q.dtype.itemsize)
    grid = (queries[0].shape[0], queries[0].shape[1] // launch.tiles.queries)
    dq = run(_queries_kernel, "queries", launch, bounds(seen_by, launch.tiles)[0], grid, queries)
    launch = launch_for(KEYS, q.dtype.itemsize)
    grid = (values.shape[0], values.shape[1] // launch.tiles.keys)
    *dk, dv = run(_keys_kernel, "keys", launch, bounds(seen_by, launch.tiles)[1], grid, [*keys, values])

    widths = [p.r, q.shape[-1] - p.r]

    def of_queries(x: jax.Array, width: int) -> jax.Array:
        return from_heads(x.reshape(batch, kv_heads, group, *x.shape[1:])[..., :width], length)

    def of_keys(x: jax.Array, width: int) -> jax.Array:
        return x.reshape(batch, kv_heads, *x.shape[1:])[:, :, :k_length, :width].swapaxes(1, 2)

    dq = joined([of_queries(x, width) for x, width in zip(dq, widths, strict=False)], q)
    dk = joined([of_keys(x, width) for x, width in zip(dk, widths, strict=False)], k)
    return dq, dk, of_keys(dv, v.shape[-1])
