"""Optimizers: each kind's configuration, and the direction that it makes of a gradient as an optax transformation."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.registry import Kind, Registry
from sparsezoo_jax.training.state import PureDict, Variable, map_with_path

MomentDType = Literal["float32", "bfloat16"]


class OptimizerKind(Kind):
    """An optimizer: what a gradient becomes before decay, learning rate and clipping, which all kinds share."""

    weight_decay: float
    """Decay of matrices; vectors and scalars do not decay."""
    decay_embeddings: bool
    """Whether token embeddings and the output head decay, too."""

    @abc.abstractmethod
    def direction(self, parameters: Mapping[str, Variable]) -> optax.GradientTransformation:
        """The transformation of gradients, nested dicts whose paths are the keys of `parameters`.

        Layers of one kind are stacked along leading axes that `Variable.axes` does not name.
        """


OPTIMIZERS: Registry[OptimizerKind] = Registry("train.optimizer", OptimizerKind)
register_optimizer = OPTIMIZERS.register
OptimizerConfig = Annotated[OptimizerKind, OPTIMIZERS]


class MatrixAxes(NamedTuple):
    """Dimensions of one parameter by role, negative indices."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def matrix_roles(variable: Variable) -> list[tuple[int, ...]]:
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
    return len(matrix_roles(variable)) >= 2


def is_embedding(variable: Variable) -> bool:
    """Whether a parameter is a token embedding, a position embedding or an output head."""
    return bool({"vocab", "positions"} & set(variable.axes or ()))


def matrix_axes(variable: Variable) -> MatrixAxes | None:
    """Input and output dimensions for Muon; None for what AdamW updates: embeddings, vectors, unnamed tensors."""
    roles = matrix_roles(variable)
    if variable.axes is None or is_embedding(variable) or len(roles) != 2:
        return None
    return MatrixAxes(*roles)


def _check_adam(config: AdamW | Muon) -> None:
    for name in ("b1", "b2"):
        value = getattr(config, name)
        require(0 <= value < 1, f"train.optimizer.{name}", value, "must be at least 0 and below 1")
    require(config.eps > 0, "train.optimizer.eps", config.eps, "must be above 0")
    require(config.weight_decay >= 0, "train.optimizer.weight_decay", config.weight_decay, "must be at least 0")


@register_optimizer
@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdamW(OptimizerKind):
    """Adam with decoupled weight decay (arXiv 1711.05101); the decay is multiplied by the learning rate."""

    kind: Literal["adamw"] = "adamw"
    """Optimizer kind."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices; vectors and scalars do not decay."""
    decay_embeddings: bool = False
    """Whether token embeddings and the output head decay, too."""
    first_moment_dtype: MomentDType = "float32"
    """Storage type of the first moment."""

    def __post_init__(self):
        _check_adam(self)

    def direction(self, parameters: Mapping[str, Variable]) -> optax.GradientTransformation:
        return _adam(self)


@register_optimizer
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Muon(OptimizerKind):
    """Muon for matrices (arXiv 2502.16982), AdamW at the same learning rate for embeddings, output head and vectors."""

    kind: Literal["muon"] = "muon"
    """Optimizer kind."""
    momentum: float = 0.95
    """Decay rate of Muon's Nesterov momentum."""
    newton_schulz_steps: int = 5
    """Newton-Schulz iterations of the orthogonalisation."""
    update_rms: float = 0.2
    """Root mean square of an update in units of the learning rate; 0.2 matches AdamW's, so its rates can be reused."""
    b1: float = 0.9
    """AdamW: decay rate of the first moment."""
    b2: float = 0.95
    """AdamW: decay rate of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices; vectors and scalars do not decay."""
    decay_embeddings: bool = False
    """Whether token embeddings and the output head decay, too."""
    first_moment_dtype: MomentDType = "float32"
    """Storage type of both momenta."""

    def __post_init__(self):
        _check_adam(self)
        require(0 <= self.momentum < 1, "train.optimizer.momentum", self.momentum, "must be at least 0 and below 1")
        steps = self.newton_schulz_steps
        require(steps > 0, "train.optimizer.newton_schulz_steps", steps, "must be above 0")
        require(self.update_rms > 0, "train.optimizer.update_rms", self.update_rms, "must be above 0")

    def direction(self, parameters: Mapping[str, Variable]) -> optax.GradientTransformation:
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
            return update * (self.update_rms * max(sides) ** 0.5)

        matrices = optax.chain(
            scale_by_muon(
                ns_steps=self.newton_schulz_steps,
                beta=self.momentum,
                mu_dtype=jnp.dtype(self.first_moment_dtype),
                weight_dimension_numbers=dimension_numbers,
            ),
            stateless(rescale),
        )
        return optax.partition(
            {"muon": matrices, "adamw": _adam(self)},
            lambda params: map_with_path(lambda path, _: "adamw" if axes[path] is None else "muon", params),
        )


@register_optimizer
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Adafactor(OptimizerKind):
    """Adafactor with factored second moments (arXiv 1804.04235) and an explicit learning rate."""

    kind: Literal["adafactor"] = "adafactor"
    """Optimizer kind."""
    momentum: float | None = None
    """Decay rate of the first moment; None keeps none."""
    decay_exponent: float = 0.8
    """The second moment decays at rate 1 - t^-decay_exponent."""
    clip_threshold: float = 1.0
    """Largest root mean square of a parameter's update, per layer."""
    scale_by_parameter: bool = False
    """Multiply each update by the root mean square of its parameter (then learning rates near 1e-2 are usual)."""
    min_factored_size: int = 128
    """Matrices with a side below this keep a full second moment."""
    weight_decay: float = 0.0
    """Decay of matrices; vectors and scalars do not decay."""
    decay_embeddings: bool = False
    """Whether token embeddings and the output head decay, too."""
    first_moment_dtype: MomentDType = "float32"
    """Storage type of the first moment."""

    def __post_init__(self):
        name = "train.optimizer"
        if self.momentum is not None:
            require(0 <= self.momentum < 1, f"{name}.momentum", self.momentum, "must be at least 0 and below 1")
        require(self.decay_exponent > 0, f"{name}.decay_exponent", self.decay_exponent, "must be above 0")
        require(self.clip_threshold > 0, f"{name}.clip_threshold", self.clip_threshold, "must be above 0")
        require(self.min_factored_size > 0, f"{name}.min_factored_size", self.min_factored_size, "must be above 0")
        require(self.weight_decay >= 0, f"{name}.weight_decay", self.weight_decay, "must be at least 0")

    def direction(self, parameters: Mapping[str, Variable]) -> optax.GradientTransformation:
        # optax.adafactor takes root mean squares over whole arrays. These are per layer: stacking changes nothing.
        def rms(path: str, x: jax.Array) -> jax.Array:
            unstacked = len(parameters[path].axes or parameters[path].shape)
            return jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(range(-unstacked, 0)), keepdims=True))

        def clip(path: str, update: jax.Array, parameter: jax.Array) -> jax.Array:
            return update / jnp.maximum(1.0, rms(path, update) / self.clip_threshold)

        def scale(path: str, update: jax.Array, parameter: jax.Array) -> jax.Array:
            return update * jnp.maximum(rms(path, parameter.astype(update.dtype)), 1e-3)

        parts = [
            optax.scale_by_factored_rms(decay_rate=self.decay_exponent, min_dim_size_to_factor=self.min_factored_size),
            stateless(clip),
        ]
        if self.scale_by_parameter:
            parts.append(stateless(scale))
        if self.momentum is not None:
            dtype = jnp.dtype(self.first_moment_dtype)
            parts.append(optax.ema(self.momentum, debias=False, accumulator_dtype=dtype))
        return optax.chain(*parts)


def _adam(config: AdamW | Muon) -> optax.GradientTransformation:
    dtype = jnp.dtype(config.first_moment_dtype)
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=dtype)


def stateless(function: Callable[[str, jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """The transformation update <- function(path, update, parameter)."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[PureDict, Any]:
        assert params is not None
        return map_with_path(function, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
