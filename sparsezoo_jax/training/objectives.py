"""Weights of the auxiliary losses that a model returns, beside its cross-entropy."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, ConfigError, require
from sparsezoo_jax.registry import Kind, Registry


class Objective(Kind):
    """Turns one auxiliary loss of the model into a weighted term of the training objective.

    Its methods run inside the compiled train step; `step` is the int32 train step counter, 0 at the first step.
    The state is a pytree of arrays with fixed shapes; it is checkpointed with the rest of the train state.
    """

    loss: str
    """Name of the entry of `out.losses` that this objective weights."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the model's statistics that `update` needs. Default: none."""
        return ()

    def init(self) -> Any:
        """State before the first step. Default: none."""
        return {}

    @abc.abstractmethod
    def coefficient(self, state: Any, step: jax.Array) -> jax.Array:
        """Weight of the loss at this step, float32 scalar."""

    def arguments(self, step: jax.Array) -> dict[str, jax.Array]:
        """What the model's call takes by name so that it returns the loss. Default: nothing."""
        return {}

    def update(self, state: Any, metrics: Mapping[str, jax.Array], step: jax.Array) -> Any:
        """State after a step. Default: the same.

        Its metrics are `loss`, `z_loss`, `losses/<name>` (unweighted) and the model's statistics by name, float32 [L],
        NaN where a layer has no such statistic; all of the whole batch.
        """
        return state


OBJECTIVES: Registry[Objective] = Registry("train.objectives", Objective)
register_objective = OBJECTIVES.register
ObjectiveConfig = Annotated[Objective, OBJECTIVES]


@register_objective
@dataclass(frozen=True, kw_only=True, config=STRICT)
class FixedObjective(Objective):
    """A constant weight, which may be reached along a line: 0 up to step `warmup_start`, whole from `warmup_end` on."""

    kind: Literal["fixed"] = "fixed"
    """Objective kind."""
    loss: str
    """Name of the model's auxiliary loss."""
    weight: float
    """Its weight, at least 0."""
    warmup_start: int = 0
    """Train steps before the weight begins to rise."""
    warmup_end: int = 0
    """Train step from which on it is whole; 0: from the first on."""

    def __post_init__(self):
        require(self.weight >= 0, "train.objectives.weight", self.weight, "must be at least 0")
        start, end = self.warmup_start, self.warmup_end
        require(start >= 0, "train.objectives.warmup_start", start, "must be at least 0")
        allowed = f"must be above train.objectives.warmup_start={start}, or both 0"
        require(end > start or end == start == 0, "train.objectives.warmup_end", end, allowed)

    def coefficient(self, state: Any, step: jax.Array) -> jax.Array:
        if self.warmup_end == 0:
            return jnp.float32(self.weight)
        risen = (jnp.asarray(step, jnp.float32) - self.warmup_start) / (self.warmup_end - self.warmup_start)
        return self.weight * jnp.clip(risen, 0.0, 1.0)


@register_objective
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SineProgressive(Objective):
    """A weight that climbs from peak to peak along half sine waves (ProSparse, arXiv 2402.13516, section 3.2).

    With peaks l_1..l_S at steps T_1..T_S: l_1 up to T_1; l_{i-1} + eta * (l_i - l_{i-1}) on (T_{i-1}, T_i] with
    eta = (sin(-pi/2 + pi * (t - T_{i-1}) / (T_i - T_{i-1})) + 1) / 2; l_S after T_S.
    """

    kind: Literal["sine_progressive"] = "sine_progressive"
    """Objective kind."""
    loss: str
    """Name of the model's auxiliary loss."""
    peaks: tuple[float, ...]
    """Weights l_1..l_S, each at least 0."""
    steps: tuple[int, ...]
    """Train steps T_1 < ... < T_S, counted from the start of training, at which the peaks are reached."""

    def __post_init__(self):
        name = "train.objectives"
        require(len(self.peaks) > 0, f"{name}.peaks", self.peaks, "needs at least one weight")
        require(min(self.peaks) >= 0, f"{name}.peaks", self.peaks, "must all be at least 0")
        require(
            len(self.steps) == len(self.peaks),
            f"{name}.steps",
            self.steps,
            f"needs {len(self.peaks)} entries, as peaks",
        )
        rising = all(a < b for a, b in zip((-1, *self.steps), self.steps, strict=False))
        require(rising, f"{name}.steps", self.steps, "must be at least 0 and rise strictly")

    def coefficient(self, state: Any, step: jax.Array) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        value = jnp.float32(self.peaks[0])
        stages = zip(self.peaks[:-1], self.peaks[1:], self.steps[:-1], self.steps[1:], strict=True)
        for low, high, start, end in stages:
            u = jnp.clip((t - start) / (end - start), 0.0, 1.0)
            eta = 0.5 * (jnp.sin(jnp.pi * (u - 0.5)) + 1.0)
            value = jnp.where(t > start, low + eta * (high - low), value)
        return value


@register_objective
@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaptiveFactor(Objective):
    """A weight multiplied every `interval` steps by how much its loss changed (BlockFFN, arXiv 2507.08771).

    With gamma = mean loss of the last `interval` steps / mean loss of the `interval` steps before them, the factor is
    gamma if gamma <= 1, else max(min_factor, gamma), capped so that the weight never exceeds max_ratio * weight. The
    change is spread linearly over the following `interval` steps. There is no target: sparsity is what `weight` yields.
    """

    kind: Literal["adaptive_factor"] = "adaptive_factor"
    """Objective kind."""
    loss: str
    """Name of the model's auxiliary loss."""
    weight: float
    """Weight at the start, above 0."""
    start: int = 1000
    """Number of steps before the first adjustment (N_st), at least 2 * interval."""
    interval: int = 100
    """Number of steps between adjustments (N_adj)."""
    min_factor: float = 1.025
    """Smallest factor when the loss rose (gamma_min)."""
    max_ratio: float = 4.0
    """Largest ratio of the weight to its start."""

    def __post_init__(self):
        name = "train.objectives"
        require(self.weight > 0, f"{name}.weight", self.weight, "must be above 0")
        require(self.interval > 0, f"{name}.interval", self.interval, "must be above 0")
        allowed = f"must be at least twice the interval ({2 * self.interval})"
        require(self.start >= 2 * self.interval, f"{name}.start", self.start, allowed)
        require(self.min_factor >= 1, f"{name}.min_factor", self.min_factor, "must be at least 1")
        require(self.max_ratio >= 1, f"{name}.max_ratio", self.max_ratio, "must be at least 1")

    def init(self) -> dict[str, jax.Array]:
        return {
            "weight": jnp.float32(self.weight),
            "factor": jnp.float32(1.0),
            "updates": jnp.int32(0),
            "window_sum": jnp.float32(0.0),
            "previous_mean": jnp.float32(0.0),
        }

    def coefficient(self, state: Any, step: jax.Array) -> jax.Array:
        # `updates` losses have been seen, so this is step number updates + 1 in the paper's counting from 1.
        number = state["updates"] + 1
        since = (number - self.start - 1) % self.interval + 1
        ramp = 1.0 + (state["factor"] - 1.0) * since / self.interval
        return jnp.where(number > self.start, state["weight"] * ramp, state["weight"])

    def update(self, state: Any, metrics: Mapping[str, jax.Array], step: jax.Array) -> Any:
        updates = state["updates"] + 1
        window_sum = state["window_sum"] + metrics[f"losses/{self.loss}"]
        window_ends = (updates - self.start) % self.interval == 0
        mean = window_sum / self.interval
        # A loss that was zero gives no ratio; the weight stays.
        previous_mean = state["previous_mean"]
        gamma = jnp.where(previous_mean > 0, mean / jnp.maximum(previous_mean, 1e-20), 1.0)
        wanted = jnp.where(gamma <= 1.0, gamma, jnp.maximum(self.min_factor, gamma))
        # The ramp of the factor in force ends at this very boundary.
        weight = state["weight"] * state["factor"]
        factor = jnp.minimum(wanted, self.weight * self.max_ratio / jnp.maximum(weight, 1e-20))
        adjusts = window_ends & (updates >= self.start)
        return {
            "weight": jnp.where(adjusts, weight, state["weight"]),
            "factor": jnp.where(adjusts, factor, state["factor"]),
            "updates": updates,
            "window_sum": jnp.where(window_ends, 0.0, window_sum),
            "previous_mean": jnp.where(window_ends, mean, state["previous_mean"]),
        }


@register_objective
@dataclass(frozen=True, kw_only=True, config=STRICT)
class DensityTarget(Objective):
    """A weight that grows while more of the FFN is active than wanted, and shrinks while less is (ReMoE, DECO).

    After each step it is multiplied by `factor` if the mean of `statistic` over layers and tokens of the whole batch,
    in percent, exceeds round(100 * target, 2), else divided by it, but never below `floor`.

    Source: ReMoE (arXiv 2412.14711), section 3.3, with the constants of BlockFFN's baseline (arXiv 2507.08771); DECO's
    released code (arXiv 2605.10933).
    """

    kind: Literal["density_target"] = "density_target"
    """Objective kind."""
    loss: str
    """Name of the model's auxiliary loss."""
    target: float
    """Wanted share of the FFN that a token activates, k / experts; in (0, 1)."""
    statistic: str = "ffn_density"
    """Statistic of the layers that is steered; layers without it do not count."""
    weight: float = 1e-8
    """Weight at the start; above 0."""
    floor: float | None = None
    """Smallest weight, above 0 and at most `weight`; None: where it started."""
    factor: float = 1.05
    """Change of the weight in a step, above 1; short runs need a larger one."""
    decimals: int | None = None
    """Decimals that the percentage is rounded to before it is compared (DECO: 2); None: it is not rounded."""

    def __post_init__(self):
        name = "train.objectives"
        require(0 < self.target < 1, f"{name}.target", self.target, "must be above 0 and below 1")
        require(self.weight > 0, f"{name}.weight", self.weight, "must be above 0")
        allowed = f"must be above 0 and at most the weight at the start ({self.weight:g}), or None"
        require(self.floor is None or 0 < self.floor <= self.weight, f"{name}.floor", self.floor, allowed)
        require(self.factor > 1, f"{name}.factor", self.factor, "must be above 1")
        decimals = self.decimals
        require(decimals is None or 0 <= decimals <= 4, f"{name}.decimals", decimals, "must be from 0 to 4, or None")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.statistic,)

    def init(self) -> dict[str, jax.Array]:
        return {"weight": jnp.float32(self.weight)}

    def coefficient(self, state: Any, step: jax.Array) -> jax.Array:
        return state["weight"]

    def update(self, state: Any, metrics: Mapping[str, jax.Array], step: jax.Array) -> Any:
        active = 100 * jnp.nanmean(metrics[self.statistic])
        active = active if self.decimals is None else jnp.round(active, self.decimals)
        weight = state["weight"]
        less = jnp.maximum(weight / self.factor, self.weight if self.floor is None else self.floor)
        return {"weight": jnp.where(active > round(100 * self.target, 2), weight * self.factor, less)}


@register_objective
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Deft(Objective):
    """A constant weight on the mean of a^2 / (a^2 + eps) over activations a, whose eps falls (DEFT, arXiv 2402.01911).

    eps falls geometrically from `eps` at step `anneal_start` to `final_eps` at step `anneal_end`. The published loss
    has one eps, 1e-7, for fine-tuning: its gradient, at most 0.65 / sqrt(eps), then reaches only what is nearly 0. From
    scratch, eps begins at the square of a typical activation, so that all of them feel it at first.
    """

    kind: Literal["deft"] = "deft"
    """Objective kind."""
    loss: Literal["smooth_density"] = "smooth_density"
    """Name of the model's auxiliary loss; gated and plain FFNs return it."""
    weight: float = 1.0
    """Its weight, at least 0."""
    eps: float = 1e-2
    """eps at the start, at least `final_eps`: the square of a typical activation."""
    final_eps: float = 1e-6
    """eps in the end, at least 1e-12."""
    anneal_start: int = 0
    """Step at which eps begins to fall."""
    anneal_end: int
    """Step from which eps is `final_eps`; above `anneal_start`."""

    def __post_init__(self):
        name = "train.objectives"
        require(self.weight >= 0, f"{name}.weight", self.weight, "must be at least 0")
        require(self.final_eps >= 1e-12, f"{name}.final_eps", self.final_eps, "must be at least 1e-12")
        allowed = f"must be at least final_eps ({self.final_eps})"
        require(self.eps >= self.final_eps, f"{name}.eps", self.eps, allowed)
        require(self.anneal_start >= 0, f"{name}.anneal_start", self.anneal_start, "must be at least 0")
        allowed = f"must be above anneal_start ({self.anneal_start})"
        require(self.anneal_end > self.anneal_start, f"{name}.anneal_end", self.anneal_end, allowed)

    def coefficient(self, state: Any, step: jax.Array) -> jax.Array:
        return jnp.float32(self.weight)

    def arguments(self, step: jax.Array) -> dict[str, jax.Array]:
        t = jnp.asarray(step, jnp.float32)
        u = jnp.clip((t - self.anneal_start) / (self.anneal_end - self.anneal_start), 0.0, 1.0)
        return {"density_eps": self.eps * jnp.float32(self.final_eps / self.eps) ** u}


def call_arguments(objectives: Sequence[Objective], step: jax.Array) -> dict[str, jax.Array]:
    """What the objectives add to the model's call at this step."""
    return {name: value for objective in objectives for name, value in objective.arguments(step).items()}


def check_objectives(objectives: Sequence[Objective], losses: Sequence[str], statistics: Sequence[str]) -> None:
    """Raise `ConfigError` if an objective names none of the model's losses, or reads none of its statistics."""
    known, counted = (", ".join(sorted(names)) or "none" for names in (losses, statistics))
    for objective in objectives:
        if objective.loss not in losses:
            raise ConfigError("train.objectives.loss", objective.loss, f"the model's auxiliary losses are: {known}")
        for name in objective.reads:
            if name not in statistics:
                raise ConfigError("train.objectives.statistic", name, f"the model's statistics are: {counted}")
