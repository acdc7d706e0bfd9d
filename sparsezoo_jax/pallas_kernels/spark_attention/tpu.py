"""Spark attention for TPUs: tiles of scores are made in VMEM, twice, and memory is linear in the lengths.

The threshold of a query needs the moments of all its scores, so a first kernel takes those, and a second one makes the
scores again and mixes the values. The first also finds each query's best score, which the selection always keeps: the
second needs no running maximum. Tiles in which nothing is visible are neither read nor computed.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value head,
H head width, R = r of it the predictor's, V width of values, P steps of the walk over tiles, I queries and J keys of a
tile.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, pltpu
from sparsezoo_jax.pallas_kernels.spark_attention import common, tpu_all_keys
from sparsezoo_jax.pallas_kernels.spark_attention.common import (
    Moments,
    Operands,
    accumulator_dtype,
    arrange,
    capped,
    chosen,
    from_heads,
    softplus_and_slope,
    threshold_of,
    where,
)
from sparsezoo_jax.pallas_kernels.spark_attention.reference import NEGATIVE, Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Tiles, padded_visibility
from sparsezoo_jax.pallas_kernels.spark_attention.tpu_grid import (
    ROWS,
    STEPS,
    Grid,
    Places,
    Step,
    over_rows,
    product,
    tiles_for,
    to_columns,
    to_rows,
)
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility


def _moments_kernel(
    step: Step,
    places: Places,
    q1_ref,
    k1_ref,
    out_ref,
    count_ref,
    moments: Moments,
    *,
    p: Problem,
    tiles: Tiles,
    window,
):
    """Count and moments of each query's visible scores, merged tile by tile into `count_ref` and `moments`."""
    heads = range(q1_ref.shape[2])

    @pl.when(step.first)
    def _():
        for ref in (count_ref, moments.mean, moments.squares):
            ref[...] = jnp.zeros_like(ref)
        moments.best[...] = jnp.full_like(moments.best, NEGATIVE)

    def work(rows, visible):
        before = count_ref[rows, :]
        if visible is None:
            here = jnp.full_like(before, tiles.keys)
        else:
            here = jnp.sum(visible.astype(before.dtype), axis=-1, keepdims=True)
        count = before + here
        share = here / jnp.maximum(count, 1)
        count_ref[rows, :] = count
        for g in heads:
            scores = capped(product(q1_ref[0, 0, g, rows, :], k1_ref[0, 0], (1, 1)), p.softcap)
            so_far = Moments(*(ref[g, rows, :] for ref in moments))
            merged = so_far.merged(Moments.of_tile(scores, visible, here), before, share)
            for ref, value in zip(moments, merged, strict=True):
                ref[g, rows, :] = value

    over_rows(step, places, tiles, window, lambda slices: work(*slices[0]))

    @pl.when(step.last)
    def _():
        for g in heads:
            out_ref[0, 0, g] = to_rows([count_ref[...], *(ref[g] for ref in moments)])


def _threshold(moments_BKG8T: jax.Array, p: Problem) -> jax.Array:
    """Rows [B, K, G, 8, T] that hold each query's threshold and best score."""
    count, mean, squares, best = (moments_BKG8T[..., i, :] for i in range(4))
    threshold = threshold_of(count, Moments(mean, squares, best), p)
    return jnp.stack([threshold, best] + [jnp.zeros_like(best)] * (ROWS - 2), axis=-2)


def selected(q1, k1, visible, threshold, p: Problem) -> tuple[jax.Array, Any]:
    """Scores [I, J] and booleans of the selected keys; None, as `visible` and as result, are all."""
    scores = capped(product(q1, k1, (1, 1)), p.softcap)
    return scores, chosen(scores, visible, threshold, p)


class MixScratch(NamedTuple):
    """What the kernel holds of a tile of queries while it goes through the keys: [G, I, 1], and `mixed` [G, I, V]."""

    threshold: Any
    best: Any
    total: Any
    """Sum of the softmax's exponentials so far."""
    attended: Any
    """Keys selected so far."""
    mixed: Any
    """Weighted sum of their values so far."""


def _mix_kernel(
    step: Step,
    places: Places,
    rows_ref,
    operands: Operands,
    y_ref,
    out_ref,
    scratch: MixScratch,
    *,
    p: Problem,
    tiles: Tiles,
    window,
):
    """Values mixed by the selected keys' weights; the softmax's sum and the number of attended keys."""
    q1_ref, q2_ref, k1_ref, k2_ref, v_ref = operands
    threshold_ref, best_ref, total_ref, attended_ref, mixed_ref = scratch
    heads = range(q1_ref.shape[2])

    @pl.when(step.first)
    def _():
        for g in heads:
            columns = to_columns(rows_ref[0, 0, g])
            threshold_ref[g], best_ref[g] = columns[:, 0:1], columns[:, 1:2]
        for ref in (total_ref, attended_ref, mixed_ref):
            ref[...] = jnp.zeros_like(ref)

    def work(rows, visible):
        for g in heads:
            scores, keep = selected(q1_ref[0, 0, g, rows, :], k1_ref[0, 0], visible, threshold_ref[g, rows, :], p)
            weights = where(keep, jnp.exp(scores - best_ref[g, rows, :]), 0)
            total_ref[g, rows, :] += jnp.sum(weights, axis=-1, keepdims=True)
            attended_ref[g, rows, :] += jnp.sum(keep.astype(weights.dtype), axis=-1, keepdims=True)
            if q2_ref is not None:
                arguments = capped(product(q2_ref[0, 0, g, rows, :], k2_ref[0, 0], (1, 1)), p.softcap_values)
                weights = weights * softplus_and_slope(arguments)[0]
            mixed_ref[g, rows, :] += product(weights.astype(v_ref.dtype), v_ref[0, 0], (1, 0))

    over_rows(step, places, tiles, window, lambda slices: work(*slices[0]))

    @pl.when(step.last)
    def _():
        for g in heads:
            total = total_ref[g]
            # A query that sees nothing has a softmax over nothing: its values are zero.
            y_ref[0, 0, g] = (mixed_ref[g] / jnp.where(total == 0, 1, total)).astype(y_ref.dtype)
            out_ref[0, 0, g] = to_rows([total, attended_ref[g]])


def forward(q, k, v, visibility: Visibility, p: Problem, interpret: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mixed values [B, T, N, V], attended keys [B, T, N], and for `backward` rows [B, K, G, 2, T] of each query.

    These are its threshold and its normaliser, the logarithm of the softmax's sum.
    """
    queries, tiles = q.shape[1], tiles_for(p, q, k, v)
    operands = arrange(q, k, v, p, tiles)
    padded = padded_visibility(visibility, tiles)
    grid, places = Grid.over(padded, tiles, range(operands.k1.shape[2] // tiles.keys)), Places.of(padded)
    if p.selection == "none":
        y, rows = tpu_all_keys.mix(grid, places, operands, p, visibility.window, v.dtype, interpret)
        attended = jnp.broadcast_to(visibility.keys_seen[:, :, None], q.shape[:3])
    else:
        y, counts, rows = _mix_selected(grid, places, operands, p, visibility.window, v.dtype, interpret)
        attended = from_heads(counts[..., None], queries)[..., 0].astype(jnp.int32)
    return from_heads(y, queries), attended, rows


def _mix_selected(
    grid: Grid, places: Places, operands: Operands, p: Problem, window: int | None, dtype: Any, interpret: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mixed values [B, K, G, T, V], attended keys [B, K, G, T], and the rows of threshold and normaliser."""
    q1, k1, values, tiles = operands.q1, operands.k1, operands.v, grid.tiles
    (batch, kv_heads, group, length, _), accumulated = q1.shape, accumulator_dtype(q1)
    heads = (kv_heads, kv_heads * group)
    static: dict[str, Any] = {"p": p, "tiles": tiles, "window": window}
    like_rows = jax.ShapeDtypeStruct((batch, kv_heads, group, ROWS, length), accumulated)

    def column(*leading: int) -> Any:
        return pltpu.VMEM((*leading, tiles.queries, 1), accumulated)

    moments = grid.call(
        partial(_moments_kernel, **static),
        [places, q1, k1],
        [grid.places(), grid.queries(group, p.r), grid.keys(p.r)],
        like_rows,
        grid.rows(group),
        [column(), Moments(*[column(group)] * 3)],
        heads,
        p.r,
        interpret,
    )
    thresholds = _threshold(moments, p)
    mixed = pltpu.VMEM((group, tiles.queries, values.shape[-1]), accumulated)
    scratch = MixScratch(column(group), column(group), column(group), column(group), mixed)
    y, sums = grid.call(
        partial(_mix_kernel, **static),
        [places, thresholds, operands],
        [grid.places(), grid.rows(group), grid.operands(operands)],
        [jax.ShapeDtypeStruct((batch, kv_heads, group, length, values.shape[-1]), dtype), like_rows],
        [grid.queries(group, values.shape[-1]), grid.rows(group)],
        [scratch],
        heads,
        sum(x.shape[-1] for x in operands[:2] if x is not None) + values.shape[-1],
        interpret,
    )
    total, best = sums[..., 0, :], thresholds[..., 1, :]
    normaliser = best + jnp.log(jnp.where(total == 0, 1, total))
    return y, sums[..., 1, :], jnp.stack([thresholds[..., 0, :], normaliser], axis=-2)


def refusal(q, k, v, visibility: Any, p: Problem, *, interpret: bool = False) -> str | None:
    """Why the kernels can't take these arrays, or None if they can."""
    if (shared := common.refusal(q, k, v, visibility, p.selection, interpret=interpret)) is not None:
        return shared
    tiles = tiles_for(p, q, k, v)
    steps = -(-q.shape[1] // tiles.queries) * -(-k.shape[1] // tiles.keys)
    return None if steps <= STEPS else f"walks over {steps} tiles of a head, more than {STEPS}"
