"""Expert feed-forward in plain JAX, by its definition: every expert sees every token.

Shapes: leading axes (batch, length), D model width, E experts, W width of one expert.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparsezoo_jax.sharding import constrain

Activation = Callable[[jax.Array], jax.Array]


def weighted_ffn(
    x: jax.Array,
    weights: jax.Array,
    up_EDW: jax.Array,
    down_EWD: jax.Array,
    gate_EDW: jax.Array | None,
    activation: Activation,
) -> jax.Array:
    """`sum_e weights[..., e] * down_e act(up_e x)` for x [..., D] and weights [..., E]."""
    names = (*("batch", "length")[: x.ndim - 1], *(None,) * (x.ndim - 3), "experts", "ffn")
    hidden = constrain(jnp.einsum("...d,edw->...ew", x, up_EDW), names)
    if gate_EDW is None:
        hidden = activation(hidden)
    else:
        hidden = activation(constrain(jnp.einsum("...d,edw->...ew", x, gate_EDW), names)) * hidden
    return jnp.einsum("...ew,ewd->...d", hidden * weights[..., None].astype(hidden.dtype), down_EWD)


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
) -> jax.Array:
    """The dense form of the operation; see the package."""
    return weighted_ffn(x, spread(experts, weights, up_EDW.shape[0]), up_EDW, down_EWD, gate_EDW, activation)
