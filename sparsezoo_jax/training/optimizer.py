"""Optimizers as optax transformations whose learning rate is a function of the train step counter.

`update` takes the counter as the extra argument `step=`, so that a resumed state has no second counter to agree with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.training.config import Adafactor, AdamW, Muon, ParameterGroup, TrainConfig
from sparsezoo_jax.training.schedules import build_schedule
from sparsezoo_jax.training.state import PureDict, Variable, map_with_path


class MatrixAxes(NamedTuple):
    """Dimensions of one parameter by role, negative indices."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def _roles(variable: Variable) -> list[tuple[int, ...]]:
    """Dimensions of one unstacked parameter, as negative indices: no leading axis of experts, head axes taken together.

    ('heads', 'head_dim', 'embed') is a matrix of two roles, ('heads', 'head_dim') a vector of one.
    """
    axes = variable.full_axes if variable.axes is None else variable.axes
    roles: list[tuple[int, ...]] = []
    previous_is_head = False
    for position, name in enumerate(axes):
        index, is_head = position - len(axes), name is not None and "head" in name
        if position == 0 and name == "experts":
            continue
        if is_head and previous_is_head:
            roles[-1] = (*roles[-1], index)
        else:
            roles.append((index,))
        previous_is_head = is_head
    return roles


def is_matrix(variable: Variable) -> bool:
    """Whether a parameter of one layer (and expert) is a matrix rather than a vector or a scalar."""
    return len(_roles(variable)) >= 2


def is_embedding(variable: Variable) -> bool:
    """Whether a parameter is a token embedding, a position embedding or an output head."""
    return bool({"vocab", "positions"} & set(variable.axes or ()))


def matrix_axes(variable: Variable) -> MatrixAxes | None:
    """Input and output dimensions for Muon; None for what AdamW updates: embeddings, vectors, unnamed tensors."""
    roles = _roles(variable)
    if variable.axes is None or is_embedding(variable) or len(roles) != 2:
        return None
    return MatrixAxes(*roles)


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

    match optimizer:
        case AdamW():
            direction = _adam(optimizer)
        case Muon():
            direction = _muon(optimizer, parameters)
        case Adafactor():
            direction = _adafactor(optimizer, parameters)
        case _:
            assert_never(optimizer)
    return optax.chain(
        direction,
        _stateless(lambda path, u, p: u + decay_of(path) * p.astype(u.dtype)),
        _scale_by_schedule(build_schedule(config.schedule, config.steps), multiplier_of),
    )


def _adam(config: AdamW | Muon) -> optax.GradientTransformation:
    dtype = jnp.dtype(config.first_moment_dtype)
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=dtype)


def _muon(config: Muon, parameters: Mapping[str, Variable]) -> optax.GradientTransformation:
    axes = {path: matrix_axes(variable) for path, variable in parameters.items()}

    def dimension_numbers(updates: Any) -> Any:
        # Called on the masked tree of optax.partition: AdamW's parameters are absent from it. Stacked layers and
        # experts are named neither input nor output, so each of their matrices is orthogonalised by itself.
        def numbers(path: str, leaf: jax.Array) -> MuonDimensionNumbers:
            found = axes[path]
            assert found is not None
            return MuonDimensionNumbers(*(tuple(i % leaf.ndim for i in role) for role in found))

        return map_with_path(numbers, updates)

    def rescale(path: str, update: jax.Array, parameter: jax.Array) -> jax.Array:
        # An orthogonal matrix of n x m has root mean square 1 / sqrt(max(n, m)).
        found = axes[path]
        assert found is not None
        sides = [math.prod(parameter.shape[i] for i in role) for role in found]
        return update * (config.update_rms * max(sides) ** 0.5)

    matrices = optax.chain(
        scale_by_muon(
            ns_steps=config.newton_schulz_steps,
            beta=config.momentum,
            mu_dtype=jnp.dtype(config.first_moment_dtype),
            weight_dimension_numbers=dimension_numbers,
        ),
        _stateless(rescale),
    )
    return optax.partition(
        {"muon": matrices, "adamw": _adam(config)},
        lambda params: map_with_path(lambda path, _: "adamw" if axes[path] is None else "muon", params),
    )


def _adafactor(config: Adafactor, parameters: Mapping[str, Variable]) -> optax.GradientTransformation:
    # optax.adafactor takes root mean squares over whole arrays; these are per layer: stacking layers changes nothing.
    def rms(path: str, x: jax.Array) -> jax.Array:
        unstacked = len(parameters[path].axes or parameters[path].shape)
        return jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(range(-unstacked, 0)), keepdims=True))

    def clip(path: str, update: jax.Array, parameter: jax.Array) -> jax.Array:
        return update / jnp.maximum(1.0, rms(path, update) / config.clip_threshold)

    def scale(path: str, update: jax.Array, parameter: jax.Array) -> jax.Array:
        return update * jnp.maximum(rms(path, parameter.astype(update.dtype)), 1e-3)

    parts = [
        optax.scale_by_factored_rms(decay_rate=config.decay_exponent, min_dim_size_to_factor=config.min_factored_size),
        _stateless(clip),
    ]
    if config.scale_by_parameter:
        parts.append(_stateless(scale))
    if config.momentum is not None:
        dtype = jnp.dtype(config.first_moment_dtype)
        parts.append(optax.ema(config.momentum, debias=False, accumulator_dtype=dtype))
    return optax.chain(*parts)


def _stateless(function: Callable[[str, jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """The transformation update <- function(path, update, parameter)."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[PureDict, Any]:
        assert params is not None
        return map_with_path(function, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


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
