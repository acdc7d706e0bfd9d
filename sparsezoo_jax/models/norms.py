"""Normalisation layers, computed in float32 whatever the activations' dtype."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.common import BuildContext


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NormConfig:
    """The normalisation used throughout a decoder."""

    kind: Literal["rms", "layer"] = "rms"
    """rms: root mean square; layer: mean removed too."""
    eps: float = 1e-6
    """Added to the mean square."""
    zero_centered: bool = False
    """Store the scale as an offset from 1 (Gemma) instead of itself (Llama, GPT-2)."""
    bias: bool = False
    """Add a learned offset (GPT-2)."""

    def __post_init__(self):
        require(self.eps > 0, "model.norm.eps", self.eps, "must be above 0")

    def build(self, ctx: BuildContext, width: int | None = None, axis: str = "embed") -> Norm:
        return Norm(self, ctx, ctx.d_model if width is None else width, axis)


class Norm(nnx.Module):
    """`x / rms(x) * scale` or its mean-removing form, over the last axis."""

    def __init__(self, config: NormConfig, ctx: BuildContext, width: int, axis: str):
        self.config = config
        self.scale = ctx.constant(0.0 if config.zero_centered else 1.0, (width,), (axis,))
        self.bias = ctx.constant(0.0, (width,), (axis,)) if config.bias else None

    def __call__(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        """Normalise the last axis of `x`; with booleans `where` of its shape, over those entries: others become 0."""
        wide = x.astype(jnp.float32)
        if self.config.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True, where=where)
        wide = _normalised(wide, self.config.eps, where)
        # The scale multiplies in float32, before the cast back: in bfloat16 1 + w would lose w's low bits.
        scale = self.scale[...].astype(jnp.float32)
        wide = wide * (1 + scale if self.config.zero_centered else scale)
        if self.bias is not None:
            wide = wide + self.bias[...].astype(jnp.float32)
        return (wide if where is None else jnp.where(where, wide, 0)).astype(x.dtype)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x)` over the last axis, without a scale."""
    return _normalised(x.astype(jnp.float32), eps).astype(x.dtype)


def _normalised(wide: jax.Array, eps: float, where: jax.Array | None = None) -> jax.Array:
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True, where=where) + eps)
