"""How sublayers read from and write to the residual stream: all of its width, or the part that a residual kind routes.

A sublayer that takes its maps through `CallContext.width` says so by `partial_width = True` in its configuration.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.matmul import from_stream, to_stream
from sparsezoo_jax.sharding import gather_axis


class Width(Protocol):
    """The maps between the stream's width and a sublayer."""

    def read(self, x_BTD: jax.Array, weight_DO: jax.Array) -> jax.Array:
        """`x W`, [B, T, O]."""
        ...

    def write(self, y: jax.Array, weight: jax.Array) -> jax.Array:
        """`y W`, [B, T, D], for y [B, T, ...] and a weight [..., D] with the same axes in its front (one or two)."""
        ...


class WholeWidth:
    """Every dimension takes part."""

    def read(self, x_BTD: jax.Array, weight_DO: jax.Array) -> jax.Array:
        return from_stream(x_BTD, weight_DO)

    def write(self, y: jax.Array, weight: jax.Array) -> jax.Array:
        if weight.ndim == 2:
            return to_stream(y, weight)
        weight = gather_axis(weight, -1) if y.shape[1] > 1 else weight
        return product(jnp.einsum("btnh,nhd->btd", y, weight))


WHOLE = WholeWidth()
