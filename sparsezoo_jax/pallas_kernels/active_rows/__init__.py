"""The second map of a feed-forward layer for a few tokens: only rows of hidden units that are not 0 are read.

Shapes: M tokens, F hidden units, D model width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
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
    result_shapes,
    sum_over_active,
)
from sparsezoo_jax.pallas_kernels.spark_ffn.rows import GROUP
from sparsezoo_jax.sharding import shard_map

__all__ = ["active_rows", "reference"]


def active_rows(
    hidden: jax.Array, w: jax.Array, scale: jax.Array | None = None, *, implementation: str | None = None
) -> jax.Array:
    """`hidden W`, summed up in float32, by the rows of units that are not 0 in some token; no gradient.

    On a mesh a device has its part of the tokens ("batch") and of the units ("ffn"); results of the devices that split
    the latter are summed.

    Args:
      hidden: [M, F], float32 or bfloat16, finite.
      w: [F, D], in float32, bfloat16 or int8.
      scale: float32 [F], factors of the rows of int8 weights; None for the others.
      implementation: "xla" (gathers active rows in a loop), "native", "pallas_tpu", "pallas_tpu_interpret" (see
        `dispatch`), or None: for up to 16 tokens "native" on a CPU and the kernel on a TPU, else "xla". The kernel
        reads tiles of 8 (float32), 16 (bfloat16) or 32 (int8) rows.

    Returns:
      [M, D] in the dtype of hidden.

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.
    """
    check_shapes("active_rows", {"w": (w.shape, (hidden.shape[-1], w.shape[-1]))})
    check_weights("active_rows", "w", w, scale, (w.shape[0],))

    def on_shards(hidden, w, scale, split):
        few = len(hidden) <= MOST_ROWS
        implementations = [
            plain(_gathered),
            native_cpu(_natively, native_refusal(hidden=hidden), default=few),
            *pallas("tpu", _on_tpu, partial(_tpu_refusal, hidden, w), default=few),
        ]
        y = dispatch("active_rows", implementation, implementations)(hidden, w, scale)
        return (jax.lax.psum(y, split["ffn"]) if split["ffn"] else y).astype(hidden.dtype)

    return shard_map(
        on_shards, [hidden, w, scale], [("batch", "ffn"), ("ffn", None), ("ffn",)], ("batch", None)
    )  # fmt: skip


# The implementations return sums in float32.


def _gathered(hidden, w, scale):
    wide = hidden.astype(jnp.float32)

    def add(total, places, valid, w):
        taken = jax.lax.optimization_barrier(jnp.take(w, places, axis=0))
        units = jnp.where(valid, wide[:, places], 0)
        return total + combination(units, taken, None if scale is None else scale[places])

    total = jnp.zeros((hidden.shape[0], w.shape[1]), jnp.float32)
    return sum_over_active(jnp.any(hidden != 0, axis=0), GROUP, total, add, w)


def _natively(hidden, w, scale):
    results = result_shapes(((hidden.shape[0], w.shape[1]), jnp.float32))
    return native.call("active_rows", results, hidden, w, or_empty(scale))[0]


def _on_tpu(hidden, w, scale, *, interpret):
    weights = hidden.astype(jnp.float32)
    y, _ = weighted_rows.weighted_rows(
        jnp.zeros((1, len(hidden), 0), jnp.float32),
        (weights if scale is None else weights * scale)[None],
        [w[None]],
        lambda values: values,
        name="active_rows_kernel",
        interpret=interpret,
    )
    return y[0]


def _tpu_refusal(hidden, w, interpret: bool) -> str | None:
    return native_refusal(hidden=hidden) or weighted_rows.refusal(len(hidden), 0, w, interpret=interpret)


def reference(hidden: jax.Array, w: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """The definition: all rows, in float32."""
    return (hidden.astype(jnp.float32) @ dequantised(w, scale)).astype(hidden.dtype)
