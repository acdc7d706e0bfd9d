"""Rows of the token embedding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from sparsezoo_jax.sharding import constrain


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, rows: str = "vocab") -> jax.Array:
    """Rows [B, T, D] of a table [V, D] in `dtype`; their gradient is summed in the table's own precision.

    `rows` is the logical name of the table's first axis.

    The width of a table that is split over devices is gathered first, in `dtype`. Looking up pieces of rows would
    leave activations that are split by width, and the compiler knows no better way from there to activations split by
    batch than to collect them whole.
    """
    return constrain(table_VD.astype(dtype), (rows, None))[tokens_BT]


def _forward(table_VD, tokens_BT, dtype, rows):
    # An empty array carries the table's type; its height and width are those of the gradient.
    return lookup(table_VD, tokens_BT, dtype, rows), (tokens_BT, table_VD[:0], table_VD.shape[0])


def _backward(dtype, rows, residuals, g_BTD):
    tokens_BT, empty, height = residuals
    zeros = constrain(jnp.zeros((height, empty.shape[1]), empty.dtype), (rows, None))
    return zeros.at[tokens_BT].add(g_BTD.astype(empty.dtype)), None


lookup.defvjp(_forward, _backward)
