"""Rotary position embeddings, split-half pairing (coordinate i with i + width/2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RopeConfig:
    """Rotary position embeddings."""

    base: float = 10_000.0
    """Wavelengths run from 2 pi to 2 pi times this."""
    local_base: float | None = None
    """Base in local layers; None: the same."""
    fraction: float = 1.0
    """Share of the head's dimensions that rotate (the first ones)."""

    def __post_init__(self):
        require(0 < self.fraction <= 1, "model.attention.rope.fraction", self.fraction, "must be in (0, 1]")

    def check(self, width: int, field: str) -> None:
        """Raise `ConfigError` if this can't rotate heads of this width, the value of `field`: pairs are whole."""
        require(width % 2 == 0, field, width, "must be even to rotate")
        rotated = self.fraction * width
        whole = abs(rotated - round(rotated)) < 1e-6 and round(rotated) % 2 == 0
        name = "model.attention.rope.fraction"
        require(whole, name, self.fraction, f"must rotate an even number of dimensions, not {rotated:g} of {width}")

    def base_of(self, layer_type: str) -> float:
        return self.local_base if layer_type == "local" and self.local_base is not None else self.base


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, base: float, fraction: float = 1.0) -> jax.Array:
    """Rotate heads [B, T, N, H] by their positions, so that dot products depend on relative position only.

    Frequencies are `base^(-2i/R)` over the R = fraction * H first dimensions, pairs are (i, i + R/2); the remaining
    dimensions pass through. Angles and rotation are float32.
    """
    rotated = round(x_BTNH.shape[-1] * fraction)
    frequency = base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    angle_BT1R = positions_BT[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle_BT1R), jnp.cos(angle_BT1R)
    first, second = jnp.split(x_BTNH[..., :rotated].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
    return turned if rotated == x_BTNH.shape[-1] else jnp.concatenate([turned, x_BTNH[..., rotated:]], axis=-1)
