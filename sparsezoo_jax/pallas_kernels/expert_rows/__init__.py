"""Maps of a few tokens' experts by the rows that masks leave: of inputs that are not 0, or of outputs that are needed.

Shapes: M inputs, P results, of which P / M consecutive ones share an input and each is of one expert, E experts, I
channels of an input, O of an output.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.rows import (
    check_shapes,
    check_weights,
    dequantised,
    native_refusal,
    or_empty,
    result_shapes,
)

__all__ = ["expert_products", "expert_rows"]


def expert_rows(
    x: jax.Array,
    experts: jax.Array,
    w: jax.Array,
    scale: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """`x_j W_e` with e = experts[p], j = p M / P, in float32, by the rows of channels that are not 0; no gradient.

    An expert's row is read once, whatever the number of inputs that need it. A mesh splits nothing.

    Args:
      x: [M, I], float32 or bfloat16, finite.
      experts: int32 [P]; a number that is not in [0, E), -1 for example, is no expert, and its output is 0.
      w: [E, I, O] in float32, bfloat16 or int8.
      scale: float32 [E, I], factors of the rows of int8 weights; None for the others.
      implementation: "xla" (products with whole experts), "native" (see `dispatch`), or None: "native" on a CPU.

    Returns:
      [P, O] in the dtype of x.

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.
    """
    count, outputs = w.shape[0], w.shape[-1]
    _check("expert_rows", x, experts, {"w": (w.shape, (count, x.shape[-1], outputs))})
    check_weights("expert_rows", "w", w, scale, w.shape[:2])

    def natively(x, experts, w, scale):
        results = result_shapes(((len(experts), outputs), x.dtype))
        return native.call("expert_rows", results, x, experts, w, or_empty(scale))[0]

    implementations = [plain(_combinations), native_cpu(natively, native_refusal(x=x))]
    return dispatch("expert_rows", implementation, implementations)(x, experts, w, scale)


def expert_products(
    x: jax.Array,
    experts: jax.Array,
    needed: jax.Array,
    w: jax.Array,
    scale: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """`W_e x_j` with e = experts[p], j = p M / P, in float32, where `needed` is not 0; 0 elsewhere, and no gradient.

    Rows of outputs that no input of an expert needs are not read, and others once. A mesh splits nothing.

    Args:
      x: [M, I], float32 or bfloat16, finite.
      experts: int32 [P]; a number that is not in [0, E), -1 for example, is no expert, and its output is 0.
      needed: [P, O], float32 or bfloat16.
      w: [E, O, I] in float32, bfloat16 or int8.
      scale: float32 [E, O], factors of the rows of int8 weights; None for the others.
      implementation: as in `expert_rows`.

    Returns:
      [P, O] in the dtype of x.

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.
    """
    count, outputs, _ = w.shape
    shapes = {"w": (w.shape, (count, outputs, x.shape[-1])), "needed": (needed.shape, (len(experts), outputs))}
    _check("expert_products", x, experts, shapes)
    check_weights("expert_products", "w", w, scale, w.shape[:2])

    def natively(x, experts, needed, w, scale):
        results = result_shapes((needed.shape, x.dtype))
        return native.call("expert_products", results, x, experts, needed, w, or_empty(scale))[0]

    implementations = [plain(_products), native_cpu(natively, native_refusal(x=x, needed=needed))]
    return dispatch("expert_products", implementation, implementations)(x, experts, needed, w, scale)


def _check(
    operation: str, x: jax.Array, experts: jax.Array, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    results, field = len(experts), f"{operation}.experts"
    fits = experts.ndim == 1 and x.ndim == 2 and len(x) > 0 and results > 0 and results % len(x) == 0
    require(fits, field, experts.shape, f"must be some for each of the inputs {x.shape}")
    require(experts.dtype == jnp.int32, field, experts.dtype, "must be int32")
    check_shapes(operation, shapes)


def _of_results(x: jax.Array, experts: jax.Array, w: jax.Array, scale: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The input and the matrix of each result, in float32; a matrix of zeros where it has no expert."""
    taken = (experts >= 0) & (experts < len(w))
    w_float32 = dequantised(w, scale)[jnp.where(taken, experts, 0)]
    inputs = jnp.repeat(x.astype(jnp.float32), len(experts) // len(x), axis=0)
    return inputs, jnp.where(taken[:, None, None], w_float32, 0)


def _combinations(x, experts, w, scale):
    return jnp.einsum("pi,pio->po", *_of_results(x, experts, w, scale)).astype(x.dtype)


def _products(x, experts, needed, w, scale):
    y = jnp.einsum("pi,poi->po", *_of_results(x, experts, w, scale))
    return jnp.where(needed != 0, y, 0).astype(x.dtype)
