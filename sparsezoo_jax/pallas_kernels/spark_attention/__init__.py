"""Spark attention: part of the head width selects about k keys, the rest of it weighs them."""

from __future__ import annotations

from typing import Literal

import jax

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, plain
from sparsezoo_jax.pallas_kernels.spark_attention import reference
from sparsezoo_jax.pallas_kernels.spark_attention.kernels import kernels
from sparsezoo_jax.pallas_kernels.spark_attention.reference import (
    NEGATIVE,
    Problem,
    attention_scores,
    attention_values,
    rows_of_mask,
    select_keys,
    softcapped,
)
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility, mask_of

__all__ = [
    "NEGATIVE",
    "Visibility",
    "attention_scores",
    "attention_values",
    "predicted_keys",
    "rows_of_mask",
    "select_keys",
    "softcapped",
    "spark_attention",
]


def spark_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | Visibility,
    *,
    r: int,
    top_k: int,
    ddof: int = 1,
    predictor_scale: float | None = None,
    value_scale: float | None = None,
    softcap: float | None = None,
    softcap_values: float | None = None,
    selection: Literal["statistical", "exact", "none"] = "statistical",
    weighting: Literal["softplus", "none"] = "softplus",
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`V [softmax(StatTop_k^-inf(K1^T q[:r])) * softplus(K2^T q[r:])]`, per head and query.

    The softmax runs over the selected keys only and its product with the softplus is not renormalised. Rotary
    embeddings must already be applied, separately to the first r and to the remaining dimensions.

    Args:
      q: [B, T, N, H] queries.
      k, v: [B, S, K, H] keys and values; K divides N and a key/value head serves N/K query heads, each of which makes
        its own selection.
      mask: a `Visibility`, or booleans [B, T, S], true where the query may see the key.
      r: head dimensions of the predictor, below H (equal to H only with `weighting="none"`).
      top_k: target number of attended keys; queries that see no more than that attend to all they see.
      ddof: divisor of the variance, n - ddof.
      predictor_scale, value_scale: default r^-1/2 and (H - r)^-1/2.
      softcap: cap of the predictor's scores, applied before their statistics; `softcap_values`: cap of the softplus's
        argument. None: no cap.
      selection: "statistical"; "exact" (sorted) and "none" (all visible keys) are controls.
      weighting: "softplus", or "none" for the softmax alone.
      implementation: "xla" (holds the scores of all pairs), "native", "blocked", "pallas_tpu", "pallas_gpu", the last
        two also with "_interpret" (see `dispatch`; memory of all but "xla" is linear in T and S), or None. For a
        `Visibility`, selections that don't sort and bfloat16 or float32 throughout that is the kernel on a TPU or GPU
        from 128 queries on (on a GPU also heads of up to 256), on a CPU "native" from 64 on, or "blocked" from 256 on
        where the native library is missing; otherwise "xla".
        Where a mesh is active all but "xla" are called on each device's part of batch, queries and heads.

    Returns:
      [B, T, N, H], and the number of attended keys [B, T, N] (int32). Queries that see nothing get zeros.

    Raises:
      ConfigError: r or heads that don't fit, no such implementation, or one that can't take these arrays.

    Source: Spark Transformer (arXiv 2506.06644), section 3, Spark-Attn.
    """
    width = q.shape[-1]
    limit = width if weighting == "none" else width - 1
    require(1 <= r <= limit, "spark_attention.r", r, f"must be between 1 and {limit} for head width {width}")
    require(
        q.shape[2] % k.shape[2] == 0,
        "spark_attention.k",
        k.shape,
        f"its head count must divide the queries' {q.shape[2]}",
    )
    p = Problem(
        r=r,
        top_k=top_k,
        ddof=ddof,
        predictor_scale=r**-0.5 if predictor_scale is None else predictor_scale,
        value_scale=max(width - r, 1) ** -0.5 if value_scale is None else value_scale,
        softcap=softcap,
        softcap_values=softcap_values,
        selection=selection,
        weighting=weighting,
    )

    implementations = [
        plain(lambda q, k, v, mask: reference.spark_attention(q, k, v, mask_of(mask), p)),
        *kernels(p, q, k, v, mask),
    ]
    return dispatch("spark_attention", implementation, implementations)(q, k, v, mask)


def predicted_keys(
    q: jax.Array,
    k: jax.Array,
    mask: jax.Array | Visibility,
    *,
    r: int,
    top_k: int,
    ddof: int = 1,
    predictor_scale: float | None = None,
    softcap: float | None = None,
    selection: Literal["statistical", "exact", "none"] = "statistical",
) -> tuple[jax.Array, jax.Array]:
    """What `spark_attention` selects, for inspection: arguments as there, by its plain JAX definition.

    Returns:
      The predictor's scores, at least float32, and booleans of the selected keys, both [B, N, T, S].
    """
    batch, queries, heads, _ = q.shape
    p = Problem(
        r=r,
        top_k=top_k,
        ddof=ddof,
        predictor_scale=r**-0.5 if predictor_scale is None else predictor_scale,
        value_scale=0.0,  # of what selects nothing
        softcap=softcap,
        softcap_values=None,
        selection=selection,
        weighting="none",
    )
    scores, selected = reference.predicted_keys(q, k, mask_of(mask), p)

    def by_head(rows_BKRS: jax.Array) -> jax.Array:
        # Rows are ordered by query first; see `attention_scores`.
        return rows_BKRS.reshape(batch, k.shape[2], queries, -1, k.shape[1]).swapaxes(2, 3).reshape(shape)

    shape = (batch, heads, queries, k.shape[1])
    return by_head(scores), by_head(selected)
