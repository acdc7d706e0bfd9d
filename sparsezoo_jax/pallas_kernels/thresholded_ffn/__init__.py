"""A gated feed-forward layer of a few tokens without the neurons of small gates: all gates are read, and other rows.

Shapes: M tokens, D model width, F neurons.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.activations import ACTIVATIONS
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.relu_ffn.rows import Scales, gathered
from sparsezoo_jax.pallas_kernels.rows import (
    MOST_ROWS,
    check_shapes,
    check_weights,
    dequantised,
    native_refusal,
    or_empty,
    product,
    result_shapes,
    sum_over_devices,
)
from sparsezoo_jax.sharding import shard_map

__all__ = ["reference", "thresholded_ffn_rows"]


def thresholded_ffn_rows(
    x: jax.Array,
    gate: jax.Array,
    rows: jax.Array,
    threshold: jax.Array,
    *,
    activation: str,
    scales: Scales = (None, None),
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`sum_f g_f (up_f . x) down_f` over neurons with |g_f| > threshold, g = act(gate x), in float32; no gradient.

    On a mesh a device has its part of the tokens ("batch") and of the neurons ("ffn"); results and counts of the
    devices that split these are summed.

    Args:
      x: [M, D], float32 or bfloat16.
      gate: [F, D] in float32, bfloat16 or int8, neuron by neuron.
      rows: [F, 2 D], of each neuron the row of the map that is gated and that of the output map.
      threshold: float32 scalar, at least 0.
      activation: gelu_tanh, gelu, silu, relu or relu2.
      scales: float32 factors of int8 weights: [F] of gate, and [F, 2] of the two parts of rows.
      implementation: "xla" (gathers active rows in a loop), "native", or None: "native" on a CPU for up to 16 tokens.

    Returns:
      [M, D] in the dtype of x, and the number of neurons of each token that are left, int32 [M].

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.

    Source: CATS (arXiv 2404.08763), section 3.
    """
    neurons, d = gate.shape[0], x.shape[-1]
    check_shapes(
        "thresholded_ffn_rows",
        {
            "gate": (gate.shape, (neurons, d)),
            "rows": (rows.shape, (neurons, 2 * d)),
            "threshold": (threshold.shape, ()),
        },
    )
    check_weights("thresholded_ffn_rows", "gate", gate, scales[0], (neurons,))
    check_weights("thresholded_ffn_rows", "rows", rows, scales[1], (neurons, 2))
    allowed = ", ".join(ACTIVATIONS)
    require(activation in ACTIVATIONS, "thresholded_ffn_rows.activation", activation, f"must be one of {allowed}")

    def on_shards(x, gate, rows, threshold, gate_scale, rows_scale, split):
        implementations = [
            plain(partial(_gathered, activation)),
            native_cpu(partial(_natively, activation), native_refusal(x=x), default=len(x) <= MOST_ROWS),
        ]
        y, active = dispatch("thresholded_ffn_rows", implementation, implementations)(
            x, gate, rows, threshold, gate_scale, rows_scale
        )
        y, active = sum_over_devices(y, active, split["ffn"])
        return y.astype(x.dtype), active

    return shard_map(
        on_shards,
        [x, gate, rows, threshold.astype(jnp.float32), *scales],
        [("batch", None), ("ffn", None), ("ffn", None), (), ("ffn",), ("ffn", None)],
        (("batch", None), ("batch",)),
    )


# The implementations return sums in float32 and the number of neurons that are left.


def _gathered(activation: str, x, gate, rows, threshold, gate_scale, rows_scale):
    # Fused with what follows, XLA for CPU computes the scores several times.
    scores = jax.lax.optimization_barrier(product(x, gate, gate_scale))
    return gathered(True, x, _above(ACTIVATIONS[activation](scores), threshold), rows, rows_scale)


def _natively(activation: str, x, gate, rows, threshold, gate_scale, rows_scale):
    results = result_shapes((x.shape, x.dtype), ((len(x),), jnp.int32))
    factors = (or_empty(gate_scale), or_empty(rows_scale))
    code = native.ACTIVATIONS[activation]
    y, active = native.call("thresholded_ffn", results, x, gate, rows, *factors, threshold, activation=code)
    return y.astype(jnp.float32), active


def _above(gate: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(gate) > threshold, gate, 0)


def reference(
    x: jax.Array,
    gate: jax.Array,
    rows: jax.Array,
    threshold: jax.Array,
    *,
    activation: str,
    scales: Scales = (None, None),
) -> tuple[jax.Array, jax.Array]:
    """The definition: every neuron, with weights in float32."""
    d, wide = x.shape[1], x.astype(jnp.float32)
    up_scale, down_scale = (None, None) if scales[1] is None else (scales[1][:, 0], scales[1][:, 1])
    kept = _above(ACTIVATIONS[activation](wide @ dequantised(gate, scales[0]).T), threshold)
    hidden = kept * (wide @ dequantised(rows[:, :d], up_scale).T)
    return (hidden @ dequantised(rows[:, d:], down_scale)).astype(x.dtype), jnp.sum(kept != 0, axis=-1, dtype=jnp.int32)
