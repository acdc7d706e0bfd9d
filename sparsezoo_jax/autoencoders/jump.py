"""JumpReLU and the step under it, whose thresholds learn by pseudo-derivatives (arXiv 2407.14435).

Neither has a useful derivative by the threshold: the loss jumps where an input crosses it. What counts is how the
expected loss moves, and a kernel over the inputs near the threshold estimates that from one batch.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump_relu(z_NF: jax.Array, threshold_F: jax.Array, bandwidth: float) -> jax.Array:
    """`z H(z - threshold)`: inputs above their feature's threshold, 0 elsewhere, [N, F].

    By z the derivative is the true one, H(z - threshold); by the threshold it is
    `-(threshold / bandwidth) K((z - threshold) / bandwidth)`, K(u) = 1 for |u| < 1/2 and 0 elsewhere.
    """
    return jnp.where(z_NF > threshold_F, z_NF, 0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(z_NF: jax.Array, threshold_F: jax.Array, bandwidth: float) -> jax.Array:
    """`H(z - threshold)`: 1 above the threshold, 0 elsewhere, in z's type, [N, F].

    By z the derivative is 0; by the threshold it is `-(1 / bandwidth) K((z - threshold) / bandwidth)`.
    """
    return (z_NF > threshold_F).astype(z_NF.dtype)


def _kernel(z_NF: jax.Array, threshold_F: jax.Array, bandwidth: float) -> jax.Array:
    return (jnp.abs(z_NF - threshold_F) < bandwidth / 2).astype(z_NF.dtype)


def _jump_forward(z_NF: jax.Array, threshold_F: jax.Array, bandwidth: float):
    return jump_relu(z_NF, threshold_F, bandwidth), (z_NF, threshold_F)


def _jump_backward(bandwidth: float, kept: tuple[jax.Array, jax.Array], gradient_NF: jax.Array):
    z_NF, threshold_F = kept
    near_F = jnp.sum(gradient_NF * _kernel(z_NF, threshold_F, bandwidth), axis=0)
    return jnp.where(z_NF > threshold_F, gradient_NF, 0), -threshold_F / bandwidth * near_F


def _step_forward(z_NF: jax.Array, threshold_F: jax.Array, bandwidth: float):
    return step(z_NF, threshold_F, bandwidth), (z_NF, threshold_F)


def _step_backward(bandwidth: float, kept: tuple[jax.Array, jax.Array], gradient_NF: jax.Array):
    z_NF, threshold_F = kept
    near_F = jnp.sum(gradient_NF * _kernel(z_NF, threshold_F, bandwidth), axis=0)
    return jnp.zeros_like(z_NF), -near_F / bandwidth


jump_relu.defvjp(_jump_forward, _jump_backward)
step.defvjp(_step_forward, _step_backward)
