"""The matrix product of many tokens with weights laid out for decoding: prompts, and batches of sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.rows import check_shapes, check_weights, native_refusal, or_empty, result_shapes

__all__ = ["gemm"]


def gemm(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array | None = None,
    *,
    transposed: bool = True,
    columns: tuple[int, int] | None = None,
    dtype: jnp.dtype | type | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`x W^T`, or `x W`, summed up in float32; no gradient by the native form.

    The native form multiplies in float32, whatever the weights are stored in. Where the processor has products of
    bfloat16 (AVX512-BF16), tokens in bfloat16 meet weights in bfloat16 or int8 in these, which are exact as well, but
    take denormal numbers as 0; int8 weights [K, N] are rounded to bfloat16 with their factors then. It never holds more
    than a few hundred kilobytes of converted weights.

    Args:
      x: [M, K], float32 or bfloat16.
      w: [N, K] if `transposed`, else [K, N], in float32, bfloat16 or int8.
      scale: float32, factors of the rows of int8 weights, [N] or [K]; of rows that hold two matrices [N, 2] or [K, 2].
      transposed: whether a row of w makes an output, or is multiplied by an input.
      columns: where two matrices lie side by side in the rows of w, the first column of one and its width; None: all.
      dtype: of the result, float32 or bfloat16; None: that of x.
      implementation: "xla", "native", or None: "native" on a CPU, but for tokens and weights in bfloat16 where XLA has
        units for matrix products (AMX).

    Returns:
      [M, N].

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.
    """
    first, width = (0, w.shape[1]) if columns is None else columns
    inside = first >= 0 and width > 0 and first + width <= w.shape[1]
    require(inside, "gemm.columns", columns, f"must be within the {w.shape[1]} of w")
    parts = 1 if columns is None else 2
    inputs, outputs = (width, w.shape[0]) if transposed else (w.shape[0], width)
    check_shapes("gemm", {"x": (x.shape, (x.shape[0], inputs))})
    check_weights("gemm", "w", w, scale, (w.shape[0],) if parts == 1 else (w.shape[0], 2))
    out = jnp.dtype(x.dtype if dtype is None else dtype)

    def xla(x, w, scale):
        part = w[:, first : first + width]
        if scale is not None:
            factor = scale if parts == 1 else scale[:, 1 if first else 0]
            part = part.astype(jnp.float32) * factor[:, None]
        part = part.astype(x.dtype)
        return jnp.matmul(x, part.T if transposed else part, preferred_element_type=out)

    def cpp(x, w, scale):
        form = {"transposed": transposed, "offset": first, "parts": parts}
        return native.call("gemm", result_shapes(((x.shape[0], outputs), out)), x, w, or_empty(scale), **form)[0]

    units = x.dtype == w.dtype == jnp.bfloat16 and native.matrix_units()
    implementations = [plain(xla), native_cpu(cpp, native_refusal(x=x), default=not units)]
    return dispatch("gemm", implementation, implementations)(x, w, scale)
