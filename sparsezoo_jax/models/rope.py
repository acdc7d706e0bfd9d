"""Rotary position embeddings, split-half pairing (coordinate i with i + width/2)."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RopeScaling:
    """Slower rotations, for texts longer than those that a model was first trained on; as transformers names them."""

    kind: Literal["linear", "dynamic", "yarn", "llama3"]
    """linear: all frequencies divided by `factor` (position interpolation, arXiv 2306.15595). dynamic: a base that
    grows with the longest position of a call beyond `original_length` (NTK-aware). yarn (arXiv 2309.00071) and llama3
    (arXiv 2407.21783): slow rotations divided by `factor`, fast ones kept, a ramp between."""
    factor: float
    """How much longer."""
    original_length: int | None = None
    """Tokens of the texts before; not for linear."""
    low_freq_factor: float = 1.0
    """llama3: dimensions that turn less often than this in the original length are slowed by the whole factor."""
    high_freq_factor: float = 4.0
    """llama3: those that turn more often than this are kept."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this in the original length are kept."""
    beta_slow: float = 1.0
    """yarn: those that turn less often are slowed by the whole factor."""
    attention_factor: float | None = None
    """yarn: what queries and keys are multiplied by; None: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: the ramp begins and ends at whole dimensions."""

    def __post_init__(self):
        name = "model.attention.rope.scaling"
        require(self.factor >= 1, f"{name}.factor", self.factor, "must be at least 1")
        length = self.original_length
        needed = self.kind != "linear"
        require(not needed or length is not None, f"{name}.original_length", length, f"is needed for {self.kind}")
        require(length is None or length > 0, f"{name}.original_length", length, "must be above 0")
        low, high = self.low_freq_factor, self.high_freq_factor
        require(0 < low < high, f"{name}.high_freq_factor", high, f"must be above low_freq_factor={low}, that above 0")
        fast, slow = self.beta_fast, self.beta_slow
        require(0 < slow < fast, f"{name}.beta_fast", fast, f"must be above beta_slow={slow}, that above 0")

    @property
    def amplitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def frequencies(self, base: float, rotated: int, longest: jax.Array) -> jax.Array:
        """Radians a token of each pair of `rotated` dimensions, float32 [R / 2]; `longest` is the last position."""
        plain = _frequencies(base, rotated)
        if self.kind == "linear":
            return plain / self.factor
        assert self.original_length is not None
        if self.kind == "dynamic":
            length = jnp.maximum(longest + 1, self.original_length).astype(jnp.float32)
            grown = (self.factor * length / self.original_length - (self.factor - 1)) ** (rotated / (rotated - 2))
            return _frequencies(base * grown, rotated)
        if self.kind == "llama3":
            turns = self.original_length * plain / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            kept = 1 - self._yarn_ramp(base, rotated)
        kept = jnp.clip(kept, 0, 1)
        return plain * (kept + (1 - kept) / self.factor)

    def _yarn_ramp(self, base: float, rotated: int) -> jax.Array:
        length = self.original_length or 1

        def dimension(turns: float) -> float:
            return rotated * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        return (jnp.arange(rotated // 2, dtype=jnp.float32) - low) / (high - low if high != low else 0.001)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RopeConfig:
    """Rotary position embeddings."""

    base: float = 10_000.0
    """Wavelengths run from 2 pi to 2 pi times this."""
    local_base: float | None = None
    """Base in local layers; None: the same."""
    fraction: float = 1.0
    """Share of the head's dimensions that rotate (the first ones)."""
    scaling: RopeScaling | None = None
    """Slower rotations for longer texts, in global layers."""

    def __post_init__(self):
        require(0 < self.fraction <= 1, "model.attention.rope.fraction", self.fraction, "must be in (0, 1]")

    def check(self, width: int, field: str) -> None:
        """Raise `ConfigError` if this can't rotate heads of this width, the value of `field`: pairs are whole."""
        require(width % 2 == 0, field, width, "must be even to rotate")
        rotated = self.fraction * width
        whole = abs(rotated - round(rotated)) < 1e-6 and round(rotated) % 2 == 0
        name = "model.attention.rope.fraction"
        require(whole, name, self.fraction, f"must rotate an even number of dimensions, not {rotated:g} of {width}")

    def of(self, layer_type: str) -> tuple[float, float, RopeScaling | None]:
        """Base, share of the dimensions and scaling in layers of a type, as `apply_rope` takes them."""
        local = layer_type == "local"
        base = self.local_base if local and self.local_base is not None else self.base
        return base, self.fraction, None if local else self.scaling


def _frequencies(base: float | jax.Array, rotated: int) -> jax.Array:
    return base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)


def apply_rope(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    base: float,
    fraction: float = 1.0,
    scaling: RopeScaling | None = None,
) -> jax.Array:
    """Rotate heads [B, T, N, H] by their positions, so that dot products depend on relative position only.

    Frequencies are `base^(-2i/R)` over the R = fraction * H first dimensions, or what `scaling` makes of them; pairs
    are (i, i + R/2); the remaining dimensions pass through. Angles and rotation are float32.
    """
    rotated = round(x_BTNH.shape[-1] * fraction)
    if scaling is None:
        frequency, amplitude = _frequencies(base, rotated), 1.0
    else:
        frequency, amplitude = scaling.frequencies(base, rotated, jnp.max(positions_BT)), scaling.amplitude
    angle_BT1R = positions_BT[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle_BT1R), jnp.cos(angle_BT1R)
    if amplitude != 1:
        sin, cos = sin * amplitude, cos * amplitude
    first, second = jnp.split(x_BTNH[..., :rotated].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
    return turned if rotated == x_BTNH.shape[-1] else jnp.concatenate([turned, x_BTNH[..., rotated:]], axis=-1)
