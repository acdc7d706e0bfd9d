"""Spark and flash attention over whole sequences in C++ for CPUs, with memory linear in the lengths.

Tiles of scores are made and used in the caches, and a thread takes one part of the work from its first product to its
last: the loops of `blocked` are many short operations, each of which waits for all threads. Scores, sums and statistics
are float32 whatever the arrays are. Results do not depend on the number of threads.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, H head width, V width of values.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.pallas_kernels.spark_attention import common
from sparsezoo_jax.pallas_kernels.spark_attention.reference import Problem
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility


def forward(q, k, v, visibility: Visibility, p: Problem) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Mixed values [B, T, N, V], attended keys [B, T, N], and for `backward` threshold and normaliser of each query.

    The normaliser is the logarithm of the softmax's sum; the two are [B, T, N], float32.
    """
    by_row, y = q.shape[:3], jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), v.dtype)
    results = [y, *(jax.ShapeDtypeStruct(by_row, dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32))]
    arrays = (scaled(q, p), of_scores(k, p), v, *visibility.arrays)
    found = native.call("attention_forward", results, *arrays, vmap_method="sequential", **_form(visibility, p))
    y, threshold, normaliser, attended = found
    if p.selection == "none":
        attended = jnp.broadcast_to(visibility.keys_seen[:, :, None], by_row)
    return y, attended, (threshold, normaliser)


def backward(
    q, k, v, visibility: Visibility, y, statistics: tuple[jax.Array, jax.Array], dy, p: Problem
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v from that of y [B, T, N, V] and the `statistics` that `forward` returned."""
    delta_BTN = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
    arrays = (scaled(q, p), of_scores(k, p), v, *visibility.arrays, *statistics, dy, delta_BTN)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:3]]
    found = native.call("attention_backward", results, *arrays, vmap_method="sequential", **_form(visibility, p))
    dq, dk, dv = found
    return common.joined([dq], q), common.joined([dk], k), dv


def scaled(q: jax.Array, p: Problem) -> jax.Array:
    """Queries [B, T, N, H] times the scale of their part of the width.

    Before the product and in the queries' dtype, as the definition does: else bfloat16 selects other keys.
    """
    first = p.predictor_scale * q[..., : p.r]
    return first if p.weighting == "none" else jnp.concatenate([first, p.value_scale * q[..., p.r :]], axis=-1)


def of_scores(x: jax.Array, p: Problem) -> jax.Array:
    """The part of the width of queries or keys that the operation uses."""
    return x[..., : p.r] if p.weighting == "none" else x


def _form(visibility: Visibility, p: Problem) -> dict[str, Any]:
    """The attributes of both operations; a cap or window of 0 is none."""
    return {
        "window": visibility.window or 0,
        "selects": p.selection != "none",
        "r": p.r,
        "top_k": float(p.top_k),
        "ddof": p.ddof,
        "predictor_scale": float(p.predictor_scale),
        "value_scale": float(p.value_scale),
        "softcap": float(p.softcap or 0),
        "softcap_values": float(p.softcap_values or 0),
        "softplus": p.weighting == "softplus",
    }


def refusal(q, k, v, visibility: Any, selection: str) -> str | None:
    """Why these arrays can't be taken, or None if they can."""
    return common.refusal(q, k, v, visibility, selection, interpret=False)
