"""A linear map of a few tokens: the projections and the logits of decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.rows import (
    MOST_ROWS,
    check_shapes,
    check_weights,
    dequantised,
    native_refusal,
    or_empty,
    product,
    result_shapes,
)

__all__ = ["linear"]


def linear(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array | None = None,
    *,
    dtype: jnp.dtype | type | None = None,
    precision: jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`x W^T`, summed up in float32; no gradient by the native form.

    Args:
      x: [M, K], float32 or bfloat16.
      w: [N, K] in float32, bfloat16 or int8; a row makes one output.
      scale: float32 [N], factors of the rows of int8 weights; None for the others.
      dtype: of the result, float32 or bfloat16; None: that of x.
      precision: of the plain form's product, of tokens and weights in float32; None: the product is in the dtype of w,
        and the platform's default. Natively nothing is rounded before it is multiplied.
      implementation: "xla", "native", or None: "native" on a CPU for up to 16 rows.

    Returns:
      [M, N].

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.
    """
    check_shapes("linear", {"x": (x.shape, (x.shape[0], w.shape[-1])), "w": (w.shape, (w.shape[0], w.shape[-1]))})
    check_weights("linear", "w", w, scale, (w.shape[0],))
    out = jnp.dtype(x.dtype if dtype is None else dtype)

    def xla(x, w, scale):
        if precision is not None:
            return jnp.matmul(x.astype(jnp.float32), dequantised(w, scale).T, precision=precision).astype(out)
        return product(x, w, scale).astype(out)

    def cpp(x, w, scale):
        return native.call("linear", result_shapes(((x.shape[0], w.shape[0]), out)), x, w, or_empty(scale))[0]

    implementations = [plain(xla), native_cpu(cpp, native_refusal(x=x), default=x.shape[0] <= MOST_ROWS)]
    return dispatch("linear", implementation, implementations)(x, w, scale)
