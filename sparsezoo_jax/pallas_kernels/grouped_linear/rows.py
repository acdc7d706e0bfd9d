"""Linear maps of a few tokens from and to active blocks of a width: blocks that no token uses are not read.

Shapes: M tokens, D the width that is cut into blocks, I inputs and O outputs of the other side, K routed blocks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.grouped_linear.reference import Blocks, active_blocks
from sparsezoo_jax.pallas_kernels.rows import (
    MOST_ROWS,
    check_shapes,
    check_weights,
    combination,
    native_refusal,
    or_empty,
    product,
    result_shapes,
    sum_over_active,
)


def from_blocks_rows(
    x: jax.Array,
    routed: jax.Array,
    w: jax.Array,
    blocks: Blocks,
    scale: jax.Array | None = None,
    *,
    dtype: jnp.dtype | type | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`sum_b x_b W_b` over the active blocks b of each token, in float32; no gradient.

    Args:
      x: [M, D], float32 or bfloat16; what it holds outside a token's blocks does not matter.
      routed: int [M, K], as in `from_blocks`.
      w: [D, O] in float32, bfloat16 or int8.
      blocks: how D is cut.
      scale: float32 [D], factors of the rows of int8 weights.
      dtype: of the result, float32 or bfloat16; None: that of x.
      implementation: "xla" (a loop over active blocks), "native", or None: "native" on a CPU for up to 16 rows.

    Returns:
      [M, O].

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.

    Source: the input side of MoHD (arXiv 2412.05644).
    """
    _check("from_blocks_rows", x, routed, w, blocks, scale, axis=0)
    out = jnp.dtype(x.dtype if dtype is None else dtype)
    size = w.shape[0] // blocks.count

    def xla(x, routed, w, scale):
        active = active_blocks(routed, blocks)

        def add(total, places, valid, w):
            first = places[0] * size
            mine = active[:, places[0], None]
            part = jnp.where(mine, jax.lax.dynamic_slice_in_dim(x, first, size, axis=1), 0).astype(jnp.float32)
            return total + combination(part, *_slab(w, scale, first, size))

        zeros = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
        return sum_over_active(jnp.any(active, axis=0), 1, zeros, add, w).astype(out)

    def cpp(x, routed, w, scale):
        return _native("from_blocks", result_shapes(((x.shape[0], w.shape[1]), out)), x, routed, w, scale, blocks)

    implementations = [plain(xla), native_cpu(cpp, native_refusal(x=x), default=x.shape[0] <= MOST_ROWS)]
    return dispatch("from_blocks_rows", implementation, implementations)(x, routed, w, scale)


def to_blocks_rows(
    x: jax.Array,
    routed: jax.Array,
    w: jax.Array,
    blocks: Blocks,
    scale: jax.Array | None = None,
    *,
    dtype: jnp.dtype | type | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`x W^T` on the active blocks of each token's result, zeros elsewhere; in float32, no gradient.

    Args:
      x: [M, I], float32 or bfloat16.
      w: [D, I], a row for each output, so that a block lies in one piece. The others as in `from_blocks_rows`.

    Returns:
      [M, D].

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.

    Source: the output side of MoHD (arXiv 2412.05644).
    """
    _check("to_blocks_rows", x, routed, w, blocks, scale, axis=1)
    out = jnp.dtype(x.dtype if dtype is None else dtype)
    size = w.shape[0] // blocks.count

    def xla(x, routed, w, scale):
        active = active_blocks(routed, blocks)

        def add(total, places, valid, w):
            first = places[0] * size
            part = jnp.where(active[:, places[0], None], product(x, *_slab(w, scale, first, size)), 0)
            return jax.lax.dynamic_update_slice_in_dim(total, part, first, axis=1)

        zeros = jnp.zeros((x.shape[0], w.shape[0]), jnp.float32)
        return sum_over_active(jnp.any(active, axis=0), 1, zeros, add, w).astype(out)

    def cpp(x, routed, w, scale):
        return _native("to_blocks", result_shapes(((x.shape[0], w.shape[0]), out)), x, routed, w, scale, blocks)

    implementations = [plain(xla), native_cpu(cpp, native_refusal(x=x), default=x.shape[0] <= MOST_ROWS)]
    return dispatch("to_blocks_rows", implementation, implementations)(x, routed, w, scale)


def _slab(w: jax.Array, scale: jax.Array | None, first: jax.Array, size: int) -> tuple[jax.Array, jax.Array | None]:
    factors = None if scale is None else jax.lax.dynamic_slice_in_dim(scale, first, size)
    return jax.lax.dynamic_slice_in_dim(w, first, size), factors


def _native(operation, results, x, routed, w, scale, blocks: Blocks) -> jax.Array:
    arrays = (x, routed.astype(jnp.int32), w, or_empty(scale))
    return native.call(operation, results, *arrays, count=blocks.count, shared=blocks.shared)[0]


def _check(name: str, x: jax.Array, routed: jax.Array, w: jax.Array, blocks: Blocks, scale: Any, *, axis: int) -> None:
    """Raise `ConfigError` unless the arguments fit each other; `axis` is that of the inputs in w."""
    require(w.shape[axis] == x.shape[1], f"{name}.w", w.shape, f"must have {x.shape[1]} inputs, for x")
    require(w.shape[0] % blocks.count == 0, f"{name}.blocks", blocks.count, f"must divide the width of {w.shape[0]}")
    shared = f"must be from 0 to {blocks.count} blocks"
    require(0 <= blocks.shared <= blocks.count, f"{name}.shared", blocks.shared, shared)
    check_shapes(name, {"routed": (routed.shape[:-1], x.shape[:-1])})
    check_weights(name, "w", w, scale, w.shape[:1])
