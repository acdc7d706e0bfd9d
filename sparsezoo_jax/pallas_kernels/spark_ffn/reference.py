"""Spark FFN in plain JAX: predictor scores, statistical top-k, GELU, product with the second branch, down-projection.

Shapes: B... leading axes, D model width, r predictor width, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.matmul import from_stream, to_stream, with_stored_gradient
from sparsezoo_jax.sharding import constrain, num_shards

SAMPLE = 128
"""Neurons of each device whose scores `sampled_mean` averages: the lanes of a tile."""


def spark_ffn(
    x: jax.Array, k1: jax.Array, k2: jax.Array, v: jax.Array, *, select: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """`V [GELU(select(K1^T x[:r])) * (K2^T x[r:])]`, and the gate [..., F] whose non-zeros are the active neurons."""
    r = k1.shape[0]
    names = _names(x)
    scores = constrain(from_stream(x[..., :r], k1), names)
    gate = jax.nn.gelu(select(scores), approximate=True)
    hidden = gate * with_stored_gradient(constrain(from_stream(x[..., r:], k2), names))
    return to_stream(hidden, v), gate


def sampled_mean(x: jax.Array, k1: jax.Array) -> jax.Array:
    """Mean score of some neurons, float32 [..., 1]: the first `SAMPLE` of each device, which have to move nowhere."""
    r, width = k1.shape
    shards = num_shards("ffn", width)
    some = k1.reshape(r, shards, width // shards)[:, :, :SAMPLE].reshape(r, -1)
    scores = constrain(
        jnp.matmul(x[..., :r], some, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)), _names(x)
    )
    return jax.lax.stop_gradient(jnp.mean(scores, axis=-1, keepdims=True))


def _names(x: jax.Array) -> tuple[str | None, ...]:
    return (*("batch", "length")[: x.ndim - 1], *(None,) * (x.ndim - 3), "ffn")
