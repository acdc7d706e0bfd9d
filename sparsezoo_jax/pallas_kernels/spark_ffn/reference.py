"""Spark FFN in plain JAX: predictor scores, statistical top-k, GELU, product with the second branch, down-projection.

Shapes: B... leading axes, D model width, r predictor width, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.sharding import constrain


def spark_ffn(
    x: jax.Array, k1: jax.Array, k2: jax.Array, v: jax.Array, *, select: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """`V [GELU(select(K1^T x[:r])) * (K2^T x[r:])]`, and the gate [..., F] whose non-zeros are the active neurons."""
    r = k1.shape[0]
    names = (*("batch", "length")[: x.ndim - 1], *(None,) * (x.ndim - 3), "ffn")
    scores = constrain(matmul(x[..., :r], k1), names)
    gate = jax.nn.gelu(select(scores), approximate=True)
    hidden = gate * constrain(matmul(x[..., r:], k2), names)
    return matmul(hidden, v), gate
