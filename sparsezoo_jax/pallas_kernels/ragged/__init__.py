"""Grouped matrix products: `jax.lax.ragged_dot`, and kernels where XLA multiplies all rows for every group.

XLA for TPUs computes `ragged_dot` and its input's gradient group by group, but the weights' gradient as a product of
all rows for every group, E times the work; jax's megablox (`tgmm`) does it group by group. For GPUs and CPUs it makes
such products in all three directions; `gpu` has kernels for the former, the native library products for the latter.
(Figures in docs/kernels.md.)
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.dispatch import CustomVJP, Implementation, dispatch, native_cpu, pallas, plain
from sparsezoo_jax.pallas_kernels.ragged import gpu
from sparsezoo_jax.pallas_kernels.ragged.chosen import products_by_expert


def ragged_matmul(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    dtype: jnp.dtype | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Rows of `x` times the matrix of their group; differentiable in x and w.

    Args:
      x: [A, I], sorted by group.
      w: [E, I, O], of the dtype of x.
      sizes: int32 [E], how many rows each group has. Rows past their sum belong to none: the result there is 0.
      dtype: of the result; None: that of x.
      implementation: "xla", "megablox" (TPU: for the weights' gradient), "pallas_gpu", "pallas_gpu_interpret", "native"
        (float32 only); None: the platform's kernels for what they take.

    Returns:
      [A, O].

    Raises:
      ConfigError: no such implementation, or it can't take the arguments.
    """

    def refusal(interpret: bool = False) -> str | None:
        del interpret
        if x.dtype not in (jnp.bfloat16, jnp.float32) or w.dtype != x.dtype:
            return f"takes bfloat16 or float32 throughout, not {x.dtype} and {w.dtype}"
        return None if x.size and w.size else "needs at least one row, one group and one column"

    forward = partial(_forward, dtype=dtype)
    kernels = CustomVJP(partial(_gpu_forward, dtype=dtype or x.dtype), _gpu_backward)
    implementations = [
        plain(CustomVJP(forward, partial(_backward, dense_weight_gradient))),
        Implementation(
            "megablox", CustomVJP(forward, partial(_backward, megablox_weight_gradient)), "tpu", refusal, kernel=True
        ),
        *pallas("cuda", kernels, refusal),
        native_cpu(_native, native_refusal(x, w, dtype)),
    ]
    return dispatch("ragged_matmul", implementation, implementations)(x, w, sizes)


def native_refusal(x: jax.Array, w: jax.Array, dtype: jnp.dtype | None) -> str | None:
    """Why the native library can't multiply these; None if it can."""
    if any(kind != jnp.float32 for kind in (x.dtype, w.dtype, dtype or x.dtype)):
        return f"takes float32 throughout, not {x.dtype} and {w.dtype} for {jnp.dtype(dtype or x.dtype)}"
    return None if x.size and w.size else "needs at least one row, one group and one column"


def _native(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    # Rows past those of the last group are of no group.
    group_A = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    return products_by_expert(x, group_A[:, None].astype(jnp.int32), w)


def _forward(x, w, sizes, *, dtype):
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=dtype), ()


def _backward(weight_gradient, arrays, residuals, g):
    del residuals
    x, w, sizes = arrays
    g = g.astype(x.dtype)
    dx = jax.lax.ragged_dot(g, jnp.swapaxes(w, 1, 2), sizes, preferred_element_type=x.dtype)
    return dx, weight_gradient(x, g, sizes), None


def _gpu_forward(x, w, sizes, *, dtype, interpret):
    return gpu.times_groups(x, w, sizes, dtype, interpret=interpret), ()


def _gpu_backward(arrays, residuals, g, *, interpret):
    del residuals
    x, w, sizes = arrays
    g = g.astype(x.dtype)
    dx = gpu.times_groups(g, w, sizes, x.dtype, transposed=True, interpret=interpret)
    return dx, gpu.weight_gradient(x, g, sizes, interpret=interpret), None


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
