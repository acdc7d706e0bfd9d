"""The gradient of Spark attention for GPUs (Triton): scores are made twice more from what the forward kernels kept.

One kernel has a tile of queries and loops over the keys, for the queries' gradient; the other has a tile of keys and
loops over the queries of all heads that share them, for those of keys and values. Sums stay in registers: added up by
atomic operations they would differ from run to run.

Shapes as in `gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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
    arrange,
    block,
    blocks,
    launch_for,
    lines,
    places,
    rows_of_heads,
    seen,
)
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Tiles, bounds, padded_visibility
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility
from sparsezoo_jax.pallas_kernels.triton import product
from sparsezoo_jax.pallas_kernels.tuning import Launch


def _of_tile(own, others, of_queries, visible, p: Problem) -> tuple[jax.Array, list[jax.Array]]:
    """Weights of a tile of scores, and the gradients of the products of each part of queries and keys.

    A program's `own` tile (parts of queries and the gradient of y, or parts of keys and the values) makes the rows of
    the scores, the `others` of its loop the columns: rows lie where the next product wants them.
    """
    threshold, normaliser, delta = of_queries
    scores = capped(product(own[0], others[0], (1, 1)), p.softcap)
    softmax = jnp.where(visible & (scores >= threshold), jnp.exp(scores - normaliser), 0)
    arguments = capped(product(own[1], others[1], (1, 1)), p.softcap_values) if len(own) == 3 else None
    weights, *gradients = tile_gradients(softmax, scores, arguments, product(own[-1], others[-1], (1, 1)), delta, p)
    dtype = own[0].dtype
    return weights.astype(dtype), [x.astype(dtype) for x in gradients if x is not None]


def _split(refs: Sequence[Any], p: Problem) -> tuple[Sequence[Any], ...]:
    """Places of queries and of keys, numbers of queries, queries and dy, keys and values, and results."""
    ends = 7, 8 + _parts(p), 9 + 2 * _parts(p)
    return refs[:2], refs[2:4], refs[4:7], refs[ends[0] : ends[1]], refs[ends[1] : ends[2]], refs[ends[2] :]


def _parts(p: Problem) -> int:
    """Into which heads are divided."""
    return 1 if p.weighting == "none" else 2


def _queries_kernel(first_ref, stop_ref, *refs, call: Call):
    """Gradients of a tile of queries."""
    q_where, k_where, number_refs, q_refs, k_refs, dq_refs = _split(refs, call.p)
    (size, k_size), p = call.launch.tiles, call.p
    sequence, row, k_row, tile = call.place()
    own = blocks(q_refs, row, tile, size)
    of_queries, numbers = blocks(q_where, sequence, tile, size), blocks(number_refs, row, tile, size)

    def step(j, sums):
        others = blocks(k_refs, k_row, j, k_size)
        visible = seen(of_queries, lines(k_where, sequence, j, k_size), p)
        _, gradients = _of_tile(own, others, numbers, visible, p)
        return [s + product(g, x, (1, 0)) for s, g, x in zip(sums, gradients, others[:-1], strict=True)]

    start = [jnp.zeros((size, ref.shape[-1]), wide(ref)) for ref in dq_refs]
    sums = jax.lax.fori_loop(first_ref[sequence, tile], stop_ref[sequence, tile], step, start)
    for ref, s, scale in zip(dq_refs, sums, (p.predictor_scale, p.value_scale), strict=False):
        plgpu.store(block(ref, row, tile, size), (scale * s).astype(ref.dtype))


def _keys_kernel(first_ref, stop_ref, *refs, call: Call):
    """Gradients of a tile of keys and values."""
    q_where, k_where, number_refs, q_refs, k_refs, gradient_refs = _split(refs, call.p)
    (q_size, size), p = call.launch.tiles, call.p
    row, tile = call.program()
    sequence = jax.lax.div(row, jnp.int32(call.heads // call.group))
    own = blocks(k_refs, row, tile, size)
    of_keys = blocks(k_where, sequence, tile, size)

    def step(q_row, i, sums):
        others = blocks(q_refs, q_row, i, q_size)
        visible = seen(lines(q_where, sequence, i, q_size), of_keys, p)
        weights, gradients = _of_tile(own, others, lines(number_refs, q_row, i, q_size), visible, p)
        return [s + product(g, x, (1, 0)) for s, g, x in zip(sums, [*gradients, weights], others, strict=True)]

    def of_head(g, sums):
        of_one = partial(step, row * call.group + g)
        return jax.lax.fori_loop(first_ref[sequence, tile], stop_ref[sequence, tile], of_one, sums)

    start = [jnp.zeros((size, ref.shape[-1]), wide(ref)) for ref in gradient_refs]
    sums = jax.lax.fori_loop(jnp.int32(0), jnp.int32(call.group), of_head, start)
    for ref, s in zip(gradient_refs, sums, strict=True):
        plgpu.store(block(ref, row, tile, size), s.astype(ref.dtype))


def backward(q, k, v, visibility: Visibility, y, kept, dy, p: Problem, interpret: Any) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v from that of y [B, T, N, V] and what `forward` kept."""
    (batch, length, heads, width), (_, k_length, kv_heads, _) = q.shape, k.shape
    queries, keys, values = arrange(q, k, v, p)
    seen_by = padded_visibility(visibility, p.tiles)
    delta = jnp.sum(dy.astype(wide(y)) * y.astype(wide(y)), -1, keepdims=True)
    numbers = [*kept, by_head(delta, kv_heads, p.tiles).reshape(kept[0].shape)]
    dy_XTV = rows_of_heads(by_head(dy, kv_heads, p.tiles))

    def run(kernel: Callable, launch: Launch, like: list[jax.Array], *, queries_own: bool) -> list[jax.Array]:
        tiles = Tiles(*launch.tiles)
        limits = bounds(seen_by, tiles)[0 if queries_own else 1]
        own = numbers if queries_own else [x.swapaxes(1, 2) for x in numbers]
        arrays = [*limits, *places(seen_by, queries_own=queries_own), *own, *queries, dy_XTV, *keys, values]
        size = tiles.queries if queries_own else tiles.keys
        rows, padded_length, _ = like[0].shape
        outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
        call = Call(p, heads, heads // kv_heads, launch, rows, padded_length // size)
        return call.run(kernel, arrays, outputs, interpret)

    read = [*queries, dy_XTV], [*keys, values]
    dq = run(_queries_kernel, launch_for("queries", q, *read), queries, queries_own=True)
    *dk, dv = run(_keys_kernel, launch_for("keys", q, *read), [*keys, values], queries_own=False)

    def of_queries(x_XTH: jax.Array, width: int) -> jax.Array:
        return from_heads(x_XTH.reshape(batch, kv_heads, -1, *x_XTH.shape[1:])[..., :width], length)

    def of_keys(x_YSH: jax.Array, width: int) -> jax.Array:
        return x_YSH.reshape(batch, kv_heads, *x_YSH.shape[1:])[:, :, :k_length, :width].swapaxes(1, 2)

    widths = (p.r, width - p.r)[: _parts(p)]
    dq = joined([of_queries(x, w) for x, w in zip(dq, widths, strict=True)], q)
    dk = joined([of_keys(x, w) for x, w in zip(dk, widths, strict=True)], k)
    return dq, dk, of_keys(dv, v.shape[-1])
