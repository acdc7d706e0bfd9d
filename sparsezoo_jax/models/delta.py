"""Delta activations (arXiv 2107.07305): activations rounded to a learned step, so that most do not change over time.

A linear map of what changed is all that the next step needs: `W x_t = W x_{t-1} + W (x_t - x_{t-1})`. The layer here is
for clips [B, T, ..., C]; `models.delta_ffn` has tokens for time.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require

StepPer = Literal["channel", "neuron", "layer"]
"""What has a step of its own: each channel, each of all features, or the layer."""

#: Smallest step that activations are divided by; a learned one may come to 0 [ours].
SMALLEST_STEP = 1e-6


@jax.custom_vjp
def round_to_steps(x: jax.Array, step: jax.Array) -> jax.Array:
    """`round(x / step) * step`, halves to even, in the dtype of x.

    Its gradients are no derivatives: that of x passes unchanged, and that of the step is
    `-sum(round(x / step) * gradient)`. Rounding is passed straight through, the division by the step has no gradient to
    the step, and the product's is negated: a loss that grows with what is left of x makes the steps longer.

    Args:
      x: [..., C] or any shape that `step` broadcasts to.
      step: float32, at least 0; below `SMALLEST_STEP` it is that.

    Source: arXiv 2107.07305, its authors' code.
    """
    return _rounded(x, step)[0]


def _rounded(x: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded activations, and how many steps each is, float32."""
    # In float32: whole numbers beyond 256 are none in bfloat16.
    step = jnp.maximum(step.astype(jnp.float32), SMALLEST_STEP)
    counts = jnp.round(x.astype(jnp.float32) / step)
    return (counts * step).astype(x.dtype), counts


def _forward(x, step):
    y, counts = _rounded(x, step)
    return y, (counts.astype(x.dtype), step)


def _backward(kept, gradient):
    counts, step = kept
    product = -counts.astype(jnp.float32) * gradient.astype(jnp.float32)
    leading = product.ndim - step.ndim
    repeated = tuple(leading + i for i, size in enumerate(step.shape) if size == 1 and product.shape[leading + i] > 1)
    summed = jnp.sum(product, axis=(*range(leading), *repeated)).reshape(step.shape)
    return gradient, summed.astype(step.dtype)


round_to_steps.defvjp(_forward, _backward)


def change(x: jax.Array, pairs: jax.Array | None = None) -> jax.Array:
    """What is new at each time: `x_t - x_{t-1}`, and 0 where there is nothing before.

    Args:
      x: [B, T, ...].
      pairs: bool [B, T], True where the time before belongs to the same clip or document. None: from the second on.
    """
    before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), *((0, 0) for _ in x.shape[2:])))
    if pairs is None:
        pairs = jnp.broadcast_to(jnp.arange(x.shape[1]) > 0, x.shape[:2])
    pairs = pairs.reshape(*x.shape[:2], *(1 for _ in x.shape[2:]))
    # Compared, too: a compiler may fuse the product that made x into the difference, with more digits than x has.
    return jnp.where(pairs & (x != before), x - before, 0)


class Spikes(NamedTuple):
    """What changes over time, means over pairs of neighbouring times and over features, float32 scalars."""

    size: jax.Array
    """Mean of `|x_t - x_{t-1}|`, differentiable: the loss of a layer is this times its fan-out."""
    density: jax.Array
    """Share of the features that change; temporal sparsity is 1 less this. 0 where nothing has a time before."""


def spikes(x: jax.Array, pairs: jax.Array | None = None) -> Spikes:
    """How much of x [B, T, ...] changes from one time to the next; `pairs` as in `change`. The first times are none."""
    counted = jnp.broadcast_to(jnp.arange(x.shape[1]) > 0, x.shape[:2]) if pairs is None else pairs
    changes = change(x, counted).astype(jnp.float32)
    features = math.prod(x.shape[2:])
    total = jnp.maximum(jnp.sum(counted, dtype=jnp.float32) * features, 1)
    return Spikes(jnp.sum(jnp.abs(changes)) / total, jnp.sum(changes != 0, dtype=jnp.float32) / total)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DeltaConfig:
    """A delta activation layer. The defaults are those of the authors' code."""

    step_per: StepPer = "channel"
    """What has a step of its own."""
    step_init: float = 0.1
    """Step at the start."""
    cumulative: bool = False
    """Sum the input up over time first, where it is of changes. Linear maps before must have no bias."""
    bias: bool = False
    """A bias of each channel before the non-linearity."""
    activation: Literal["none", "relu"] = "relu"
    """Non-linearity before rounding."""
    pool: int | None = None
    """Side of the squares of two spatial axes of which the largest is kept, after rounding. None: all are."""
    level: Literal[0, 1, 2] = 0
    """0 gives out the rounded activations; 1 their changes, of which the first is that from 0; 2 the changes, with the
    second one in place of the first, so that what stays the same is never seen."""

    def __post_init__(self):
        require(0 < self.step_init < math.inf, "step_init", self.step_init, "must be above 0, and finite")
        require(self.pool is None or self.pool > 1, "pool", self.pool, "must be above 1, or None")


class DeltaOutput(NamedTuple):
    """What a delta activation layer makes of a clip."""

    x: jax.Array
    """[B, T, ..., C] by the layer's level."""
    spikes: Spikes


class DeltaActivation(nnx.Module):
    """Sum over time, bias, non-linearity, rounding, pooling, changes: those that the configuration has, in this order.

    Source: arXiv 2107.07305, section 3, and its authors' code.
    """

    def __init__(self, features: tuple[int, ...], config: DeltaConfig):
        """Of clips [B, T, *features], whose last axis are channels."""
        self.config = config
        shape = {"channel": features[-1:], "neuron": features, "layer": ()}[config.step_per]
        self.step = nnx.Param(jnp.full(shape, config.step_init, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features[-1:], jnp.float32)) if config.bias else None

    def __call__(self, x: jax.Array) -> DeltaOutput:
        """For a clip [B, T, ..., C]; level 2 needs at least two frames."""
        config = self.config
        if config.cumulative:
            x = jnp.cumsum(x, axis=1)
        if self.bias is not None:
            x = x + self.bias[...].astype(x.dtype)
        if config.activation == "relu":
            x = jax.nn.relu(x)
        x = round_to_steps(x, jnp.abs(self.step[...]))
        if config.pool is not None:
            window = (config.pool, config.pool)
            x = nnx.max_pool(x, window, strides=window)
        found = spikes(x)
        if config.level == 0:
            return DeltaOutput(x, found)
        changes, first = change(x), x[:, :1]
        if config.level == 2:
            first = changes[:, 1:2]
        return DeltaOutput(jnp.concatenate([first, changes[:, 1:]], axis=1), found)


def spike_loss(found: Spikes, fan_out: int) -> jax.Array:
    """What a layer's changes cost, `fan_out * mean |change|`: `fan_out` multiply-adds follow a feature that changes."""
    return fan_out * found.size
