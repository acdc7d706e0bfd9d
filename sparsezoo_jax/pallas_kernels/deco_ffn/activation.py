"""NormSiLU: what happens to the units of DECO's experts between the two maps. All is computed in float32 or wider."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

ExpertActivation = Literal["norm_silu", "no_mean", "no_rms", "silu"]
"""norm_silu: the mean over all experts removed, RMS norm of each expert, SiLU. no_mean: the mean is kept. no_rms: the
mean is removed and nothing is normalised or scaled. silu: neither."""

REMOVE_MEAN: tuple[ExpertActivation, ...] = ("norm_silu", "no_rms")
NORMALISE: tuple[ExpertActivation, ...] = ("norm_silu", "no_mean")


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def centred(units: jax.Array, activation: ExpertActivation) -> jax.Array:
    """Units [..., F] of all experts less their mean where the activation removes it; float32 or wider."""
    units = _wide(units)
    return units - jnp.mean(units, axis=-1, keepdims=True) if activation in REMOVE_MEAN else units


def norm_silu(centred_EW: jax.Array, scale_W: jax.Array | None, eps: float, activation: ExpertActivation) -> jax.Array:
    """SiLU of units [..., E, W] whose mean is removed, each expert's divided by their root mean square; float32."""
    c = _wide(centred_EW)
    if scale_W is not None and activation in NORMALISE:
        c = c * jax.lax.rsqrt(jnp.mean(jnp.square(c), axis=-1, keepdims=True) + eps) * _wide(scale_W)
    return jax.nn.silu(c)
