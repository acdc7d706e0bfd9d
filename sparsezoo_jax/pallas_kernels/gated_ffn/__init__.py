"""A gated feed-forward layer of a few tokens, all of its neurons: what sparse layers are compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.activations import ACTIVATIONS
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
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
)

__all__ = ["gated_ffn_rows", "reference"]

Scales = tuple[jax.Array | None, jax.Array | None, jax.Array | None]


def gated_ffn_rows(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: str = "gelu_tanh",
    scales: Scales = (None, None, None),
    implementation: str | None = None,
) -> jax.Array:
    """`sum_f act(gate_f . x) (up_f . x) down_f` in float32; no gradient by the native form.

    Args:
      x: [M, D], float32 or bfloat16.
      gate, up, down: [F, D] in float32, bfloat16 or int8: a row of each for every neuron.
      activation: gelu_tanh, gelu, silu, relu or relu2.
      scales: float32 [F] of gate, up and down where these are int8.
      implementation: "xla", "native", or None: "native" on a CPU for up to 16 rows.

    Returns:
      [M, D] in the dtype of x.

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.
    """
    shape = (gate.shape[0], x.shape[-1])
    check_shapes("gated_ffn_rows", {"gate": (gate.shape, shape), "up": (up.shape, shape), "down": (down.shape, shape)})
    for name, w, scale in zip(("gate", "up", "down"), (gate, up, down), scales, strict=True):
        check_weights("gated_ffn_rows", name, w, scale, shape[:1])
    allowed = ", ".join(ACTIVATIONS)
    require(activation in ACTIVATIONS, "gated_ffn_rows.activation", activation, f"must be one of {allowed}")
    act = ACTIVATIONS[activation]

    def xla(x, gate, up, down, scales):
        hidden = act(product(x, gate, scales[0])) * product(x, up, scales[1])
        return combination(hidden, down, scales[2]).astype(x.dtype)

    def cpp(x, gate, up, down, scales):
        factors = [or_empty(scale) for scale in scales]
        code = native.ACTIVATIONS[activation]
        return native.call(
            "gated_ffn", result_shapes((x.shape, x.dtype)), x, gate, up, down, *factors, activation=code
        )[0]

    implementations = [plain(xla), native_cpu(cpp, native_refusal(x=x), default=x.shape[0] <= MOST_ROWS)]
    return dispatch("gated_ffn_rows", implementation, implementations)(x, gate, up, down, scales)


def reference(x, gate, up, down, *, activation: str = "gelu_tanh", scales: Scales = (None, None, None)) -> jax.Array:
    """The definition, with all weights in float32."""
    gate, up, down = (dequantised(w, scale) for w, scale in zip((gate, up, down), scales, strict=True))
    x_float32 = x.astype(jnp.float32)
    return ((ACTIVATIONS[activation](x_float32 @ gate.T) * (x_float32 @ up.T)) @ down).astype(x.dtype)
