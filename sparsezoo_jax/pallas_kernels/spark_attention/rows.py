"""Spark attention of one query per sequence over a cache whose predictor part lies by itself.

Shapes: B sequences, N query heads, K key/value heads of G = N/K queries, S keys, H head width, r of it the predictor's.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels import weighted_rows
from sparsezoo_jax.pallas_kernels.attention.rows import check_cache, head_products
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, pallas, plain
from sparsezoo_jax.pallas_kernels.rows import check_shapes, native_refusal, reread_each_turn, result_shapes
from sparsezoo_jax.pallas_kernels.spark_attention import rows_gpu
from sparsezoo_jax.pallas_kernels.spark_attention.reference import (
    NEGATIVE,
    select_keys,
    softcapped,
    softplus,
)
from sparsezoo_jax.sharding import num_shards, shard_map

#: Selected keys of a query that the implementation in plain JAX gathers at a time.
GROUP = 64


def spark_attention_rows(
    q: jax.Array,
    k1: jax.Array,
    rest: jax.Array,
    mask: jax.Array,
    *,
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
    """`spark_attention` of one query per sequence: all of the predictor is read, and the rows of attended keys.

    In float32; no gradient. On a mesh a device has its part of the sequences ("batch") and of the heads ("heads",
    "kv_heads"). Where the mesh divides the heads of queries but not those of keys, each has all heads: taking those
    that its queries need would copy them out of the cache.

    Args:
      q: [B, N, H], float32 or bfloat16.
      k1: [B, K, S, r] cache of the keys' first r dimensions, in float32 or bfloat16.
      rest: [B, K, S, (H - r) + H]: of each key its other dimensions and, after them, its value.
      mask: [B, S] booleans, true where the key is visible. Keys that are not visible are not read natively.
      top_k, ddof, predictor_scale, value_scale, softcap, softcap_values, selection, weighting: as in `spark_attention`;
        "exact" selection has no native form.
      implementation: "xla" (gathers attended rows in a loop), "native", "pallas_gpu", "pallas_tpu", either of these
        with "_interpret" (see `dispatch`), or None: "native" on a CPU, the kernel on a GPU for heads up to 256 wide and
        on a TPU, else "xla". The kernel for TPUs reads tiles of 8 (float32) or 16 (bfloat16) keys.

    Returns:
      [B, N, H] in the dtype of q, and the number of attended keys, int32 [B, N].

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.

    Source: Spark Transformer (arXiv 2506.06644), section 3, Spark-Attn.
    """
    (heads, width), (kv_heads, r) = q.shape[1:], (k1.shape[1], k1.shape[-1])
    limit = width if weighting == "none" else width - 1
    require(1 <= r <= limit, "spark_attention_rows.k1", k1.shape, f"must be from 1 to {limit} wide, for q")
    check_cache("spark_attention_rows", q, mask, k1=k1, rest=rest)
    check_shapes("spark_attention_rows", {"rest": (rest.shape, (*k1.shape[:3], width - r + width))})
    require(top_k > 0, "spark_attention_rows.top_k", top_k, "must be above 0")
    predictor_factor = r**-0.5 if predictor_scale is None else predictor_scale
    value_factor = max(width - r, 1) ** -0.5 if value_scale is None else value_scale

    def selecting(mixture, q, k1, rest, mask):
        q_float32 = q.astype(jnp.float32)
        # Fused with the statistics, XLA for CPU computes the scores several times. The factor comes after the product,
        # which takes queries in the cache's type: before it, it would be rounded with them.
        products = jax.lax.optimization_barrier(head_products(q_float32[..., :r], k1))
        scores = softcapped(predictor_factor * products, softcap)
        selected = select_keys(scores, mask[:, None], top_k, ddof=ddof, selection=selection)
        weights = jnp.where(selected, jax.nn.softmax(jnp.where(selected, scores, NEGATIVE), axis=-1), 0)
        attended = jnp.sum(selected, axis=-1, dtype=jnp.int32)
        y = mixture(value_factor * q_float32[..., r:], weights, rest, softcap_values, weighting)
        # Nothing is selected of scores that are no numbers, which must not look like a query that sees nothing.
        broken = jnp.any(jnp.isnan(scores) & mask[:, None], axis=-1, keepdims=True)
        return jnp.where(broken, jnp.nan, y).astype(q.dtype), attended

    def on_device(mixture, *arrays, interpret):
        return selecting(partial(mixture, interpret=interpret), *arrays)

    def cpp(q, k1, rest, mask):
        return native.call(
            "spark_attention",
            result_shapes((q.shape, q.dtype), (q.shape[:2], jnp.int32)),
            *(q, k1, rest, mask, jnp.zeros(0, jnp.float32)),
            top_k=0.0 if selection == "none" else float(top_k),
            ddof=ddof,
            predictor_scale=float(predictor_factor),
            value_scale=float(value_factor),
            softcap=float(softcap or 0),
            softcap_values=float(softcap_values or 0),
            softplus=weighting == "softplus",
        )

    def on_shards(q, k1, rest, mask, split):
        del split

        def tpu_refusal(interpret):
            group = q.shape[1] // k1.shape[1]
            return native_refusal(q=q) or weighted_rows.refusal(group, width - r, rest, interpret=interpret)

        cpp_refusal = 'selection="exact" has no native form' if selection == "exact" else native_refusal(q=q)
        implementations = [
            plain(partial(selecting, _gathered)),
            native_cpu(cpp, cpp_refusal),
            *pallas("cuda", partial(on_device, rows_gpu.mixture), lambda interpret: rows_gpu.refusal(q)),
            *pallas("tpu", partial(on_device, _on_tpu), tpu_refusal),
        ]
        return dispatch("spark_attention_rows", implementation, implementations)(q, k1, rest, mask)

    together = num_shards("heads", heads) == num_shards("kv_heads", kv_heads)
    queries, keys = ("batch", "heads", None), ("batch", "kv_heads", None, None)
    if not together:
        queries, keys = ("batch", None, None), ("batch", None, None, None)
    return shard_map(on_shards, [q, k1, rest, mask], [queries, keys, keys, ("batch", None)], (queries, queries[:2]))


def _on_tpu(q2_BNA, weights_BNS, rest_BKSW, softcap_values, weighting, interpret):
    """What `_gathered` returns; tiles of memory in which no key has a weight are not read."""
    batch, kv_heads, keys, width = rest_BKSW.shape
    heads = batch * kv_heads

    def by_head(x: jax.Array) -> jax.Array:
        return x.reshape(heads, q2_BNA.shape[1] // kv_heads, x.shape[-1])

    def weigh(values):
        return softplus(softcapped(values, softcap_values)) if weighting == "softplus" else jnp.ones_like(values)

    y_HGV, _ = weighted_rows.weighted_rows(
        by_head(q2_BNA),
        by_head(weights_BNS),
        [rest_BKSW.reshape(heads, keys, width)],
        weigh,
        name="spark_attention_rows_kernel",
        interpret=interpret,
    )
    return y_HGV.reshape(*q2_BNA.shape[:2], -1)


def _gathered(
    q2_BNA: jax.Array,
    weights_BNS: jax.Array,
    rest_BKSW: jax.Array,
    softcap_values: float | None,
    weighting: str,
) -> jax.Array:
    """The sum of values times weights, [B, N, H]; the rows of keys whose weight is 0 are not read.

    With `weighting` "softplus" each weight is multiplied by the softplus of the query's product with the key.
    """
    batch, heads, keys = weights_BNS.shape
    part = q2_BNA.shape[-1]
    group = heads // rest_BKSW.shape[1]
    count_BNS = jnp.cumsum(weights_BNS != 0, axis=-1, dtype=jnp.int32)
    most = jnp.max(count_BNS)
    first_row_BN = (jnp.arange(batch)[:, None] * rest_BKSW.shape[1] + jnp.arange(heads) // group) * keys
    rest_RW = rest_BKSW.reshape(-1, rest_BKSW.shape[-1])

    def body(state):
        turn, total_BNH = state
        turn, rows_RW = reread_each_turn(turn, rest_RW)
        wanted = turn * GROUP + jnp.arange(GROUP) + 1
        # Past a query's last key that one is taken again; 0 keys are found at place 0.
        places_BNP = jax.vmap(jax.vmap(jnp.searchsorted))(count_BNS, jnp.minimum(wanted, count_BNS[..., -1:]))
        valid_BNP = wanted <= count_BNS[..., -1:]
        rows_BNPW = jnp.take(rows_RW, first_row_BN[..., None] + places_BNP, axis=0).astype(jnp.float32)
        # The products read converted rows from memory: fused with them, rows would be converted for every output.
        rows_BNPW = jax.lax.optimization_barrier(rows_BNPW)
        weights_BNP = jnp.where(valid_BNP, jnp.take_along_axis(weights_BNS, places_BNP, axis=-1), 0)
        if weighting == "softplus":
            values_BNP = jnp.einsum("bnpa,bna->bnp", rows_BNPW[..., :part], q2_BNA, precision="highest")
            weights_BNP = weights_BNP * softplus(softcapped(values_BNP, softcap_values))
        mixed_BNH = jnp.einsum("bnp,bnph->bnh", weights_BNP, rows_BNPW[..., part:], precision="highest")
        return turn + 1, total_BNH + mixed_BNH

    total_BNH = jnp.zeros((batch, heads, rest_BKSW.shape[-1] - part), jnp.float32)
    return jax.lax.while_loop(lambda state: state[0] * GROUP < most, body, (jnp.int32(0), total_BNH))[1]
