"""Attention to all visible keys without an array of the scores of all pairs, by Spark attention's kernels.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, H head width, V width of values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.checkpoint_names import ATTENTION
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, plain
from sparsezoo_jax.pallas_kernels.spark_attention.kernels import kernels
from sparsezoo_jax.pallas_kernels.spark_attention.reference import (
    NEGATIVE,
    Problem,
    attention_scores,
    attention_values,
    rows_of_mask,
    softcapped,
)
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility, mask_of


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | Visibility,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`softmax(cap(scale q k)) v` over the visible keys, per head and query; zeros for a query that sees none.

    Rotary embeddings and norms must already be applied.

    Args:
      q: [B, T, N, H] queries.
      k: [B, S, K, H] keys; K divides N, and a key/value head serves N/K query heads.
      v: [B, S, K, V] values, of any width.
      mask: a `Visibility`, or booleans [B, T, S], true where the query may see the key.
      scale: factor on the scores; None: H^-1/2.
      softcap: scores become cap * tanh(scores / cap).
      implementation: "xla" (holds the scores of all pairs; the definition), "native", "blocked", "pallas_tpu",
        "pallas_gpu", the last two also with "_interpret" (see `dispatch`; memory of all but "xla" is linear in T and
        S), or None. For a `Visibility` and bfloat16 or float32 throughout that is the kernel on a TPU or GPU from 128
        queries on (on a GPU also heads of up to 256), on a CPU "native" from 64 on, or "blocked" from 256 on where the
        native library is missing; otherwise "xla".
        Where a mesh is active all but "xla" are called on each device's part of batch, queries and heads.

    Returns:
      [B, T, N, V] in the dtype of v.

    Raises:
      ConfigError: heads that don't fit, no such implementation, or one that can't take these arrays.

    Source: FlashAttention (arXiv 2205.14135), with the tiles and the single backward kernel of `spark_attention`.
    """
    width = q.shape[-1]
    require(k.shape[-1] == width, "flash_attention.k", k.shape, f"must have the width {width} of q")
    require(
        q.shape[2] % k.shape[2] == 0,
        "flash_attention.k",
        k.shape,
        f"its head count must divide the queries' {q.shape[2]}",
    )
    factor = width**-0.5 if scale is None else scale
    p = Problem(
        r=width,
        top_k=1,
        ddof=1,
        predictor_scale=factor,
        value_scale=1.0,
        softcap=softcap,
        softcap_values=None,
        selection="none",
        weighting="none",
    )

    def definition(q, k, v, mask):
        y = dense_attention(q, k, v, mask_of(mask), scale=factor, softcap=softcap)
        seen_BT = jnp.sum(mask_of(mask), axis=-1, dtype=jnp.int32)
        return checkpoint_name(y, ATTENTION), jnp.broadcast_to(seen_BT[:, :, None], q.shape[:3])

    implementations = [plain(definition), *kernels(p, q, k, v, mask)]
    return dispatch("flash_attention", implementation, implementations)(q, k, v, mask)[0]


def dense_attention(q, k, v, mask: jax.Array, *, scale: float, softcap: float | None) -> jax.Array:
    """The definition of `flash_attention`, with the scores of all pairs, at least float32; mask [B, T, S]."""
    queries, group = q.shape[1], q.shape[2] // k.shape[2]
    scores_BKRS = softcapped(attention_scores(q, k, scale), softcap)
    visible = rows_of_mask(mask, group)
    weights = jax.nn.softmax(jnp.where(visible, scores_BKRS, NEGATIVE), axis=-1)
    return attention_values(jnp.where(visible, weights, 0), v, queries)
