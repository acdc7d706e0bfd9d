"""Matrix product whose weight gradient is taken in the cheaper order."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.sharding import gather_axis

__all__ = ["from_stream", "matmul", "to_stream", "with_stored_gradient"]


def matmul(x: jax.Array, w: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x @ w` for x [..., I] and w [I, O], both of one dtype; returns [..., O] in `dtype` (None: theirs).

    Differentiates like `jnp.matmul`, except that the weight gradient contracts the tokens of whichever of `x` and the
    incoming gradient is narrower as the left operand. XLA for CPU transposes the left operand of that product in
    memory, and autodiff always puts the gradient there, which for a 4,096-wide output is a 32-times larger copy.
    """
    y: Any = _matmul(x, w, dtype)
    return product(y)  # named out here: policies do not look into a custom_vjp


def from_stream(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x W` for x [..., T, D] of the residual stream and W [D, O], whose rows all devices need: they are gathered.

    For a single token it is left to the compiler whether to move the matrix or the sums.
    """
    return matmul(x, gather_axis(w, 0) if x.shape[-2:-1] > (1,) else w)


def to_stream(y: jax.Array, w: jax.Array) -> jax.Array:
    """`y W` for y [..., T, I] and W [I, D], the way back; the matrix's columns are gathered likewise."""
    return matmul(y, gather_axis(w, 1) if y.shape[-2:-1] > (1,) else w)


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


@jax.custom_vjp
def with_stored_gradient(y: jax.Array) -> jax.Array:
    """`y`, a product, whose gradient exists in memory: for one that is made elementwise from several arrays.

    Both products of the backward pass read it. The TPU compiler would make it in each of them again, from all of the
    arrays that it is made of.
    """
    return y


with_stored_gradient.defvjp(lambda y: (y, None), lambda _, g: (jax.lax.optimization_barrier(g),))
