"""Products of tokens with the experts that each has chosen, by the native library: nothing is sorted or padded.

Shapes: M tokens, K choices of a token, A = M K in the order of the tokens, E experts, I and O the widths of a matrix.
Float32 throughout. A choice that is no expert's number makes zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsezoo_jax import native


@jax.custom_vjp
def products_by_expert(x_MI: jax.Array, chosen_MK: jax.Array, w_EIO: jax.Array) -> jax.Array:
    """Each token times the matrix of each of its choices, [A, O]; `chosen_MK` is int32."""
    return _call("products_by_expert", (chosen_MK.size, w_EIO.shape[2]), x_MI, chosen_MK, w_EIO)


@jax.custom_vjp
def sum_of_experts(x_AI: jax.Array, chosen_MK: jax.Array, w_EIO: jax.Array) -> jax.Array:
    """The sum over each token's choices of their row times their matrix, [M, O]; `chosen_MK` is int32."""
    return _call("sum_of_experts", (chosen_MK.shape[0], w_EIO.shape[2]), x_AI, chosen_MK, w_EIO)


def _call(operation: str, shape: tuple[int, ...], *arrays: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return native.call(operation, (result,), *arrays, vmap_method="sequential")[0]


def _products_forward(x_MI, chosen_MK, w_EIO):
    return products_by_expert(x_MI, chosen_MK, w_EIO), (x_MI, chosen_MK, w_EIO)


def _products_backward(residuals, g_AO):
    x_MI, chosen_MK, w_EIO = residuals
    dx_MI = sum_of_experts(g_AO, chosen_MK, jnp.swapaxes(w_EIO, 1, 2))
    return dx_MI, None, _call("sums_by_expert", w_EIO.shape, x_MI, chosen_MK, g_AO)


def _sum_forward(x_AI, chosen_MK, w_EIO):
    return sum_of_experts(x_AI, chosen_MK, w_EIO), (x_AI, chosen_MK, w_EIO)


def _sum_backward(residuals, g_MO):
    x_AI, chosen_MK, w_EIO = residuals
    dx_AI = products_by_expert(g_MO, chosen_MK, jnp.swapaxes(w_EIO, 1, 2))
    return dx_AI, None, _call("sums_by_expert", w_EIO.shape, x_AI, chosen_MK, g_MO)


products_by_expert.defvjp(_products_forward, _products_backward)
sum_of_experts.defvjp(_sum_forward, _sum_backward)
