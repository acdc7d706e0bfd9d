"""Matrix product whose weight gradient is taken in the cheaper order."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.checkpoint_names import product

__all__ = ["matmul"]


def matmul(x: jax.Array, w: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x @ w` for x [..., I] and w [I, O], both of one dtype; returns [..., O] in `dtype` (None: theirs).

    Differentiates like `jnp.matmul`, except that the weight gradient contracts the tokens of whichever of `x` and the
    incoming gradient is narrower as the left operand. XLA for CPU transposes the left operand of that product in
    memory, and autodiff always puts the gradient there, which for a 4,096-wide output is a 32-times larger copy.
    """
    y: Any = _matmul(x, w, dtype)
    return product(y)  # named out here: policies do not look into a custom_vjp


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, w, dtype):
    return jnp.matmul(x, w, preferred_element_type=dtype)


def _forward(x, w, dtype):
    return _matmul(x, w, dtype), (x, w)


def _backward(dtype, residuals, g):
    x, w = residuals
    g = g.astype(x.dtype)  # the products of the backward pass run in the operands' precision, as the forward one does
    # All leading axes at once: flattening them first would lose how batch and sequence are sharded.
    leading = tuple(range(x.ndim - 1))
    over_tokens = ((leading, leading), ((), ()))
    if x.shape[-1] <= g.shape[-1]:
        dw = jax.lax.dot_general(x, g, over_tokens, preferred_element_type=w.dtype)
    else:
        dw = jax.lax.dot_general(g, x, over_tokens, preferred_element_type=w.dtype).T
    return jnp.matmul(g, w.T), dw


_matmul.defvjp(_forward, _backward)
