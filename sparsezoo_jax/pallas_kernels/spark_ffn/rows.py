"""The Spark FFN of a few tokens: all of the predictor is read, and the rows of active neurons.

Shapes: M tokens, D model width, r predictor width, F neurons.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels import weighted_rows
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, pallas, plain
from sparsezoo_jax.pallas_kernels.rows import (
    MOST_ROWS,
    check_shapes,
    check_weights,
    combination,
    dequantised,
    native_refusal,
    or_empty,
    product,
    result_shapes,
    sum_over_active,
)
from sparsezoo_jax.pallas_kernels.spark_ffn import rows_gpu
from sparsezoo_jax.pallas_kernels.statistical_topk.reference import normal_quantile, row_statistics, shrink

Scales = tuple[jax.Array | None, jax.Array | None]

#: Active neurons that the implementation in plain JAX gathers at a time: the fastest of 1, 16, 64 and 256 on a CPU.
GROUP = 64


def spark_ffn_rows(
    x: jax.Array,
    k1: jax.Array,
    rows: jax.Array,
    *,
    top_k: float,
    ddof: int = 1,
    huber_delta: float = 0.0,
    scales: Scales = (None, None),
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`spark_ffn` with weights laid out for inference, in float32; no gradient.

    Args:
      x: [M, D], float32 or bfloat16. Its first r dimensions select, the remaining D - r value.
      k1: [F, r] predictor, neuron by neuron, in float32, bfloat16 or int8.
      rows: [F, (D - r) + D]: of each neuron the row of K2^T and, after it, the row of V.
      top_k: target number of active neurons, below F.
      ddof, huber_delta: as in `statistical_topk`.
      scales: float32 factors of int8 weights: [F] of k1, [F, 2] of the two parts of rows. Both may have another type.
      implementation: "xla" (gathers active rows in a loop), "native", "pallas_gpu", "pallas_tpu", either of these with
        "_interpret" (see `dispatch`), or None: for up to 16 rows "native" on a CPU and the kernel on a GPU or TPU, else
        "xla". The kernel for TPUs reads tiles of 8 (float32), 16 (bfloat16) or 32 (int8) rows.

    Returns:
      [M, D] in the dtype of x, and the number of active neurons, int32 [M].

    Raises:
      ConfigError: shapes or dtypes that don't fit, top_k out of range, or an implementation that can't take them.

    Source: Spark Transformer (arXiv 2506.06644), section 2, Spark-FFN.
    """
    (m, d), (neurons, r) = x.shape, k1.shape
    require(0 < r < d, "spark_ffn_rows.k1", k1.shape, f"must be below {d} wide, for x")
    check_shapes("spark_ffn_rows", {"rows": (rows.shape, (neurons, d - r + d))})
    check_weights("spark_ffn_rows", "k1", k1, scales[0], (neurons,))
    check_weights("spark_ffn_rows", "rows", rows, scales[1], (neurons, 2))
    require(0 < top_k < neurons, "spark_ffn_rows.top_k", top_k, f"must be above 0 and below the {neurons} neurons")
    require(huber_delta >= 0, "spark_ffn_rows.huber_delta", huber_delta, "must be 0 or above")

    def xla(x, k1, rows, scales):
        gate = _gate(product(x[:, :r], k1, scales[0]), top_k, ddof, huber_delta)
        active = gate != 0
        values = x[:, r:]

        def add(total, places, valid, rows):
            # Take the rows once, ahead of both products: fused, each would take and convert them for itself.
            taken = jax.lax.optimization_barrier(jnp.take(rows, places, axis=0))
            k2_scale, v_scale = (None, None) if scales[1] is None else (scales[1][places, 0], scales[1][places, 1])
            hidden = jnp.where(valid, gate[:, places], 0) * product(values, taken[:, : d - r], k2_scale)
            return total + combination(hidden, taken[:, d - r :], v_scale)

        y = sum_over_active(jnp.any(active, axis=0), GROUP, jnp.zeros((m, d), jnp.float32), add, rows)
        return y.astype(x.dtype), jnp.sum(active, axis=-1, dtype=jnp.int32)

    def cpp(x, k1, rows, scales):
        results = result_shapes((x.shape, x.dtype), ((m,), jnp.int32))
        attributes = {"ddof": ddof, "top_k": float(top_k), "huber_delta": float(huber_delta)}
        quantile = normal_quantile(1 - top_k / neurons)
        arrays = (x, k1, rows, *map(or_empty, scales))
        return native.call("spark_ffn", results, *arrays, quantile=quantile, **attributes)

    def gpu(x, k1, rows, scales, *, interpret):
        gate = _gate(product(x[:, :r], k1, scales[0]), top_k, ddof, huber_delta)
        y = rows_gpu.sum_over_active(x[:, r:], gate, rows, scales[1], interpret)
        return y.astype(x.dtype), jnp.sum(gate != 0, axis=-1, dtype=jnp.int32)

    def tpu(x, k1, rows, scales, *, interpret):
        gate = _gate(product(x[:, :r], k1, scales[0]), top_k, ddof, huber_delta)
        weights = gate if scales[1] is None else gate * (scales[1][:, 0] * scales[1][:, 1])
        y, _ = weighted_rows.weighted_rows(
            x[None, :, r:].astype(jnp.float32),
            weights[None],
            [rows[None]],
            lambda values: values,
            name="spark_ffn_rows_kernel",
            interpret=interpret,
        )
        return y[0].astype(x.dtype), jnp.sum(gate != 0, axis=-1, dtype=jnp.int32)

    def tpu_refusal(interpret):
        return native_refusal(x=x) or weighted_rows.refusal(m, d - r, rows, interpret=interpret)

    few = m <= MOST_ROWS
    implementations = [
        plain(xla),
        native_cpu(cpp, native_refusal(x=x), default=few),
        *pallas("cuda", gpu, lambda interpret: rows_gpu.refusal(x)),
        *pallas("tpu", tpu, tpu_refusal, default=few),
    ]
    return dispatch("spark_ffn_rows", implementation, implementations)(x, k1, rows, scales)


def _gate(scores: jax.Array, top_k: float, ddof: int, huber_delta: float) -> jax.Array:
    # Fused with the statistics, XLA for CPU computes the scores several times.
    scores = jax.lax.optimization_barrier(scores)
    threshold = row_statistics(scores, top_k, ddof=ddof).threshold
    return jax.nn.gelu(shrink(scores, threshold, huber_delta), approximate=True)


def reference(
    x: jax.Array,
    k1: jax.Array,
    rows: jax.Array,
    *,
    top_k: float,
    ddof: int = 1,
    huber_delta: float = 0.0,
    scales: Scales = (None, None),
) -> tuple[jax.Array, jax.Array]:
    """The definition: every neuron, with weights in float32."""
    r, x_float32 = k1.shape[1], x.astype(jnp.float32)
    value_width = x.shape[1] - r
    gate = _gate(x_float32[:, :r] @ dequantised(k1, scales[0]).T, top_k, ddof, huber_delta)
    k2_scale, v_scale = (None, None) if scales[1] is None else (scales[1][:, 0], scales[1][:, 1])
    hidden = gate * (x_float32[:, r:] @ dequantised(rows[:, :value_width], k2_scale).T)
    y = hidden @ dequantised(rows[:, value_width:], v_scale)
    return y.astype(x.dtype), jnp.sum(gate != 0, axis=-1, dtype=jnp.int32)
