"""What kernels for GPUs share that read some rows of a matrix and leave the others where they are.

Places outside of an array are given one by one and masked: newer versions of jax refuse slices that pass its end.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def load(ref: Any, rows: jax.Array, columns: jax.Array, mask: jax.Array) -> jax.Array:
    """[R, C] of the places rows [R] and columns [C]; 0, and nothing read, where the mask [R, C] is false."""
    return plgpu.load(ref.at[rows[:, None], columns[None]], mask=mask, other=0)


def store(ref: Any, rows: jax.Array, columns: jax.Array, mask: jax.Array, values: jax.Array) -> None:
    """Write [R, C] where the mask is true."""
    plgpu.store(ref.at[rows[:, None], columns[None]], values.astype(ref.dtype), mask=mask)


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """The matrix product over the given axes of both, in at least float32."""
    # Triton would round float32 operands to 10 bits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    sums = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=sums)


def times_weights(a: jax.Array, weights: jax.Array, *, transposed: bool = False) -> jax.Array:
    """`a W` or `a W^T` for weights as they are stored: bfloat16, to which a is rounded, or made float32."""
    weights = weights if weights.dtype == jnp.bfloat16 else weights.astype(jnp.float32)
    return product(a.astype(weights.dtype), weights, (1, 1 if transposed else 0))


def height(rows: int) -> int:
    """Rows of the smallest matrix product that holds as many."""
    return max(16, pl.next_power_of_2(rows))


def in_use(values: jax.Array) -> jax.Array:
    """Which columns [C] of [R, C] have anything but zeros, NaN included."""
    return jnp.sum((values != 0).astype(jnp.int32), axis=0) > 0
