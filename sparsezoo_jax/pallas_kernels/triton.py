"""Helpers of kernels for GPUs that read some rows of a matrix and don't read the others.

They load and store by arrays of indices with a mask for those out of bounds: newer versions of jax refuse slices that
pass the end of an array.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, plgpu


def load(ref: Any, rows: jax.Array, columns: jax.Array, mask: jax.Array) -> jax.Array:
    """The entries [R, C] at rows [R] and columns [C]; where the mask [R, C] is false, 0 without reading."""
    return plgpu.load(ref.at[rows[:, None], columns[None]], mask=mask, other=0)


def store(ref: Any, rows: jax.Array, columns: jax.Array, mask: jax.Array, values: jax.Array) -> None:
    """Write values [R, C] to rows [R] and columns [C] where the mask [R, C] is true."""
    plgpu.store(ref.at[rows[:, None], columns[None]], values.astype(ref.dtype), mask=mask)


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """The matrix product over the given axes of both, in at least float32."""
    # By default Triton rounds float32 operands of a product to TF32, which has 10 bits of mantissa.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    sums = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=sums)


def times_weights(a: jax.Array, weights: jax.Array, *, transposed: bool = False) -> jax.Array:
    """`a W` or `a W^T` for W as it is stored: in bfloat16, to which a is rounded, or converted to float32."""
    weights = weights if weights.dtype == jnp.bfloat16 else weights.astype(jnp.float32)
    return product(a.astype(weights.dtype), weights, (1, 1 if transposed else 0))


def height(rows: int) -> int:
    """`rows`, rounded up to a height that matrix products take: a power of two from 16 on."""
    return max(16, pl.next_power_of_2(rows))


def in_use(values: jax.Array) -> jax.Array:
    """Which columns [C] of values [R, C] have an entry that is not 0 (NaN is not)."""
    return jnp.sum((values != 0).astype(jnp.int32), axis=0) > 0
