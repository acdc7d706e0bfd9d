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


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """`a b`, or `a b^T`, in float32, of weights `b` as they are stored: bfloat16, or made float32."""
    b = b if b.dtype == jnp.bfloat16 else b.astype(jnp.float32)
    # Triton would round float32 operands to 10 bits.
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a.astype(b.dtype), b, contract, precision=precision, preferred_element_type=jnp.float32)


def height(rows: int) -> int:
    """Rows of the smallest matrix product that holds as many."""
    return max(16, pl.next_power_of_2(rows))


def in_use(values: jax.Array) -> jax.Array:
    """Which columns [C] of [R, C] have anything but zeros, NaN included."""
    return jnp.sum((values != 0).astype(jnp.int32), axis=0) > 0
