"""The gradient of Spark attention for TPUs: scores are made once more, tile by tile, from the residuals of `forward`.

One kernel makes all gradients, for making the scores again is most of the work. It walks over the tiles as the forward
kernels do; the queries' gradient adds up within their steps, those of keys and values in VMEM until the walk ends. Keys
of long sequences are therefore taken a chunk at a time, and the queries' gradient goes from chunk to chunk through HBM.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, pltpu
from sparsezoo_jax.pallas_kernels.spark_attention.common import (
    Operands,
    accumulator_dtype,
    arrange,
    capped,
    from_heads,
    joined,
    tile_gradients,
    to_heads,
    where,
)
from sparsezoo_jax.pallas_kernels.spark_attention.reference import Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Tiles, Walk, padded, padded_visibility, walks
from sparsezoo_jax.pallas_kernels.spark_attention.tpu import selected
from sparsezoo_jax.pallas_kernels.spark_attention.tpu_grid import (
    ROWS,
    Grid,
    Places,
    Step,
    in_lanes,
    over_rows,
    product,
    tiles_for,
    to_columns,
)
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility

#: Bytes of VMEM for the gradients of a chunk of keys and values.
CHUNK = 34 * 2**20


class QueryGradients(NamedTuple):
    """Gradients of the queries, as arrays or references; `q2` is None where there is no softplus."""

    q1: Any
    q2: Any


class Scratch(NamedTuple):
    """What the kernel holds of a tile of queries while it goes through the keys: [G, I, 1], and the gradient so far."""

    threshold: Any
    normaliser: Any
    """Logarithm of the softmax's sum."""
    delta: Any
    """The gradient of y times y."""
    gradients: QueryGradients


def _backward_kernel(
    step: Step,
    places: Places,
    rows_ref,
    operands: Operands,
    dy_ref,
    earlier: QueryGradients | None,
    gradients: Operands,
    scratch: Scratch,
    *,
    p: Problem,
    tiles: Tiles,
    window: int | None,
    chunk: int,
):
    """Gradients of one tile of scores; the queries' start from those of `earlier` chunks of keys, if there are any.

    A chunk is of so many tiles, and begins at a multiple of that.
    """
    heads = range(dy_ref.shape[2])

    @pl.when(step.start)
    def _():
        for ref in (gradients.k1, gradients.k2, gradients.v):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)

    @pl.when(step.first)
    def _():
        for g in heads:
            columns = to_columns(rows_ref[0, 0, g])
            for i, ref in enumerate((scratch.threshold, scratch.normaliser, scratch.delta)):
                ref[g] = columns[:, i : i + 1]
        for i, ref in enumerate(scratch.gradients):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref) if earlier is None else earlier[i][0, 0]

    def work(rows, visible):
        within = jax.lax.rem(step.tile, jnp.asarray(chunk, step.tile.dtype))
        keys = pl.ds(pl.multiple_of(within * tiles.keys, tiles.keys), tiles.keys)
        for g in heads:
            q1 = operands.q1[0, 0, g, rows, :]
            scores, keep = selected(q1, operands.k1[0, 0], visible, scratch.threshold[g, rows, :], p)
            softmax = where(keep, jnp.exp(scores - scratch.normaliser[g, rows, :]), 0)
            dy = dy_ref[0, 0, g, rows, :]
            dweights = product(dy, operands.v[0, 0], (1, 1))
            q2, arguments = None, None
            if operands.q2 is not None:
                q2 = operands.q2[0, 0, g, rows, :]
                arguments = capped(product(q2, operands.k2[0, 0], (1, 1)), p.softcap_values)
            weights, dscores, darguments = tile_gradients(
                softmax, scores, arguments, dweights, scratch.delta[g, rows, :], p
            )
            if darguments is not None:
                _add(darguments, q2, operands.k2, scratch.gradients.q2, gradients.k2, g, rows, keys)
            _add(dscores, q1, operands.k1, scratch.gradients.q1, gradients.k1, g, rows, keys)
            gradients.v[0, 0, keys, :] += product(weights.astype(dy.dtype), dy, (0, 0))

    over_rows(step, places, tiles, window, lambda slices: work(*slices[0]))

    @pl.when(step.last)
    def _():
        for ref, total_ref in zip(gradients[:2], scratch.gradients, strict=True):
            if ref is not None:
                ref[0, 0] = total_ref[...]


def _add(dscores, q, k_ref, dq_ref, dk_ref, g: int, rows, keys) -> None:
    """Add what the gradient of one matrix of scores q k^T contributes to the gradients of q and k."""
    dscores = dscores.astype(q.dtype)
    dq_ref[g, rows, :] += product(dscores, k_ref[0, 0], (1, 0))
    dk_ref[0, 0, keys, :] += product(dscores, q, (0, 0))


def backward(
    q, k, v, visibility: Visibility, y, statistics, dy, p: Problem, interpret: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v from that of y [B, T, N, V] and the `statistics` that `forward` returned."""
    (batch, queries, heads, _), (_, length, kv_heads, _) = q.shape, k.shape
    group, dtype, tiles = heads // kv_heads, accumulator_dtype(q), tiles_for(p, q, k, v)
    width, widths = v.shape[-1], [p.r] if p.weighting == "none" else [p.r, q.shape[-1] - p.r]
    chunk, chunks = _chunks(-(-length // tiles.keys), sum(in_lanes(x) for x in [*widths, width]), tiles, dtype)
    # Keys are filled up to whole chunks, of which the tiles that no query sees are not visited.
    filled = tiles._replace(keys=chunk * tiles.keys)
    operands = arrange(q, k, v, p, filled)
    visibility = padded_visibility(visibility, filled)
    delta_BKGT = to_heads(jnp.sum(dy.astype(dtype) * y.astype(dtype), -1, keepdims=True), kv_heads, tiles)[..., 0]
    of_queries = jnp.concatenate([statistics, delta_BKGT[..., None, :]], axis=-2)
    rows = padded(of_queries, ROWS, 3)
    inputs = [Places.of(visibility), rows, operands, to_heads(dy, kv_heads, tiles)]

    column = pltpu.VMEM((group, tiles.queries, 1), dtype)
    sums = QueryGradients(
        *(x if x is None else pltpu.VMEM((group, tiles.queries, x.shape[-1]), dtype) for x in operands[:2])
    )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), operands)
    k1, k2, values = (
        x if x is None else jax.ShapeDtypeStruct((batch, kv_heads, filled.keys, x.shape[-1]), dtype)
        for x in operands[2:]
    )

    def chunk_block(x: jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, filled.keys, x.shape[-1]), lambda b, h, s, *_: (b, h, 0, 0))

    def of_chunk(grid: Grid, earlier: QueryGradients | None) -> tuple[QueryGradients, tuple[jax.Array, jax.Array]]:
        # Tiles of queries that a chunk does not need to visit keep the gradient that they have.
        blocks = grid.operands(operands)
        (gradients,) = grid.call(
            partial(_backward_kernel, p=p, tiles=tiles, window=visibility.window, chunk=chunk),
            [*inputs, earlier],
            [
                grid.places(),
                grid.rows(group),
                blocks,
                grid.queries(group, width),
                None if earlier is None else QueryGradients(blocks.q1, blocks.q2),
            ],
            [like._replace(k1=k1, k2=k2, v=values)],
            [Operands(*blocks[:2], *jax.tree.map(chunk_block, (k1, k2, values)))],
            [Scratch(column, column, column, sums)],
            (kv_heads, heads),
            3 * sum(widths) + 2 * width,
            interpret,
            aliases={len(jax.tree.leaves(inputs)) + i: i for i in range(len(jax.tree.leaves(earlier)))},
        )
        # In the layout and dtype of the results, in which they take least memory until all chunks are there.
        *dk, dv = (x.swapaxes(1, 2) for x in gradients[2:] if x is not None)
        return QueryGradients(*gradients[:2]), (joined(dk, k), dv.astype(v.dtype))

    if chunks == 1:
        dqs, of_keys = of_chunk(Grid.over(visibility, tiles, range(chunk)), None)
    else:
        # A loop, so that the compiler's time does not grow with the length; the kernel takes as many steps as its chunk
        # has, for later keys have fewer queries.
        ranges = [range(i * chunk, (i + 1) * chunk) for i in range(chunks)]
        steps, lengths = walks(tiles, operands.q1.shape[3] // tiles.queries, ranges, visibility)

        def in_turn(earlier: QueryGradients, taken: tuple[Walk, jax.Array]):
            return of_chunk(Grid.taking(*taken, sum(lengths) / chunks, tiles, visibility), earlier)

        none = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), QueryGradients(like.q1, like.q2))
        dqs, stacked = jax.lax.scan(in_turn, none, (steps, jnp.asarray(lengths, jnp.int32)))
        of_keys = [jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:]) for x in stacked]
    scales = (p.predictor_scale, p.value_scale)
    dq = [from_heads(scale * part, queries) for scale, part in zip(scales, dqs, strict=True) if part is not None]
    dk, dv = (x[:, :length] for x in of_keys)
    return joined(dq, q), dk, dv


def _chunks(count: int, lanes: int, tiles: Tiles, dtype: Any) -> tuple[int, int]:
    """Tiles of keys of a chunk, and the number of chunks of nearly equal size, of `count` tiles of so many lanes."""
    most = max(1, CHUNK // (2 * lanes * jnp.dtype(dtype).itemsize * tiles.keys))
    size = -(-count // -(-count // most))
    return size, -(-count // size)
