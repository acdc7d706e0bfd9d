"""The last maps of a feed-forward layer for many tokens: a neuron's rows meet only the tokens that it is active for.

Shapes: M tokens, F neurons, D model width, U width of the input of the gated map.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.gemm import gemm
from sparsezoo_jax.pallas_kernels.rows import check_shapes, check_weights, dequantised, native_refusal, or_empty
from sparsezoo_jax.pallas_kernels.rows import result_shapes as results

__all__ = ["reference", "token_rows"]


def token_rows(
    x: jax.Array | None,
    gates: jax.Array,
    rows: jax.Array,
    scale: jax.Array | None = None,
    *,
    density: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`(gates * (x U^T)) V`, or `gates V` without x, summed up in float32; no gradient by the native form.

    Args:
      x: [M, U], float32 or bfloat16, the input of the map that the gates are multiplied with; None: there is none.
      gates: [M, F], float32 or bfloat16, finite: 0 where a neuron is not active for a token.
      rows: of each neuron the row of U and, after it, that of V: [F, U + D], or [F, D] without x; in float32, bfloat16
        or int8.
      scale: float32 factors of int8 weights, [F, 2] of the two parts, or [F].
      density: the share of gates that is expected not to be 0; None: it is counted in each call.
      implementation: "xla" (`gemm`, all rows for all tokens), "native", or None: "native" on a CPU. Up to a density of
        `most_density` this reads rows token by token, above it does what "xla" does.

    Returns:
      [M, D] in the dtype of gates.

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.
    """
    tokens, neurons = gates.shape
    width = 0 if x is None else x.shape[1]
    fits = rows.shape[0] == neurons and rows.shape[1] > width
    require(fits, "token_rows.rows", rows.shape, f"must be [F, U + D] for {neurons} neurons, U = {width}")
    check_weights("token_rows", "rows", rows, scale, (neurons,) if x is None else (neurons, 2))
    given = {"gates": gates} if x is None else {"gates": gates, "x": x}
    if x is not None:
        check_shapes("token_rows", {"x": (x.shape, (tokens, width))})
    out = (tokens, rows.shape[1] - width)

    def whole(x, gates, rows, scale):
        if x is None:
            return gemm(gates, rows, scale, transposed=False)
        hidden = gates * gemm(x, rows, scale, columns=(0, width), dtype=gates.dtype)
        return gemm(hidden, rows, scale, transposed=False, columns=(width, out[1]))

    def by_token(x, gates, rows, scale):
        given = jnp.zeros((0, 0), gates.dtype) if x is None else x
        return native.call("token_rows", results((out, gates.dtype)), given, gates, rows, or_empty(scale))[0]

    def by_density(x, gates, rows, scale):
        if density is not None:
            return (by_token if density <= limit else whole)(x, gates, rows, scale)
        active = jnp.sum(gates != 0, dtype=jnp.float32)
        return jax.lax.cond(active <= limit * gates.size, by_token, whole, x, gates, rows, scale)

    limit = most_density(gates.dtype)
    implementations = [plain(whole), native_cpu(by_density, native_refusal(**given))]
    return dispatch("token_rows", implementation, implementations)(x, gates, rows, scale)


#: Shares of active neurons up to which reading rows token by token is the faster form. With AVX2 both take the same
#: time at 0.3 (`benchmarks.prefill`); the second is for processors with products of bfloat16, which do not help here
#: and take half of the time for all rows: there both take the same at 0.2.
MOST_DENSITY, MOST_DENSITY_BF16 = 0.2, 0.15


def most_density(dtype: jnp.dtype | type) -> float:
    """The share of active neurons up to which "native" reads rows token by token, for tokens of this dtype."""
    pairs = native.available() and native.level() == "v4_bf16" and dtype == jnp.bfloat16
    return MOST_DENSITY_BF16 if pairs else MOST_DENSITY


def reference(x: jax.Array | None, gates: jax.Array, rows: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """The definition, with everything in float32."""
    hidden, width = gates.astype(jnp.float32), 0 if x is None else x.shape[1]
    first, last = (None, scale) if x is None or scale is None else (scale[:, 0], scale[:, 1])
    if x is not None:
        hidden = hidden * (x.astype(jnp.float32) @ dequantised(rows[:, :width], first).T)
    return (hidden @ dequantised(rows[:, width:], last)).astype(gates.dtype)
