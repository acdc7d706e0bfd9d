"""The libraries' grouped matrix products under one name: `jax.lax.ragged_dot`, and jax's megablox where that is dense.

XLA for TPUs computes `ragged_dot` and its input's gradient group by group, but the weights' gradient as a product of
all rows for every group, E times the work; megablox' `tgmm` does it group by group. (Figures in docs/kernels.md.)
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.dispatch import CustomVJP, Implementation, dispatch, plain


def ragged_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Rows of `x` times the matrix of their group; differentiable in x and w.

    Args:
      x: [A, I], sorted by group.
      w: [E, I, O], of the dtype of x.
      sizes: int32 [E], how many rows each group has; they add up to A.
      dtype: of the result; None: that of x.

    Returns:
      [A, O].
    """

    def refusal() -> str | None:
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"takes bfloat16 or float32, not {x.dtype}"
        return None if x.size else "needs at least one row"

    forward = partial(_forward, dtype=dtype)
    implementations = [
        plain(CustomVJP(forward, partial(_backward, dense_weight_gradient))),
        Implementation(
            "megablox", CustomVJP(forward, partial(_backward, megablox_weight_gradient)), "tpu", refusal, kernel=True
        ),
    ]
    return dispatch("ragged_matmul", None, implementations)(x, w, sizes)


def _forward(x, w, sizes, *, dtype):
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=dtype), ()


def _backward(weight_gradient, arrays, residuals, g):
    del residuals
    x, w, sizes = arrays
    g = g.astype(x.dtype)
    dx = jax.lax.ragged_dot(g, jnp.swapaxes(w, 1, 2), sizes, preferred_element_type=x.dtype)
    return dx, weight_gradient(x, g, sizes), None


def dense_weight_gradient(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x_e^T g_e` of the rows of each group by `ragged_dot`, which may multiply all rows for each group."""
    rows = (((0,), (0,)), ((), ()))
    numbers = jax.lax.RaggedDotDimensionNumbers(rows, lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    return jax.lax.ragged_dot_general(x, g, sizes, numbers, preferred_element_type=x.dtype)


def megablox_weight_gradient(x: jax.Array, g: jax.Array, sizes: jax.Array, interpret: bool = False) -> jax.Array:
    """The same by megablox, for x [A, I] and g [A, O]; a kernel for TPUs."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # importing it takes a second

    side = 1024 if x.dtype == jnp.bfloat16 else 512  # sums and blocks then fit into the 16 MiB of v5e and v5p
    # Rows are read in whole tiles; those past the last group are not read.
    height = min(512, -(-x.shape[0] // 128) * 128)
    x, g = (jnp.pad(a, ((0, -a.shape[0] % height), (0, 0))) for a in (x, g))
    tiling = (height, min(side, x.shape[1]), min(side, g.shape[1]))
    return tgmm(x.T, g, sizes.astype(jnp.int32), x.dtype, tiling, interpret=interpret)
