"""The sparse ReLU feed-forward layer of a few tokens: all of the map before the ReLU is read, and active neurons' rows.

Shapes: M tokens, D model width, F neurons.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels import weighted_rows
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, pallas, plain
from sparsezoo_jax.pallas_kernels.rows import (
    MOST_ROWS,
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
from sparsezoo_jax.pallas_kernels.spark_ffn.rows import GROUP
from sparsezoo_jax.sharding import shard_map

Scales = tuple[jax.Array | None, jax.Array | None]


def relu_ffn_rows(
    x: jax.Array,
    first: jax.Array,
    rows: jax.Array,
    *,
    scales: Scales = (None, None),
    threshold: float = 0.0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`relu_ffn` with weights laid out for inference, in float32; no gradient.

    On a mesh a device has its part of the tokens ("batch") and of the neurons ("ffn"); results and counts of the
    devices that split these are summed.

    Args:
      x: [M, D], float32 or bfloat16.
      first: [F, D], the map before the ReLU (the gate, where there is one) neuron by neuron, in float32, bfloat16 or
        int8.
      rows: of each neuron the row of the output map, [F, D], after that of the map that is gated, if any: [F, 2 D].
      scales: float32 factors of int8 weights: [F] of first, and of rows [F], or [F, 2] of its two parts.
      threshold: gates below it are 0 (ProSparse, arXiv 2402.13516, section 3.2); at least 0.
      implementation: "xla" (gathers active rows in a loop), "native", "pallas_gpu" (with a gate), "pallas_tpu", either
        of these with "_interpret" (see `dispatch`), or None: for up to 16 rows "native" on a CPU and the kernel on a
        GPU or TPU, else "xla". The kernel for TPUs reads tiles of 8 (float32), 16 (bfloat16) or 32 (int8) rows.

    Returns:
      [M, D] in the dtype of x, and the number of neurons of each token that are not 0, int32 [M].

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.
    """
    d, neurons = x.shape[1], first.shape[0]
    require(0 <= threshold < math.inf, "relu_ffn_rows.threshold", threshold, "must be at least 0, and finite")
    require(first.shape[1] == d, "relu_ffn_rows.first", first.shape, f"must be [F, {d}] for x")
    shapes = ((neurons, d), (neurons, 2 * d))
    require(rows.shape in shapes, "relu_ffn_rows.rows", rows.shape, f"must be {shapes[0]} or {shapes[1]}")
    gated = rows.shape == shapes[1]
    check_weights("relu_ffn_rows", "first", first, scales[0], (neurons,))
    check_weights("relu_ffn_rows", "rows", rows, scales[1], (neurons, 2) if gated else (neurons,))

    def on_shards(x, first, rows, first_scale, rows_scale, split):
        few = len(x) <= MOST_ROWS
        implementations = [
            plain(partial(_gathered, gated, threshold)),
            native_cpu(partial(_natively, threshold), native_refusal(x=x), default=few),
            *pallas("cuda", partial(_on_gpu, threshold), lambda interpret: _gpu_refusal(x, gated)),
            *pallas("tpu", partial(_on_tpu, gated, threshold), partial(_tpu_refusal, gated, x, rows), default=few),
        ]
        y, active = dispatch("relu_ffn_rows", implementation, implementations)(
            x, first, rows, (first_scale, rows_scale)
        )
        y, active = sum_over_devices(y, active, split["ffn"])
        return y.astype(x.dtype), active

    neurons_axes = ("ffn", None)
    return shard_map(
        on_shards,
        [x, first, rows, *scales],
        [("batch", None), neurons_axes, neurons_axes, ("ffn",), neurons_axes if gated else ("ffn",)],
        (("batch", None), ("batch",)),
    )


# The implementations return sums in float32 and the number of active neurons.


def _gates(x: jax.Array, first: jax.Array, scale: jax.Array | None, threshold: float) -> jax.Array:
    # Fused with what follows, XLA for CPU computes the scores several times.
    return _above(jax.lax.optimization_barrier(product(x, first, scale)), threshold)


def _above(scores: jax.Array, threshold: float) -> jax.Array:
    gate = jax.nn.relu(scores)
    return gate if threshold == 0 else jnp.where(gate >= threshold, gate, 0)


def _count(gate: jax.Array) -> jax.Array:
    return jnp.sum(gate != 0, axis=-1, dtype=jnp.int32)


def _parts(scale: jax.Array | None, gated: bool) -> tuple[jax.Array | None, jax.Array | None]:
    """Factors of the gated map and of the output map."""
    if scale is None:
        return None, None
    return (scale[:, 0], scale[:, 1]) if gated else (None, scale)


def _gathered(gated: bool, threshold: float, x, first, rows, scales: Scales):
    return gathered(gated, x, _gates(x, first, scales[0], threshold), rows, scales[1])


def gathered(
    gated: bool, x: jax.Array, gate: jax.Array, rows: jax.Array, scale: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The sum over neurons with a gate [M, F] that is not 0 in some token, by a loop that gathers their rows.

    float32 [M, D], and how many neurons of each token have such a gate, int32 [M].
    """
    d = x.shape[1]
    up_scale, down_scale = _parts(scale, gated)

    def add(total, places, valid, rows):
        # Take the rows once, ahead of both products: fused, each would take and convert them for itself.
        taken = jax.lax.optimization_barrier(jnp.take(rows, places, axis=0))
        hidden = jnp.where(valid, gate[:, places], 0)
        if gated:
            hidden = hidden * product(x, taken[:, :d], None if up_scale is None else up_scale[places])
        return total + combination(hidden, taken[:, -d:], None if down_scale is None else down_scale[places])

    y = sum_over_active(jnp.any(gate != 0, axis=0), GROUP, jnp.zeros(x.shape, jnp.float32), add, rows)
    return y, _count(gate)


def _natively(threshold: float, x, first, rows, scales: Scales):
    # Above the largest number below the threshold is what is at least the threshold.
    bound = float(np.nextafter(np.float32(threshold), np.float32(-1))) if threshold > 0 else 0.0
    results = result_shapes((x.shape, x.dtype), ((len(x),), jnp.int32))
    y, active = native.call("relu_ffn", results, x, first, rows, *map(or_empty, scales), bound=bound)
    return y.astype(jnp.float32), active


def _gpu_refusal(x: jax.Array, gated: bool) -> str | None:
    return rows_gpu.refusal(x) if gated else "takes layers with a gate only"


def _on_gpu(threshold: float, x, first, rows, scales: Scales, *, interpret):
    gate = _gates(x, first, scales[0], threshold)
    return rows_gpu.sum_over_active(x, gate, rows, scales[1], interpret), _count(gate)


def _on_tpu(gated: bool, threshold: float, x, first, rows, scales: Scales, *, interpret):
    gate = _gates(x, first, scales[0], threshold)
    weights = gate
    for scale in _parts(scales[1], gated):
        weights = weights if scale is None else weights * scale
    y, _ = weighted_rows.weighted_rows(
        x[None, :, : x.shape[1] if gated else 0].astype(jnp.float32),
        weights[None],
        [rows[None]],
        lambda values: values,
        name="relu_ffn_rows_kernel",
        interpret=interpret,
    )
    return y[0], _count(gate)


def _tpu_refusal(gated: bool, x, rows, interpret: bool) -> str | None:
    part = x.shape[1] if gated else 0
    return native_refusal(x=x) or weighted_rows.refusal(len(x), part, rows, interpret=interpret)


def reference(
    x: jax.Array, first: jax.Array, rows: jax.Array, *, scales: Scales = (None, None), threshold: float = 0.0
) -> Any:
    """The definition: every neuron, with weights in float32."""
    d, wide = x.shape[1], x.astype(jnp.float32)
    hidden = _above(wide @ dequantised(first, scales[0]).T, threshold)
    count, (up_scale, down_scale) = _count(hidden), _parts(scales[1], rows.shape[1] > d)
    if rows.shape[1] > d:
        hidden = hidden * (wide @ dequantised(rows[:, :d], up_scale).T)
    return (hidden @ dequantised(rows[:, -d:], down_scale)).astype(x.dtype), count
