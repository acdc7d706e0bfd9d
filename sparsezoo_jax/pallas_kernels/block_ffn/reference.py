"""BlockFFN's experts in plain JAX. Shapes: D model width, E experts, W expert width, F = E * W, N tokens, U a union."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.matmul import from_stream, to_stream
from sparsezoo_jax.sharding import constrain


def scaled_hidden(
    x: jax.Array, scores: jax.Array, up: jax.Array, gate: jax.Array | None, *, expert_width: int
) -> jax.Array:
    """Hidden state of all experts, each times its score, [..., F]; exactly 0 where the score is."""
    names = (*("batch", "length")[: x.ndim - 1], *(None,) * (x.ndim - 3), "ffn")
    hidden = from_stream(x, up)
    hidden = jax.nn.silu(hidden) if gate is None else jax.nn.silu(from_stream(x, gate)) * hidden
    hidden = constrain(hidden, names)
    per_expert = hidden.reshape(*scores.shape, expert_width) * scores[..., None].astype(x.dtype)
    return constrain(per_expert.reshape(hidden.shape), names)


def block_ffn(
    x: jax.Array, scores: jax.Array, up: jax.Array, down: jax.Array, gate: jax.Array | None, *, expert_width: int
) -> jax.Array:
    """The sum over all experts, as three dense operations."""
    return to_stream(scaled_hidden(x, scores, up, gate, expert_width=expert_width), down)


def union_of_experts(scores_NE: jax.Array, capacity: int) -> jax.Array:
    """Experts with a non-zero score for some token, ascending, int32 [capacity]; E fills up what is left.

    A union of more than `capacity` experts loses its last ones.
    """
    total = scores_NE.shape[-1]
    (experts,) = jnp.nonzero(jnp.any(scores_NE != 0, axis=0), size=capacity, fill_value=total)
    return experts.astype(jnp.int32)


def misses_an_expert(scores_NE: jax.Array, experts: jax.Array) -> jax.Array:
    """Whether some token has a non-zero score for an expert that is not among `experts`."""
    covered = jnp.zeros(scores_NE.shape[-1], bool).at[experts].set(True, mode="drop")
    return jnp.any(jnp.any(scores_NE != 0, axis=0) & ~covered)


def block_ffn_union(x, scores, up, down, gate, experts: jax.Array, *, expert_width: int) -> jax.Array:
    """The sum over `experts` only; NaN if an active one is not among them."""
    d, total = x.shape[-1], scores.shape[-1]

    def columns(matrix_DF: jax.Array) -> jax.Array:
        taken = jnp.take(matrix_DF.reshape(d, total, expert_width), experts, axis=1, mode="fill", fill_value=0)
        return taken.reshape(d, -1)

    rows = jnp.take(down.reshape(total, expert_width, d), experts, axis=0, mode="fill", fill_value=0).reshape(-1, d)
    taken_NU = jnp.take(scores, experts, axis=1, mode="fill", fill_value=0)
    y = block_ffn(x, taken_NU, columns(up), rows, None if gate is None else columns(gate), expert_width=expert_width)
    return jnp.where(misses_an_expert(scores, experts), jnp.nan, y)
