"""Learning-rate schedules: pure functions from the train step counter to the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import jax
import jax.numpy as jnp

from sparsezoo_jax.training.config import WSD, WSDC, Constant, Cosine, DecayShape, steps_of

Schedule = Callable[[jax.Array | int], jax.Array]


def decay_fraction(shape: DecayShape, u: jax.Array, min_ratio: float) -> jax.Array:
    """Fraction of the peak left at `u` in [0, 1] of a decay that starts at 1 and ends at `min_ratio`."""
    if shape == "exponential":
        return jnp.power(jnp.float32(min_ratio), u)
    g = {"linear": 1 - u, "1-sqrt": 1 - jnp.sqrt(u), "cosine": 0.5 * (1 + jnp.cos(jnp.pi * u))}[shape]
    return min_ratio + (1 - min_ratio) * g


def build_schedule(config: Cosine | WSD | WSDC | Constant, steps: int) -> Schedule:
    """The learning rate as a function of the train step counter t = 0, 1, ..., steps, float32.

    With W warm-up steps: learning_rate * t / W for t < W. Cosine then decays until t = steps. WSD stays at the peak and
    decays over its last decay_steps. WSDC stays for stable_steps, decays for decay_steps, and stays at the minimum.
    """
    warmup = steps_of(config.warmup_steps, steps)
    match config:
        case Constant():
            decay_start, decay_steps, shape, min_ratio = steps, 0, "linear", 1.0
        case Cosine():
            decay_start, decay_steps, shape, min_ratio = warmup, steps - warmup, "cosine", config.min_ratio
        case WSD():
            decay_steps = steps_of(config.decay_steps, steps)
            decay_start, shape, min_ratio = steps - decay_steps, config.decay, config.min_ratio
        case WSDC():
            decay_start = warmup + steps_of(config.stable_steps, steps)
            decay_steps, shape, min_ratio = steps_of(config.decay_steps, steps), config.decay, config.min_ratio
        case _:
            assert_never(config)

    def schedule(step: jax.Array | int) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        u = jnp.clip((t - decay_start) / max(decay_steps, 1), 0.0, 1.0)
        # A decay of no steps is a drop: the whole way down at decay_start.
        u = jnp.where(t >= decay_start, u if decay_steps else 1.0, 0.0)
        after_warmup = decay_fraction(shape, u, min_ratio)
        return jnp.float32(config.learning_rate) * jnp.where(t < warmup, t / max(warmup, 1), after_warmup)

    return schedule
