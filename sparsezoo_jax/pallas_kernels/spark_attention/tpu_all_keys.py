"""Attention to all visible keys for TPUs, in one pass: a running maximum takes the place of the pass over the moments.

Where nothing is selected, no threshold is needed, and the best score so far can stand for the best of all: when a tile
has a better one, what was summed up is scaled down to it (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention,
arXiv 2205.14135). With `weighting="none"` this is flash attention.

Shapes as in `tpu_grid`, and V width of values.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, pltpu
from sparsezoo_jax.pallas_kernels.spark_attention.common import (
    ALL,
    LOWEST_BEST,
    Operands,
    accumulator_dtype,
    bounded,
    capped,
    softplus_and_slope,
    where,
)
from sparsezoo_jax.pallas_kernels.spark_attention.reference import NEGATIVE, Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Tiles
from sparsezoo_jax.pallas_kernels.spark_attention.tpu_grid import (
    ROWS,
    Grid,
    Places,
    Step,
    over_rows,
    product,
    to_rows,
)

#: Below so many heads that share their keys, two slices of queries are worked on together: alone, a head of a slice has
#: nothing to make products of while it waits. With four heads a second slice changes nothing.
FEW_HEADS = 4


class Scratch(NamedTuple):
    """What the kernel holds of a tile of queries while it goes through the keys: [G, I, 1], and `mixed` [G, I, V]."""

    best: Any
    """Largest score so far; None where scores are bounded, and exponentials are taken as they are."""
    total: Any
    """Sum of the exponentials so far, relative to `best`."""
    mixed: Any
    """Weighted sum of the values so far, relative to `best`."""


def _all_keys_kernel(
    step: Step,
    places: Places,
    operands: Operands,
    y_ref,
    out_ref,
    scratch: Scratch,
    *,
    p: Problem,
    tiles: Tiles,
    window: int | None,
):
    """Values mixed by the weights of all visible keys, and the logarithm of the softmax's sum."""
    q1_ref, q2_ref, k1_ref, k2_ref, v_ref = operands
    heads, early = range(q1_ref.shape[2]), scratch.best is not None

    @pl.when(step.first)
    def _():
        if scratch.best is not None:
            scratch.best[...] = jnp.full_like(scratch.best, LOWEST_BEST)
        for ref in (scratch.total, scratch.mixed):
            ref[...] = jnp.zeros_like(ref)

    def work(slices):
        def products(g, rows):
            return product(q1_ref[0, 0, g, rows, :], k1_ref[0, 0], (1, 1))

        # The compiler schedules operations about as they follow each other here. Where a head has to wait for its best
        # score, the matrix unit makes the products of the next head, or slice of queries, meanwhile.
        pieces = [(g, rows, visible) for rows, visible in slices for g in heads]
        following = products(*pieces[0][:2])
        for i, (g, rows, visible) in enumerate(pieces):
            scores = following
            if early and i + 1 < len(pieces):
                following = products(*pieces[i + 1][:2])
            scores = where(visible, capped(scores, p.softcap), NEGATIVE)
            if scratch.best is not None:
                before = scratch.best[g, rows, :]
                best = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
                scratch.best[g, rows, :] = best
                shrunk, scores = jnp.exp(before - best), scores - best
                for ref in (scratch.total, scratch.mixed):
                    ref[g, rows, :] *= shrunk
            weights = jnp.exp(scores)
            scratch.total[g, rows, :] += jnp.sum(weights, axis=-1, keepdims=True)
            if q2_ref is not None:
                arguments = capped(product(q2_ref[0, 0, g, rows, :], k2_ref[0, 0], (1, 1)), p.softcap_values)
                weights = weights * softplus_and_slope(arguments)[0]
            scratch.mixed[g, rows, :] += product(weights.astype(v_ref.dtype), v_ref[0, 0], (1, 0))
            if not early and i + 1 < len(pieces):
                following = products(*pieces[i + 1][:2])

    over_rows(step, places, tiles, window, work, slices=2 if early and len(heads) < FEW_HEADS else 1)

    @pl.when(step.last)
    def _():
        for g in heads:
            # A query that sees nothing has a softmax over nothing: its values are zero.
            total = jnp.where(scratch.total[g] == 0, 1, scratch.total[g])
            y_ref[0, 0, g] = (scratch.mixed[g] / total).astype(y_ref.dtype)
            normaliser = jnp.log(total) if scratch.best is None else scratch.best[g] + jnp.log(total)
            out_ref[0, 0, g] = to_rows([normaliser])


def mix(
    grid: Grid, places: Places, operands: Operands, p: Problem, window: int | None, dtype: Any, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Mixed values [B, K, G, T, V], and rows [B, K, G, 2, T] of each query's threshold (below all) and normaliser."""
    (batch, kv_heads, group, length, _), width = operands.q1.shape, operands.v.shape[-1]
    accumulated = accumulator_dtype(operands.q1)
    column = pltpu.VMEM((group, grid.tiles.queries, 1), accumulated)
    mixed = pltpu.VMEM((group, grid.tiles.queries, width), accumulated)
    y, rows = grid.call(
        partial(_all_keys_kernel, p=p, tiles=grid.tiles, window=window),
        [places, operands],
        [grid.places(), grid.operands(operands)],
        [
            jax.ShapeDtypeStruct((batch, kv_heads, group, length, width), dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, group, ROWS, length), accumulated),
        ],
        [grid.queries(group, width), grid.rows(group)],
        [Scratch(None if bounded(p) else column, column, mixed)],
        (kv_heads, kv_heads * group),
        sum(x.shape[-1] for x in operands[:2] if x is not None) + width,
        interpret,
    )
    normaliser = rows[..., 0, :]
    return y, jnp.stack([jnp.full_like(normaliser, ALL), normaliser], axis=-2)
