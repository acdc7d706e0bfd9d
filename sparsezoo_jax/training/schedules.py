"""Learning-rate schedules: each kind's configuration, and the rate as a pure function of the train step counter."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.registry import Kind, Registry

Schedule = Callable[[jax.Array | int], jax.Array]
DecayShape = Literal["linear", "1-sqrt", "exponential", "cosine", "halving"]
"""`halving` is 2 * 0.5^u - 1: an exponential decay to a half, stretched to end at 0 (Megatron's exponential WSD)."""


MergeDecay = Literal["linear", "1-sqrt"]
"""Decays that an average of checkpoints imitates; `linear` weighs all alike."""


def steps_of(length: float, steps: int) -> int:
    """Number of steps that `length` stands for: itself from 1 on, a fraction of `steps` below 1."""
    return round(length * steps) if length < 1 else int(length)


def _check_length(name: str, length: float) -> None:
    require(
        length >= 0 and (length < 1 or length == int(length)),
        f"train.schedule.{name}",
        length,
        "must be a whole number of steps, or a fraction of train.steps between 0 and 1",
    )


def _check_ratio(ratio: float) -> None:
    require(0 <= ratio <= 1, "train.schedule.min_ratio", ratio, "must be between 0 and 1")


class ScheduleKind(Kind):
    """A learning rate over the steps of a run: a linear warm-up, and what follows it."""

    learning_rate: float
    warmup_steps: float

    def check_rate(self) -> None:
        """Raise `ConfigError` for an impossible learning rate or warm-up."""
        require(self.learning_rate > 0, "train.schedule.learning_rate", self.learning_rate, "must be above 0")
        _check_length("warmup_steps", self.warmup_steps)

    def phases(self) -> tuple[float, ...]:
        """Lengths of the phases that must fit into a run, as `steps_of` reads them. Default: the warm-up."""
        return (self.warmup_steps,)

    @abc.abstractmethod
    def after_warmup(self, t: jax.Array, steps: int) -> jax.Array:
        """The learning rate divided by its peak at step t of `steps`, float32, for steps that follow the warm-up."""


SCHEDULES: Registry[ScheduleKind] = Registry("train.schedule", ScheduleKind)
register_schedule = SCHEDULES.register
ScheduleConfig = Annotated[ScheduleKind, SCHEDULES]


def decay_fraction(shape: DecayShape, u: jax.Array, min_ratio: float) -> jax.Array:
    """Fraction of the peak left at `u` in [0, 1] of a decay that starts at 1 and ends at `min_ratio`."""
    if shape == "exponential":
        return jnp.power(jnp.float32(min_ratio), u)
    g = {
        "linear": 1 - u,
        "1-sqrt": 1 - jnp.sqrt(u),
        "cosine": 0.5 * (1 + jnp.cos(jnp.pi * u)),
        "halving": 2 * jnp.exp2(-u) - 1,
    }[shape]
    return min_ratio + (1 - min_ratio) * g


def decayed(t: jax.Array, start: int, length: int, shape: DecayShape, min_ratio: float) -> jax.Array:
    """Fraction of the peak at step t of a decay over the steps `start` .. `start + length`; 1 before, minimum after."""
    u = jnp.clip((t - start) / max(length, 1), 0.0, 1.0)
    # A decay of no steps is a drop: the whole way down at its start.
    u = jnp.where(t >= start, u if length else 1.0, 0.0)
    return decay_fraction(shape, u, min_ratio)


@register_schedule
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Cosine(ScheduleKind):
    """Linear warm-up, then half a cosine, which would reach min_ratio * learning_rate one step after the last."""

    kind: Literal["cosine"] = "cosine"
    """Schedule kind."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    warmup_steps: float = 0.02
    """Length of the linear warm-up: a number of steps, or a fraction of train.steps when below 1."""
    min_ratio: float = 0.1
    """Final learning rate divided by the peak."""

    def __post_init__(self):
        self.check_rate()
        _check_ratio(self.min_ratio)

    def after_warmup(self, t: jax.Array, steps: int) -> jax.Array:
        warmup = steps_of(self.warmup_steps, steps)
        return decayed(t, warmup, steps - warmup, "cosine", self.min_ratio)


@register_schedule
@dataclass(frozen=True, kw_only=True, config=STRICT)
class WSD(ScheduleKind):
    """Warm-up, stable, decay towards min_ratio * learning_rate one step after the last (arXiv 2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    """Schedule kind."""
    learning_rate: float = 3e-4
    """Learning rate of the stable phase."""
    warmup_steps: float = 0.02
    """Length of the linear warm-up: a number of steps, or a fraction of train.steps when below 1."""
    decay_steps: float = 0.2
    """Length of the decay: a number of steps, or a fraction of train.steps when below 1."""
    decay: DecayShape = "1-sqrt"
    """Shape of the decay."""
    min_ratio: float = 0.0
    """Final learning rate divided by the peak; above 0 for the exponential decay."""

    def __post_init__(self):
        self.check_rate()
        _check_length("decay_steps", self.decay_steps)
        _check_ratio(self.min_ratio)
        if self.decay == "exponential":
            require(
                self.min_ratio > 0, "train.schedule.min_ratio", self.min_ratio, "must be above 0 to decay exponentially"
            )

    def phases(self) -> tuple[float, ...]:
        return (self.warmup_steps, self.decay_steps)

    def after_warmup(self, t: jax.Array, steps: int) -> jax.Array:
        length = steps_of(self.decay_steps, steps)
        return decayed(t, steps - length, length, self.decay, self.min_ratio)


@register_schedule
@dataclass(frozen=True, kw_only=True, config=STRICT)
class WSDC(ScheduleKind):
    """Warm-up, stable, decay, constant: after the decay the run goes on at min_ratio * learning_rate."""

    kind: Literal["wsdc"] = "wsdc"
    """Schedule kind."""
    learning_rate: float = 3e-4
    """Learning rate of the stable phase."""
    warmup_steps: float = 0.02
    """Length of the linear warm-up: a number of steps, or a fraction of train.steps when below 1."""
    stable_steps: float = 0.6
    """Length of the stable phase: a number of steps, or a fraction of train.steps when below 1."""
    decay_steps: float = 0.2
    """Length of the decay: a number of steps, or a fraction of train.steps when below 1."""
    decay: DecayShape = "1-sqrt"
    """Shape of the decay."""
    min_ratio: float = 0.1
    """Learning rate of the constant tail divided by the peak; above 0 for the exponential decay."""

    def __post_init__(self):
        self.check_rate()
        _check_length("stable_steps", self.stable_steps)
        _check_length("decay_steps", self.decay_steps)
        _check_ratio(self.min_ratio)
        if self.decay == "exponential":
            require(
                self.min_ratio > 0, "train.schedule.min_ratio", self.min_ratio, "must be above 0 to decay exponentially"
            )

    def phases(self) -> tuple[float, ...]:
        return (self.warmup_steps, self.stable_steps, self.decay_steps)

    def after_warmup(self, t: jax.Array, steps: int) -> jax.Array:
        start = steps_of(self.warmup_steps, steps) + steps_of(self.stable_steps, steps)
        return decayed(t, start, steps_of(self.decay_steps, steps), self.decay, self.min_ratio)


@register_schedule
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Constant(ScheduleKind):
    """Linear warm-up, then a constant learning rate; merge the last checkpoints instead of decaying (merging.py)."""

    kind: Literal["constant"] = "constant"
    """Schedule kind."""
    learning_rate: float = 3e-4
    """Learning rate after the warm-up."""
    warmup_steps: float = 0.02
    """Length of the linear warm-up: a number of steps, or a fraction of train.steps when below 1."""

    def __post_init__(self):
        self.check_rate()

    def after_warmup(self, t: jax.Array, steps: int) -> jax.Array:
        return jnp.ones_like(t)


def build_schedule(config: ScheduleKind, steps: int) -> Schedule:
    """The learning rate as a function of the train step counter t = 0, 1, ..., steps, float32.

    With W warm-up steps: learning_rate * t / W for t < W. Cosine then decays until t = steps. WSD stays at the peak and
    decays over its last decay_steps. WSDC stays for stable_steps, decays for decay_steps, and stays at the minimum.
    """
    warmup = steps_of(config.warmup_steps, steps)

    def schedule(step: jax.Array | int) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        fraction = jnp.where(t < warmup, t / max(warmup, 1), config.after_warmup(t, steps))
        return jnp.float32(config.learning_rate) * fraction

    return schedule
