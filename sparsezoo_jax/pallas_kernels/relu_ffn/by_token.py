"""The sparse feed-forward layer token by token, in native code for CPUs: only the rows of active neurons are read.

The map before the ReLU is computed whole; it says which neurons a token uses. Where these are not few, the layer is
computed whole in that step.

Shapes: B batch, T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.dispatch import CustomVJP
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.pallas_kernels.rows import result_shapes

#: Mean share of the neurons that a token uses above which all are computed: with more, whole products are faster on
#: processors with AVX-512 (docs/sparselm.md has the times).
LARGEST = 0.08


def refusal(x: jax.Array) -> str | None:
    """Why the native form can't take this input, or None if it can."""
    if x.dtype != jnp.float32:
        return f"takes float32, not {x.dtype}"
    return None if x.size else "needs at least one token"


def rule(output: Callable[..., Any], backward_of_all: Callable[..., tuple[Any, ...]]) -> CustomVJP[Any]:
    """The layer that `output(scores, down, where)` defines, with the scores as residuals.

    `backward_of_all(arrays, scores, cotangent)` is its backward pass by whole products.
    """

    def forward(x, gate, up, down, where):
        gated = gate is not None
        z = matmul(x, gate if gated else up)

        def by_token():
            shapes = result_shapes((x.shape, x.dtype), (z.shape[:2], x.dtype), (z.shape if gated else (0,), x.dtype))
            return native.call("relu_ffn_forward", shapes, x, z, up.T if gated else _nothing(), down)

        def by_all():
            beside = matmul(x, up) if gated else _nothing()
            found = output((z, beside) if gated else (z,), down, where)
            return found.y, found.l1, beside

        y, l1, beside = jax.lax.cond(few(z), by_token, by_all)
        parts = jax.tree.map(product, (z, beside) if gated else (z,))
        # What counts neurons is used of this, and the rest, which has no reader, not computed.
        return output(parts, down, where)._replace(y=y, l1=l1), parts

    def backward(arrays, parts: tuple[jax.Array, ...], cotangent):
        x, gate, up, down, _ = arrays
        gated, z = gate is not None, parts[0]

        def by_token():
            first, second, beside = (gate, up.T, parts[1]) if gated else (up, _nothing(), _nothing())
            rows = (down.shape, x.dtype)
            shapes = result_shapes((x.shape, x.dtype), rows, rows if gated else ((0,), x.dtype), rows)
            d_x, d_first, d_second, d_down = native.call(
                "relu_ffn_backward", shapes, x, z, beside, first.T, second, down, cotangent.y, cotangent.l1
            )
            maps = (d_first.T, d_second.T) if gated else (None, d_first.T)
            return d_x, *maps, d_down, None

        return jax.lax.cond(few(z), by_token, lambda: backward_of_all(arrays, parts, cotangent))

    return CustomVJP(forward, backward)


def few(z: jax.Array) -> jax.Array:
    """Whether the rows of active neurons are to be read, by the scores before the ReLU."""
    return jnp.mean(z > 0, dtype=jnp.float32) <= LARGEST


def _nothing() -> jax.Array:
    """What stands for no array in a native call."""
    return jnp.zeros(0, jnp.float32)
