"""Spark attention in plain JAX: a thresholded softmax on the first r head dimensions times a softplus on the others.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value
head, R = T * G rows of such a group, H head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sparsezoo_jax.pallas_kernels.checkpoint_names import ATTENTION
from sparsezoo_jax.pallas_kernels.statistical_topk import row_statistics

NEGATIVE = -1e30  # stands for -inf: exp() of it is 0, and differences of two of it are no NaN


class Problem(NamedTuple):
    """The arguments of `spark_attention` that are known when it is traced; see there."""

    r: int
    top_k: int
    ddof: int
    predictor_scale: float
    value_scale: float
    softcap: float | None
    softcap_values: float | None
    selection: str
    weighting: str


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
        return jnp.broadcast_to(visible, scores.shape)
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


def softplus(x: jax.Array) -> jax.Array:
    """`log(1 + exp(x))`, spelled so that its derivative reuses the exponential."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def attention_scores(q: jax.Array, k: jax.Array, scale: float) -> jax.Array:
    """Scores, at least float32, [B, K, T * G, S] of queries [B, T, N, H] and keys [B, S, K, H], times `scale`.

    The queries of a key/value head form one matrix (row t * G + g, so that a sharded sequence stays sharded), and the
    product comes out in the order in which it is used; other orders make XLA for CPU transpose the scores, which are
    much larger than q and k.
    """
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    q_BTKGH = (scale * q).reshape(batch, queries, kv_heads, heads // kv_heads, width)
    q_BKRH = q_BTKGH.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, queries * heads // kv_heads, width)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k.transpose(0, 2, 1, 3), preferred_element_type=dtype)


def attention_values(weights_BKRS: jax.Array, v: jax.Array, queries: int) -> jax.Array:
    """Mix values [B, S, K, H] by weights [B, K, T * G, S] (as `attention_scores` orders them) to [B, T, N, H]."""
    batch, kv_heads, rows, _ = weights_BKRS.shape
    y_BKRH = jnp.einsum("bkrs,bksh->bkrh", weights_BKRS.astype(v.dtype), v.transpose(0, 2, 1, 3))
    y_BKTGH = y_BKRH.reshape(batch, kv_heads, queries, rows // queries, -1)
    return y_BKTGH.transpose(0, 2, 1, 3, 4).reshape(batch, queries, kv_heads * rows // queries, -1)


def rows_of_mask(mask_BTS: jax.Array, group: int) -> jax.Array:
    """The mask [B, 1, T * G, S] of scores as `attention_scores` orders them."""
    return jnp.repeat(mask_BTS, group, axis=1)[:, None]


def predicted_keys(q: jax.Array, k: jax.Array, mask: jax.Array, p: Problem) -> tuple[jax.Array, jax.Array]:
    """Predictor scores and selected keys, both [B, K, T * G, S]."""
    visible = rows_of_mask(mask, q.shape[2] // k.shape[2])
    scores = softcapped(attention_scores(q[..., : p.r], k[..., : p.r], p.predictor_scale), p.softcap)
    return scores, select_keys(scores, visible, p.top_k, ddof=p.ddof, selection=p.selection)


def spark_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, p: Problem
) -> tuple[jax.Array, jax.Array]:
    """Returns the mixed values [B, T, N, H] and the number of attended keys [B, T, N]."""
    batch, queries, heads, _ = q.shape
    group = heads // k.shape[2]
    predictor, selected = predicted_keys(q, k, mask, p)
    weights = jax.nn.softmax(jnp.where(selected, predictor, NEGATIVE), axis=-1)
    # A query that sees nothing (padding of a cache) has a softmax over nothing: its weights are zero, not uniform.
    weights = jnp.where(selected, weights, 0)
    if p.weighting == "softplus":
        arguments = attention_scores(q[..., p.r :], k[..., p.r :], p.value_scale)
        weights = weights * softplus(softcapped(arguments, p.softcap_values))
    attended_BKR = jnp.sum(selected, axis=-1, dtype=jnp.int32)
    attended_BTN = attended_BKR.reshape(batch, -1, queries, group).swapaxes(1, 2).reshape(batch, queries, heads)
    return checkpoint_name(attention_values(weights, v, queries), ATTENTION), attended_BTN
