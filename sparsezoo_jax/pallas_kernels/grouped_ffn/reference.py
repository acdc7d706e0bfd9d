"""Expert feed-forward in plain JAX, by its definition: every expert sees every token.

Shapes: leading axes (batch, length), D model width, E experts, W width of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.grouped_ffn.channels import Channels, Masked, Reads, count_nonzero
from sparsezoo_jax.sharding import constrain

Activation = Callable[[jax.Array], jax.Array]


def pre_activations(x: jax.Array, up_EDW: jax.Array) -> jax.Array:
    """`up_e x` of all experts, [..., E, W] for x [..., D]."""
    return _of_experts("...d,edw->...ew", x, up_EDW, x.ndim)


def _of_experts(form: str, x: jax.Array, weight: jax.Array, ndim: int) -> jax.Array:
    names = (*("batch", "length")[: ndim - 1], *(None,) * (ndim - 3), "experts", "ffn")
    return constrain(product(jnp.einsum(form, x, weight)), names)


def hidden_of(
    x: jax.Array,
    up: jax.Array,
    gate: jax.Array | None,
    activation: Activation,
    reads: Reads,
    multiply: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul,
) -> jax.Array:
    """`act(up x)`, or with a gate `act(gate x) * (up x)`, of what `reads` leaves; `multiply` makes the products."""
    hidden = multiply(reads("up", x), up)
    if gate is None:
        return activation(hidden)
    return reads("neurons", activation(multiply(reads("gate", x), gate))) * hidden


def hidden_units(
    x: jax.Array,
    up_EDW: jax.Array,
    gate_EDW: jax.Array | None,
    activation: Activation,
    reads: Reads | None = None,
) -> jax.Array:
    """`act(up_e x)` of all experts, or `act(gate_e x) * (up_e x)`: [..., E, W] for x [..., D].

    `reads`: of all experts, whose maps then have inputs of their own, [..., E, D].
    """

    def multiply(read: jax.Array, weight_EDW: jax.Array) -> jax.Array:
        if read.shape[-2] == 1:
            return pre_activations(read[..., 0, :], weight_EDW)
        return _of_experts("...ed,edw->...ew", read, weight_EDW, x.ndim)

    return hidden_of(x[..., None, :], up_EDW, gate_EDW, activation, reads or Reads(), multiply)


def weighted_ffn(
    x: jax.Array,
    weights: jax.Array,
    up_EDW: jax.Array,
    down_EWD: jax.Array,
    gate_EDW: jax.Array | None,
    activation: Activation,
    channels: Channels | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`sum_e weights[..., e] * down_e act(up_e x)` for x [..., D] and weights [..., E], and counts [..., E] by name.

    "hidden" counts the units that are not 0, the others what the maps of `channels` read.
    """
    reads = Reads() if channels is None else Reads(channels.masked, channels.of_maps)
    hidden = hidden_units(x, up_EDW, gate_EDW, activation, reads)
    counts = {"hidden": count_nonzero(hidden)}
    hidden = reads("down", hidden) * weights[..., None].astype(hidden.dtype)
    return product(jnp.einsum("...ew,ewd->...d", hidden, down_EWD)), counts | reads.counts


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
    of_maps: Mapping[str, Any],
    *,
    activation: Activation,
    masked: Masked,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The dense form of the operation, and counts of the chosen experts [..., k] by name; see `weighted_ffn`."""
    every = spread(experts, weights, up_EDW.shape[0])
    channels = Channels(masked, of_maps)
    y, counts = weighted_ffn(x, every, up_EDW, down_EWD, gate_EDW, activation, channels)
    return y, {name: jnp.take_along_axis(count, experts, axis=-1) for name, count in counts.items()}
