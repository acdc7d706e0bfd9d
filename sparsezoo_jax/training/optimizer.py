"""The optimizer of a run: a kind's direction, decay, groups, and a rate that is a function of the train step counter.

`update` takes the counter as the extra argument `step=`, so that a resumed state has no second counter to agree with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.training.config import ParameterGroup, TrainConfig
from sparsezoo_jax.training.optimizers import is_embedding, is_matrix, stateless
from sparsezoo_jax.training.schedules import build_schedule
from sparsezoo_jax.training.state import PureDict, Variable, map_with_path


def group_of(path: str, groups: tuple[ParameterGroup, ...]) -> int | None:
    """Index of the first group whose pattern is found in the path."""
    return next((i for i, group in enumerate(groups) if re.search(group.pattern, path)), None)


def check_groups(config: TrainConfig, parameters: Mapping[str, Variable]) -> None:
    """Raise `ConfigError` if a group gets no parameter."""
    used = {group_of(path, config.groups) for path in parameters}
    for i, group in enumerate(config.groups):
        if i not in used:
            allowed = f"matches no parameter that an earlier group left; paths are {', '.join(sorted(parameters))}"
            raise ConfigError("train.groups.pattern", group.pattern, allowed)


def build_optimizer(config: TrainConfig, parameters: Mapping[str, Variable]) -> optax.GradientTransformationExtraArgs:
    """The optimizer of `config.optimizer`, with schedule, weight decay and parameter groups.

    `update(gradients, state, params, step=step)` works on nested dicts whose paths are the keys of `parameters`.
    Decay is decoupled and multiplied by the learning rate. Clipping is `clip_gradients`.

    Raises:
      ConfigError: a group that matches no parameter.
    """
    check_groups(config, parameters)
    optimizer, groups = config.optimizer, config.groups

    def decay_of(path: str) -> float:
        group, variable = group_of(path, groups), parameters[path]
        if group is not None and groups[group].weight_decay is not None:
            return groups[group].weight_decay or 0.0
        decays = is_matrix(variable) and (optimizer.decay_embeddings or not is_embedding(variable))
        return optimizer.weight_decay if decays else 0.0

    def multiplier_of(path: str) -> float:
        group = group_of(path, groups)
        return 1.0 if group is None else groups[group].lr_multiplier

    return optax.chain(
        optimizer.direction(parameters),
        stateless(lambda path, u, p: u + decay_of(path) * p.astype(u.dtype)),
        _scale_by_schedule(build_schedule(config.schedule, config.steps), multiplier_of),
    )


def _scale_by_schedule(
    schedule: Callable[[jax.Array], jax.Array], multiplier_of: Callable[[str], float]
) -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        learning_rate = schedule(extra["step"])
        return map_with_path(lambda path, u: -learning_rate * multiplier_of(path) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def clip_gradients(gradients: PureDict, config: TrainConfig) -> tuple[PureDict, jax.Array]:
    """Gradients clipped to `grad_clip`, groups with an own `clip` to theirs; and the global norm before, float32.

    Parameters in a group with an own clip take no part in the norm that the others are clipped by.
    """
    limits: dict[int | None, float | None] = {None: config.grad_clip}
    limits |= {i: group.clip for i, group in enumerate(config.groups) if group.clip is not None}

    def pool_of(path: str) -> int | None:
        group = group_of(path, config.groups)
        return group if group in limits else None

    sums: dict[int | None, jax.Array] = {pool: jnp.float32(0.0) for pool in limits}

    def add(path: str, gradient: jax.Array) -> None:
        pool = pool_of(path)
        sums[pool] = sums[pool] + jnp.sum(jnp.square(gradient.astype(jnp.float32)))

    map_with_path(add, gradients)
    factors = {
        pool: jnp.float32(1.0) if limit is None else jnp.minimum(1.0, limit / jnp.maximum(jnp.sqrt(sums[pool]), 1e-20))
        for pool, limit in limits.items()
    }
    clipped = map_with_path(lambda path, g: (g * factors[pool_of(path)]).astype(g.dtype), gradients)
    return clipped, jnp.sqrt(sum(sums.values(), jnp.float32(0.0)))
