"""Attention of one query per sequence over a cache: what sparse attention is compared with.

Shapes: B sequences, N query heads, K key/value heads of G = N/K queries, S keys, H head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.rows import TOKENS, check_shapes, native_refusal, result_shapes
from sparsezoo_jax.pallas_kernels.spark_attention.reference import NEGATIVE, softcapped


def attention_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`softmax(cap(scale q k)) v` over the visible keys, in float32; zeros where a query sees none.

    Args:
      q: [B, N, H], float32 or bfloat16, one query for each sequence and head.
      k, v: [B, K, S, H] caches in float32 or bfloat16; head n reads those of n // (N / K).
      mask: [B, S] booleans, true where the key is visible. Keys that are not visible are not read natively.
      scale: factor on the scores; None: H^-1/2.
      softcap: scores become cap * tanh(scores / cap).
      implementation: "xla", "native", or None: "native" on a CPU.

    Returns:
      [B, N, H] in the dtype of q.

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.
    """
    check_cache("attention_rows", q, mask, k=k, v=v)
    check_shapes("attention_rows", {name: (a.shape[-1:], q.shape[-1:]) for name, a in (("k", k), ("v", v))})
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def xla(q, k, v, mask):
        scores = softcapped(head_products(factor * q.astype(jnp.float32), k), softcap)
        visible = mask[:, None]
        weights = jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, NEGATIVE), axis=-1), 0)
        return head_mixture(weights, v).astype(q.dtype)

    def cpp(q, k, v, mask):
        attributes: dict[str, Any] = {"scale": float(factor), "softcap": float(softcap or 0)}
        none = jnp.zeros(0, jnp.float32)
        return native.call("attention", result_shapes((q.shape, q.dtype)), q, k, v, mask, none, **attributes)[0]

    implementations = [plain(xla), native_cpu(cpp, native_refusal(q=q))]
    return dispatch("attention_rows", implementation, implementations)(q, k, v, mask)


def check_cache(operation: str, q: jax.Array, mask: jax.Array, **caches: jax.Array) -> None:
    """Raise `ConfigError` unless the caches [B, K, S, ...] fit q [B, N, H] and the mask [B, S]."""
    first = next(iter(caches.values()))
    heads, keys = first.shape[1], first.shape[2]
    for name, cache in caches.items():
        check_shapes(operation, {name: (cache.shape[:-1], (q.shape[0], heads, keys))})
        allowed = " or ".join(jnp.dtype(dtype).name for dtype in TOKENS)
        require(cache.dtype in TOKENS, f"{operation}.{name}", cache.dtype, f"must be {allowed}")
        require(
            q.shape[1] % heads == 0, f"{operation}.{name}", cache.shape, f"its heads must divide the {q.shape[1]} of q"
        )
    check_shapes(operation, {"mask": (mask.shape, (q.shape[0], keys))})
    require(mask.dtype == jnp.bool_, f"{operation}.mask", mask.dtype, "must be booleans")


def head_products(q_BNH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """Products of queries with the keys of their heads, [B, N, S] in float32."""
    batch, heads, width = q_BNH.shape
    kv_heads, keys = k_BKSH.shape[1:3]
    q_BKGH = q_BNH.reshape(batch, kv_heads, heads // kv_heads, width).astype(k_BKSH.dtype)
    scores = jnp.einsum("bkgh,bksh->bkgs", _at_least_four_rows(q_BKGH), k_BKSH, preferred_element_type=jnp.float32)
    return scores[:, :, : heads // kv_heads].reshape(batch, heads, keys)


def head_mixture(weights_BNS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """Values of each head mixed by its weights, [B, N, H] in float32."""
    batch, heads, keys = weights_BNS.shape
    kv_heads = v_BKSH.shape[1]
    weights = weights_BNS.reshape(batch, kv_heads, heads // kv_heads, keys).astype(v_BKSH.dtype)
    mixed = jnp.einsum("bkgs,bksh->bkgh", _at_least_four_rows(weights), v_BKSH, preferred_element_type=jnp.float32)
    return mixed[:, :, : heads // kv_heads].reshape(batch, heads, -1)


def _at_least_four_rows(x_BKGA: jax.Array) -> jax.Array:
    """X padded to 4 rows if it is bfloat16: XLA's products of one or two rows take a path that is ten times slower."""
    missing = 4 - x_BKGA.shape[2] if x_BKGA.dtype == jnp.bfloat16 else 0
    return jnp.pad(x_BKGA, ((0, 0), (0, 0), (0, max(0, missing)), (0, 0)))


def reference(q, k, v, mask, *, scale: float | None = None, softcap: float | None = None) -> jax.Array:
    """The definition of `attention_rows`, in float32."""
    group = q.shape[1] // k.shape[1]
    k_float32, v_float32 = (jnp.repeat(a.astype(jnp.float32), group, axis=1) for a in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = softcapped(scale * jnp.einsum("bnh,bnsh->bns", q.astype(jnp.float32), k_float32), softcap)
    visible = mask[:, None]
    weights = jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, NEGATIVE), axis=-1), 0)
    return jnp.einsum("bns,bnsh->bnh", weights, v_float32).astype(q.dtype)
