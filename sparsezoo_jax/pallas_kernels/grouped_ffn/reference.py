"""Expert feed-forward in plain JAX, by its definition: every expert sees every token.

Shapes: leading axes (batch, length), D model width, E experts, W width of one expert.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.sharding import constrain

Activation = Callable[[jax.Array], jax.Array]


def pre_activations(x: jax.Array, up_EDW: jax.Array) -> jax.Array:
    """`up_e x` of all experts, [..., E, W] for x [..., D]."""
    names = (*("batch", "length")[: x.ndim - 1], *(None,) * (x.ndim - 3), "experts", "ffn")
    return constrain(product(jnp.einsum("...d,edw->...ew", x, up_EDW)), names)


def hidden_units(x: jax.Array, up_EDW: jax.Array, gate_EDW: jax.Array | None, activation: Activation) -> jax.Array:
    """`act(up_e x)` of all experts, or `act(gate_e x) * (up_e x)`: [..., E, W] for x [..., D]."""
    hidden = pre_activations(x, up_EDW)
    return activation(hidden) if gate_EDW is None else activation(pre_activations(x, gate_EDW)) * hidden


def weighted_ffn(
    x: jax.Array,
    weights: jax.Array,
    up_EDW: jax.Array,
    down_EWD: jax.Array,
    gate_EDW: jax.Array | None,
    activation: Activation,
) -> jax.Array:
    """`sum_e weights[..., e] * down_e act(up_e x)` for x [..., D] and weights [..., E]."""
    return _mixed(hidden_units(x, up_EDW, gate_EDW, activation), weights, down_EWD)


def _mixed(hidden: jax.Array, weights: jax.Array, down_EWD: jax.Array) -> jax.Array:
    return product(jnp.einsum("...ew,ewd->...d", hidden * weights[..., None].astype(hidden.dtype), down_EWD))


def spread(experts: jax.Array, weights: jax.Array, count: int) -> jax.Array:
    """Weights [..., k] of chosen experts [..., k] as weights [..., count] of all; an expert chosen twice adds up."""
    return jnp.sum(jax.nn.one_hot(experts, count, dtype=weights.dtype) * weights[..., None], axis=-2)


def grouped_ffn(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    up_EDW: jax.Array,
    down_EWD: jax.Array,
    gate_EDW: jax.Array | None,
    activation: Activation,
) -> tuple[jax.Array, jax.Array]:
    """The dense form of the operation, and the non-zero units of the chosen experts [..., k]; see the package."""
    hidden = hidden_units(x, up_EDW, gate_EDW, activation)
    y = _mixed(hidden, spread(experts, weights, up_EDW.shape[0]), down_EWD)
    return y, jnp.take_along_axis(count_nonzero(hidden), experts, axis=-1)


def count_nonzero(hidden: jax.Array) -> jax.Array:
    """Number of non-zero entries along the last axis, float32."""
    return jnp.sum(hidden != 0, axis=-1, dtype=jnp.float32)
