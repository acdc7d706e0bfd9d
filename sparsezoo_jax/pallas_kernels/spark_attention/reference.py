"""Spark attention in plain JAX: a thresholded softmax on the first r head dimensions times a softplus on the others.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value
head, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.statistical_topk import row_statistics

NEGATIVE = -1e30  # stands for -inf: exp() of it is 0, and differences of two of it are no NaN


def select_keys(
    scores: jax.Array, visible: jax.Array, top_k: int, *, ddof: int = 1, selection: str = "statistical"
) -> jax.Array:
    """Booleans [..., S]: the keys that stay, of those `visible`, for predictor `scores` [..., S].

    Statistics cover each query's visible keys only (anything else would let the future in), with the quantile for its
    own number of them. A query with at most `top_k` visible keys keeps all; the best key always stays, so that a row
    which has a visible key has a selected one. No gradient: softmax is invariant to the threshold.
    """
    scores = jax.lax.stop_gradient(scores)
    lowest = jnp.where(visible, scores, NEGATIVE)
    best = lowest >= jnp.max(lowest, axis=-1, keepdims=True)
    if selection == "none":
        return visible
    if selection == "exact":
        k = min(top_k, scores.shape[-1])
        keep = lowest >= jax.lax.top_k(lowest, k)[0][..., -1:]
    else:
        statistics = row_statistics(scores, top_k, ddof=ddof, where=visible)
        keep = (scores >= statistics.threshold) | (statistics.count <= top_k)
    return visible & (keep | best)


def softcapped(scores: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(scores / cap)`, or `scores` without a cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def spark_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    r: int,
    top_k: int,
    ddof: int,
    predictor_scale: float,
    value_scale: float,
    softcap: float | None,
    softcap_values: float | None,
    selection: str,
    weighting: str,
) -> tuple[jax.Array, jax.Array]:
    """Returns the mixed values [B, T, N, H] and the number of attended keys [B, T, N]."""
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    q_BTKGH = q.reshape(batch, queries, kv_heads, heads // kv_heads, width)

    def scores_of(part: slice, scale: float) -> jax.Array:
        return scale * jnp.einsum(
            "btkgh,bskh->bkgts", q_BTKGH[..., part], k[..., part], preferred_element_type=jnp.float32
        )

    visible = mask[:, None, None]
    predictor = softcapped(scores_of(slice(0, r), predictor_scale), softcap)
    selected = select_keys(predictor, visible, top_k, ddof=ddof, selection=selection)
    weights = jax.nn.softmax(jnp.where(selected, predictor, NEGATIVE), axis=-1)
    # A query that sees nothing (padding of a cache) has a softmax over nothing: its weights are zero, not uniform.
    weights = jnp.where(selected, weights, 0)
    if weighting == "softplus":
        weights = weights * jax.nn.softplus(softcapped(scores_of(slice(r, width), value_scale), softcap_values))
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
    attended = jnp.sum(selected, axis=-1, dtype=jnp.int32)
    return out.reshape(batch, queries, heads, v.shape[-1]), attended.reshape(batch, heads, queries).swapaxes(1, 2)
