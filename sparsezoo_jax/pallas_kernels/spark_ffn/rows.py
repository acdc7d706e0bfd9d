"""The Spark FFN of a few tokens: all of the predictor is read, and the rows of active neurons.

Shapes: M tokens, D model width, r predictor width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
    sum_over_devices,
)
from sparsezoo_jax.pallas_kernels.spark_ffn import rows_gpu
from sparsezoo_jax.pallas_kernels.statistical_topk.reference import normal_quantile, row_statistics, shrink
from sparsezoo_jax.sharding import shard_map

Scales = tuple[jax.Array | None, jax.Array | None]
Gated = Callable[[jax.Array], jax.Array]

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

    On a mesh a device has its part of the tokens ("batch") and of the neurons ("ffn"). Statistics are those of all
    neurons; results and counts of the devices that split these are summed.

    Args:
      x: [M, D], float32 or bfloat16. Its first r dimensions select, the remaining D - r value.
      k1: [F, r] predictor, neuron by neuron, in float32, bfloat16 or int8.
      rows: [F, (D - r) + D]: of each neuron the row of K2^T and, after it, the row of V.
      top_k: target number of active neurons, below F.
      ddof, huber_delta: as in `statistical_topk`.
      scales: float32 factors of int8 weights: [F] of k1, [F, 2] of the two parts of rows. Both may have another type.
      implementation: "xla" (gathers active rows in a loop), "native", "pallas_gpu", "pallas_tpu", either of these with
        "_interpret" (see `dispatch`), or None: for up to 16 rows "native" on a CPU and the kernel on a GPU or TPU, else
        "xla". The kernel for TPUs reads tiles of 8 (float32), 16 (bfloat16) or 32 (int8) rows. "native" takes whole
        statistics only, and so no neurons that a mesh splits. Limits are those of a device's part.

    Returns:
      [M, D] in the dtype of x, and the number of active neurons, int32 [M].

    Raises:
      ConfigError: shapes or dtypes that don't fit, top_k out of range, or an implementation that can't take them.

    Source: Spark Transformer (arXiv 2506.06644), section 2, Spark-FFN.
    """
    d, (neurons, r) = x.shape[1], k1.shape
    require(0 < r < d, "spark_ffn_rows.k1", k1.shape, f"must be below {d} wide, for x")
    check_shapes("spark_ffn_rows", {"rows": (rows.shape, (neurons, d - r + d))})
    check_weights("spark_ffn_rows", "k1", k1, scales[0], (neurons,))
    check_weights("spark_ffn_rows", "rows", rows, scales[1], (neurons, 2))
    require(0 < top_k < neurons, "spark_ffn_rows.top_k", top_k, f"must be above 0 and below the {neurons} neurons")
    require(huber_delta >= 0, "spark_ffn_rows.huber_delta", huber_delta, "must be 0 or above")

    def on_shards(x, k1, rows, k1_scale, rows_scale, split):
        over, few = split["ffn"], len(x) <= MOST_ROWS
        gated = partial(_gate, top_k=top_k, ddof=ddof, huber_delta=huber_delta, split_over=over)
        implementations = [
            plain(partial(_gathered, gated)),
            native_cpu(
                partial(_natively, top_k, ddof, huber_delta),
                "takes no neurons that a mesh splits" if over else native_refusal(x=x),
                default=few,
            ),
            *pallas("cuda", partial(_on_gpu, gated), lambda interpret: rows_gpu.refusal(x)),
            *pallas("tpu", partial(_on_tpu, gated), partial(_tpu_refusal, x, k1, rows), default=few),
        ]
        apply = dispatch("spark_ffn_rows", implementation, implementations)
        y, active = apply(x, k1, rows, (k1_scale, rows_scale))
        y, active = sum_over_devices(y, active, over)
        return y.astype(x.dtype), active

    neurons_axes = ("ffn", None)
    return shard_map(
        on_shards,
        [x, k1, rows, *scales],
        [("batch", None), neurons_axes, neurons_axes, ("ffn",), neurons_axes],
        (("batch", None), ("batch",)),
    )


def _gate(
    scores: jax.Array, *, top_k: float, ddof: int, huber_delta: float, split_over: tuple[str, ...] = ()
) -> jax.Array:
    # Fused with the statistics, XLA for CPU computes the scores several times.
    scores = jax.lax.optimization_barrier(scores)
    threshold = row_statistics(scores, top_k, ddof=ddof, split_over=split_over).threshold
    return jax.nn.gelu(shrink(scores, threshold, huber_delta), approximate=True)


# The implementations return sums in float32 and the number of active neurons. `gated` makes gates of scores.


def _gathered(gated: Gated, x, k1, rows, scales: Scales):
    r, value_width = k1.shape[1], x.shape[1] - k1.shape[1]
    gate = gated(product(x[:, :r], k1, scales[0]))
    active = gate != 0

    def add(total, places, valid, rows):
        # Take the rows once, ahead of both products: fused, each would take and convert them for itself.
        taken = jax.lax.optimization_barrier(jnp.take(rows, places, axis=0))
        k2_scale, v_scale = (None, None) if scales[1] is None else (scales[1][places, 0], scales[1][places, 1])
        hidden = jnp.where(valid, gate[:, places], 0) * product(x[:, r:], taken[:, :value_width], k2_scale)
        return total + combination(hidden, taken[:, value_width:], v_scale)

    y = sum_over_active(jnp.any(active, axis=0), GROUP, jnp.zeros(x.shape, jnp.float32), add, rows)
    return y, jnp.sum(active, axis=-1, dtype=jnp.int32)


def _natively(top_k: float, ddof: int, huber_delta: float, x, k1, rows, scales: Scales):
    results = result_shapes((x.shape, x.dtype), ((len(x),), jnp.int32))
    attributes = {"ddof": ddof, "top_k": float(top_k), "huber_delta": float(huber_delta)}
    quantile = normal_quantile(1 - top_k / len(k1))
    y, active = native.call("spark_ffn", results, x, k1, rows, *map(or_empty, scales), quantile=quantile, **attributes)
    return y.astype(jnp.float32), active


def _on_gpu(gated: Gated, x, k1, rows, scales: Scales, *, interpret):
    r = k1.shape[1]
    gate = gated(product(x[:, :r], k1, scales[0]))
    y = rows_gpu.sum_over_active(x[:, r:], gate, rows, scales[1], interpret)
    return y, jnp.sum(gate != 0, axis=-1, dtype=jnp.int32)


def _on_tpu(gated: Gated, x, k1, rows, scales: Scales, *, interpret):
    r = k1.shape[1]
    gate = gated(product(x[:, :r], k1, scales[0]))
    weights = gate if scales[1] is None else gate * (scales[1][:, 0] * scales[1][:, 1])
    y, _ = weighted_rows.weighted_rows(
        x[None, :, r:].astype(jnp.float32),
        weights[None],
        [rows[None]],
        lambda values: values,
        name="spark_ffn_rows_kernel",
        interpret=interpret,
    )
    return y[0], jnp.sum(gate != 0, axis=-1, dtype=jnp.int32)


def _tpu_refusal(x, k1, rows, interpret: bool) -> str | None:
    part = x.shape[1] - k1.shape[1]
    return native_refusal(x=x) or weighted_rows.refusal(len(x), part, rows, interpret=interpret)


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
    rule: dict[str, Any] = {"top_k": top_k, "ddof": ddof, "huber_delta": huber_delta}
    gate = _gate(x_float32[:, :r] @ dequantised(k1, scales[0]).T, **rule)
    k2_scale, v_scale = (None, None) if scales[1] is None else (scales[1][:, 0], scales[1][:, 1])
    hidden = gate * (x_float32[:, r:] @ dequantised(rows[:, :value_width], k2_scale).T)
    y = hidden @ dequantised(rows[:, value_width:], v_scale)
    return y.astype(x.dtype), jnp.sum(gate != 0, axis=-1, dtype=jnp.int32)
