"""Spark attention over the rows of selected keys on GPUs (Triton): their softplus and the sum of their values.

Rows of other keys are not read.

Shapes: B sequences, N query heads, K key/value heads of G = N/K queries, S keys, H head width, A = H - r of it the
values', P parts of the keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, plgpu
from sparsezoo_jax.pallas_kernels.rows import native_refusal
from sparsezoo_jax.pallas_kernels.spark_attention.reference import softcapped, softplus
from sparsezoo_jax.pallas_kernels.triton import height, in_use, load, store, times_weights
from sparsezoo_jax.pallas_kernels.tuning import launch_of

#: Widest head: its sums are in registers.
WIDEST = 256


def refusal(q: jax.Array) -> str | None:
    """Why the kernel can't take these queries [B, N, H], or None if it can."""
    if q.shape[-1] > WIDEST:
        return f"takes heads up to {WIDEST} wide, not {q.shape[-1]}"
    return native_refusal(q=q)


def _kernel(
    q_ref, weights_ref, rest_ref, y_ref, *, group: int, width: int, part: int, keys: int, parts: int, tiles, cap, weigh
):
    turn, depth, own_keys = tiles
    head, piece = pl.program_id(0), pl.program_id(1)  # of all sequences
    queries, columns = jnp.arange(height(group)), jnp.arange(pl.next_power_of_2(width))
    own = (queries < group)[:, None]

    def step(i, sums):
        places = piece * own_keys + i * turn + jnp.arange(turn)
        weights = load(weights_ref, head * group + queries, places, own & (places < keys)[None])
        used, rows = in_use(weights)[:, None], head * keys + places

        def more(j, values):
            terms = j * depth + jnp.arange(depth)
            there = (terms < part)[None]
            q = load(q_ref, head * group + queries, terms, own & there)
            return values + times_weights(q, load(rest_ref, rows, terms, used & there), transposed=True)

        if weigh:
            zeros = jnp.zeros((queries.size, turn), jnp.float32)
            values = jax.lax.fori_loop(0, pl.cdiv(part, depth), more, zeros)
            weights = weights * softplus(softcapped(values, cap))
        return sums + times_weights(weights, load(rest_ref, rows, part + columns, used & (columns < width)[None]))

    zeros = jnp.zeros((queries.size, columns.size), jnp.float32)
    sums = jax.lax.fori_loop(0, own_keys // turn, step, zeros)
    rows = (head * parts + piece) * group + queries
    store(y_ref, rows, columns, own & (columns < width)[None], sums)


def mixture(
    q2_BNA: jax.Array,
    weights_BNS: jax.Array,
    rest_BKSW: jax.Array,
    softcap_values: float | None,
    weighting: str,
    interpret: Any,
) -> jax.Array:
    """The values of keys, each times its weight and its softplus, summed, [B, N, H] in float32.

    `weights_BNS` in float32; keys whose weight is 0 for all queries of their head are not read. Queries must have
    their factor already.
    """
    batch, kv_heads, keys, row = rest_BKSW.shape
    heads, part = q2_BNA.shape[1:]
    group, width = heads // kv_heads, row - part
    launch = launch_of("spark_attention_rows", itemsize=rest_BKSW.dtype.itemsize, columns=width)
    parts = pl.cdiv(keys, launch.tiles[2])
    # Where the predictor has the whole head nothing is left of the queries, and kernels take no empty arrays.
    q2_RA = q2_BNA.reshape(batch * heads, part) if part else jnp.zeros((batch * heads, 1))
    sizes = {"group": group, "width": width, "part": part, "keys": keys, "parts": parts, "tiles": launch.tiles}
    y = pl.pallas_call(
        partial(_kernel, **sizes, cap=softcap_values, weigh=weighting == "softplus"),
        grid=(batch * kv_heads, parts),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 3,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct((batch * kv_heads * parts * group, width), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        interpret=interpret,
        name="spark_attention_rows_kernel",
    )(q2_RA, weights_BNS.reshape(-1, keys), rest_BKSW.reshape(-1, row))
    return jnp.sum(y.reshape(batch, kv_heads, parts, group, width), axis=2).reshape(batch, heads, width)
