"""The gradient of Spark attention for TPUs: scores are made once more, tile by tile, from what the forward kernel kept.

One kernel makes all gradients, for making the scores again is most of the work. It walks over the tiles as the forward
kernels do; the queries' gradient adds up within their steps, those of keys and values in VMEM until the walk ends. Keys
of long sequences are therefore taken a chunk at a time, and the queries' gradient goes from chunk to chunk through HBM.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparsezoo_jax.pallas_kernels.spark_attention.common import (
    Problem,
    by_head,
    capped,
    from_heads,
    joined,
    prepare,
    tile_gradients,
    wide,
)
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import padded_visibility
from sparsezoo_jax.pallas_kernels.spark_attention.tpu import (
    ROWS,
    Grid,
    over_rows,
    product,
    seen,
    selected,
    to_columns,
    where_arrays,
)
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility

#: Of VMEM, for the gradients of a chunk of keys and values.
CHUNK = 34 * 2**20


def _backward_kernel(step, where_q, where_k, rows_ref, *refs, p: Problem, before: bool, first_tile: int):
    """Gradients of one tile of scores; `before`: those of the queries from earlier chunks are added to."""
    pieces = 1 if p.weighting == "none" else 2

    def take(count: int) -> list[Any]:
        nonlocal refs
        taken, refs = list(refs[:count]), refs[count:]
        return taken

    q_refs, k_refs, (v_ref, dy_ref) = take(pieces), take(pieces), take(2)
    before_refs = take(pieces * before)
    dq_refs, dk_refs, (dv_ref,) = take(pieces), take(pieces), take(1)
    threshold_ref, best_ref, inverse_ref, delta_ref, *sum_refs = refs
    heads = range(dy_ref.shape[2])

    @pl.when(step.start)
    def _():
        for ref in (*dk_refs, dv_ref):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(step.first)
    def _():
        for g in heads:
            columns = to_columns(rows_ref[0, 0, g])
            for i, ref in enumerate((threshold_ref, best_ref, inverse_ref, delta_ref)):
                ref[g] = columns[:, i : i + 1]
        for i, ref in enumerate(sum_refs):
            ref[...] = before_refs[i][0, 0] if before else jnp.zeros_like(ref)

    @pl.when(step.visible)
    def _():
        size = p.tiles.keys
        keys = pl.ds(pl.multiple_of((step.tile - first_tile) * size, size), size)

        def work(rows):
            visible = seen(where_q, where_k, rows, p.window)
            for g in heads:
                q1 = q_refs[0][0, 0, g, rows, :]
                scores, keep = selected(q1, k_refs[0][0, 0], visible, threshold_ref[g, rows, :], p)
                softmax = jnp.where(keep, jnp.exp(scores - best_ref[g, rows, :]), 0) * inverse_ref[g, rows, :]
                dy = dy_ref[0, 0, g, rows, :]
                dweights = product(dy, v_ref[0, 0], (1, 1))
                q2, arguments = None, None
                if pieces == 2:
                    q2 = q_refs[1][0, 0, g, rows, :]
                    arguments = capped(product(q2, k_refs[1][0, 0], (1, 1)), p.softcap_values)
                weights, dscores, darguments = tile_gradients(
                    softmax, scores, arguments, dweights, delta_ref[g, rows, :], p
                )
                if darguments is not None:
                    _add(darguments, q2, k_refs[1], sum_refs[1], dk_refs[1], g, rows, keys)
                _add(dscores, q1, k_refs[0], sum_refs[0], dk_refs[0], g, rows, keys)
                dv_ref[0, 0, keys, :] += product(weights.astype(dy.dtype), dy, (0, 0))

        over_rows(p, work)

    @pl.when(step.last)
    def _():
        for ref, total_ref in zip(dq_refs, sum_refs, strict=True):
            ref[0, 0] = total_ref[...]


def _add(dscores, q, k_ref, dq_ref, dk_ref, g: int, rows, keys) -> None:
    """Add the parts of one matrix of scores to the gradients of its two factors."""
    dscores = dscores.astype(q.dtype)
    dq_ref[g, rows, :] += product(dscores, k_ref[0, 0], (1, 0))
    dk_ref[0, 0, keys, :] += product(dscores, q, (0, 0))


def backward(q, k, v, visibility: Visibility, y, kept, dy, p: Problem, interpret: Any) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v from that of y [B, T, N, V] and what `forward` kept."""
    (batch, queries, heads, _), (_, length, kv_heads, _) = q.shape, k.shape
    group, dtype = heads // kv_heads, wide(q)
    q1, q2, k1, k2, values = prepare(q, k, v, p)
    q_parts, k_parts = ([q1], [k1]) if q2 is None or k2 is None else ([q1, q2], [k1, k2])
    widths = [part.shape[-1] for part in q_parts]
    seen_by = padded_visibility(visibility, p.tiles)
    delta_BKGT = by_head(jnp.sum(dy.astype(dtype) * y.astype(dtype), -1, keepdims=True), kv_heads, p.tiles)[..., 0]
    threshold, best, total = (kept[..., i, :] for i in range(3))
    inverse = 1 / jnp.where(total == 0, 1, total)
    rows = jnp.stack([threshold, best, inverse, delta_BKGT] + [jnp.zeros_like(best)] * (ROWS - 4), axis=-2)
    inputs = [*where_arrays(seen_by), rows, *q_parts, *k_parts, values, by_head(dy, kv_heads, p.tiles)]

    width = values.shape[-1]
    column = pltpu.VMEM((group, p.tiles.queries, 1), dtype)
    totals = [pltpu.VMEM((group, p.tiles.queries, w), dtype) for w in widths]
    tiles = values.shape[2] // p.tiles.keys
    chunk = max(1, CHUNK // (2 * (sum(widths) + width) * jnp.dtype(dtype).itemsize * p.tiles.keys))
    dq_parts: list[jax.Array] = []
    gradients = []
    for start in range(0, tiles, chunk):
        stop = min(start + chunk, tiles)
        grid = Grid.over(seen_by, p.tiles, range(start, stop))
        # Tiles of queries that a chunk does not need to visit keep what they have.
        before = dq_parts
        in_specs = [
            *grid.where(),
            grid.rows(group),
            *(grid.queries(group, w) for w in widths),
            *(grid.keys(w) for w in widths),
            grid.keys(width),
            grid.queries(group, width),
            *(grid.queries(group, w) for w in widths[: len(before)]),
        ]
        whole = [
            pl.BlockSpec((1, 1, (stop - start) * p.tiles.keys, w), lambda b, h, s, *_: (b, h, 0, 0))
            for w in (*widths, width)
        ]
        results = grid.call(
            partial(_backward_kernel, p=p, before=bool(before), first_tile=start),
            [*inputs, *before],
            in_specs,
            [
                *(jax.ShapeDtypeStruct((*q1.shape[:-1], w), dtype) for w in widths),
                *(
                    jax.ShapeDtypeStruct((batch, kv_heads, (stop - start) * p.tiles.keys, w), dtype)
                    for w in (*widths, width)
                ),
            ],
            [*(grid.queries(group, w) for w in widths), *whole],
            [*[column] * 4, *totals],
            (kv_heads, heads),
            3 * sum(widths) + 2 * width,
            interpret,
            aliases={len(inputs) + i: i for i in range(len(before))},
        )
        dq_parts, gradients = list(results[: len(widths)]), [*gradients, results[len(widths) :]]

    def keys(parts: list[jax.Array]) -> jax.Array:
        return jnp.concatenate(parts, axis=2)[:, :, :length].swapaxes(1, 2)

    scales = (p.predictor_scale, p.value_scale)
    dq = [from_heads(scale * part, queries) for scale, part in zip(scales, dq_parts, strict=False)]
    *dk, dv = (keys(list(parts)) for parts in zip(*gradients, strict=True))
    return joined(dq, q), joined(dk, k), dv.astype(v.dtype)
