"""Linear maps from and to the active blocks of a width in plain JAX, by their definition: all blocks, then a mask."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.matmul import matmul


class Blocks(NamedTuple):
    """How a width is cut: `count` blocks of equal size, of which the first `shared` are active for every token."""

    count: int
    shared: int


def active_blocks(routed: jax.Array, blocks: Blocks) -> jax.Array:
    """Booleans [..., count] from the routed blocks [..., K] of each token: those and the shared ones."""
    every = jnp.arange(blocks.count)
    return (every < blocks.shared) | jnp.any(routed[..., None] == every, axis=-2)


def only_active(x: jax.Array, routed: jax.Array, blocks: Blocks) -> jax.Array:
    """`x` [..., D], zero outside the active blocks of each token."""
    active = active_blocks(routed, blocks)
    split = x.reshape(*x.shape[:-1], blocks.count, -1)
    return jnp.where(active[..., None], split, 0).reshape(x.shape)


def from_blocks(x: jax.Array, routed: jax.Array, w_DO: jax.Array, blocks: Blocks, dtype: jnp.dtype | None) -> jax.Array:
    """`x W` over the active blocks of x; see the package."""
    return matmul(only_active(x, routed, blocks), w_DO, dtype)


def to_blocks(x: jax.Array, routed: jax.Array, w_OD: jax.Array, blocks: Blocks, dtype: jnp.dtype | None) -> jax.Array:
    """`x W`, zero outside the active blocks of the result; see the package."""
    return only_active(matmul(x, w_OD, dtype), routed, blocks)
