"""The train state, and the split of an nnx model into plain nested dicts of arrays.

Everything outside the model file works on plain dicts whose keys are the parts of a path such as 'segments/0/ffn/up':
optimizer, train step and checkpoints then depend on names and arrays only, not on nnx.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

if TYPE_CHECKING:
    from sparsezoo_jax.training.lora import Adapters

PureDict = dict[str, Any]
Build = Callable[[nnx.Rngs], nnx.Module]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a training run carries from step to step; a pytree of arrays.

    The random streams of a model (dropout, router noise) are nnx variables of it, so they are in `model_state`.
    """

    step: jax.Array
    """Number of steps made, int32; skipped steps count."""
    params: PureDict
    """Trainable parameters."""
    model_state: PureDict
    """Every other variable of the model: router biases, running averages, random streams."""
    opt_state: Any
    """State of the optimizer."""
    objectives: tuple[Any, ...]
    """State of each of the config's objectives, in order."""
    skipped: jax.Array
    """Number of steps skipped because loss or gradient was not finite, int32."""
    consecutive_skipped: jax.Array
    """Number of them since the last good step, int32."""
    frozen: PureDict = field(default_factory=dict)
    """With adapters (`training.lora`) the parameters of another run that don't train, which no checkpoint holds."""


@dataclass(frozen=True)
class Variable:
    """What is known of a variable before it has a value."""

    shape: tuple[int, ...]
    """Shape, stacked layers included."""
    axes: tuple[str | None, ...] | None
    """Logical axis names without stacked layers; None if the model gives none."""

    @property
    def full_axes(self) -> tuple[str | None, ...]:
        """One logical axis name a dimension; stacked layers are 'layers', unnamed dimensions None."""
        axes = (None,) * len(self.shape) if self.axes is None else self.axes
        return ("layers",) * (len(self.shape) - len(axes)) + axes


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by path, the parts of the path joined with '/'."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(flat: Mapping[str, Any]) -> PureDict:
    """Nested dicts by the parts of the path, whatever containers (tuples, optax states) the leaves came from."""
    tree: PureDict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function gets the path, as in `flatten`, before the leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(jax.tree_util.keystr(path, simple=True, separator="/"), *leaves), tree, *rest
    )


def _lookup(tree: PureDict, path: tuple[Any, ...]) -> Any:
    node: Any = tree
    for key in path:
        node = node[str(key)]
    return node


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


class ModelTemplate:
    """Structure of an nnx model without its values: splits models into plain dicts and merges them back."""

    def __init__(self, build: Build):
        """Trace `build` without allocating anything."""
        model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        # Of a model of words a token is one number.
        self.token_shape: tuple[int, ...] = getattr(model, "token_shape", ())
        self.token_dtype = jnp.dtype(getattr(model, "token_dtype", jnp.int32))
        self.graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        self._params, self._rest = nnx.to_flat_state(params), nnx.to_flat_state(rest)

    @property
    def parameters(self) -> dict[str, Variable]:
        """Every trainable parameter by path."""
        return _describe(self._params)

    @property
    def variables(self) -> dict[str, Variable]:
        """Every other variable by path."""
        return _describe(self._rest)

    @property
    def streams(self) -> frozenset[str]:
        """Those of the other variables that belong to random streams."""
        return frozenset("/".join(map(str, path)) for path, v in self._rest if isinstance(v, nnx.RngState))

    def split(self, model: nnx.Module) -> tuple[PureDict, PureDict]:
        """Parameters and other variables of a model, as nested dicts of plain arrays (random keys as their data)."""
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return _pure(params), _pure(rest)

    def merge(self, params: PureDict, model_state: PureDict) -> Any:
        """The model with these values."""
        return nnx.merge(self.graphdef, _filled(self._params, params), _filled(self._rest, model_state))


def _pure(state: Any) -> PureDict:
    def value(variable: Any) -> jax.Array:
        array = variable.get_value()
        return jax.random.key_data(array) if _is_key(array) else array

    return nested({"/".join(map(str, path)): value(variable) for path, variable in nnx.to_flat_state(state)})


def _filled(template: Any, values: PureDict) -> Any:
    def fill(path: tuple[Any, ...], variable: Any) -> Any:
        array, abstract = _lookup(values, path), variable.get_value()
        return variable.replace(
            jax.random.wrap_key_data(array, impl=_key_impl(abstract)) if _is_key(abstract) else array
        )

    return nnx.from_flat_state([(path, fill(path, variable)) for path, variable in template])


def _key_impl(abstract: jax.ShapeDtypeStruct) -> Any:
    # key_impl wants a value of the key type; tracing one gives it without computing anything.
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), abstract)
    return found[0]


def _describe(flat_state: Any) -> dict[str, Variable]:
    found = {}
    for path, variable in flat_state:
        name, axes = "/".join(map(str, path)), variable.get_metadata().get("axes")
        shape = tuple(variable.get_value().shape)
        if axes is not None and len(axes) > len(shape):
            raise ValueError(f"{name} has axes {axes} but shape {shape}")
        found[name] = Variable(shape, None if axes is None else tuple(axes))
    return found


def initial_state(
    template: ModelTemplate,
    build: Build,
    optimizer: Any,
    objectives: tuple[Any, ...],
    seed: jax.Array,
    adapters: Adapters | None = None,
) -> TrainState:
    """The state before the first step; pure, meant to be jitted. `seed` is a jax.random.key."""
    params, model_state = template.split(build(nnx.Rngs(seed)))
    frozen: PureDict = {}
    if adapters is not None:
        params, frozen = adapters.divided(params, adapters.create(jax.random.fold_in(seed, 1)))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        objectives=tuple(objective.init() for objective in objectives),
        skipped=jnp.int32(0),
        consecutive_skipped=jnp.int32(0),
        frozen=frozen,
    )


def initial_variables(template: ModelTemplate, build: Build) -> dict[str, jax.Array]:
    """What a new model has beside its parameters, by path as in `flatten`; no parameter is made."""
    return flatten(jax.jit(lambda key: template.split(build(nnx.Rngs(key)))[1])(jax.random.key(0)))


Placement = Callable[[tuple[str | None, ...], tuple[int, ...]], jax.sharding.Sharding]
"""From the logical axes and the shape of an array (both empty for a scalar) to its sharding."""


def first_device(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """A placement that has everything on the first device."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state_shardings(
    template: ModelTemplate, abstract: TrainState, place: Placement, adapters: Adapters | None = None
) -> TrainState:
    """A sharding for every array of the state: optimizer moments go where their parameter is."""
    described = {**template.parameters, **template.variables, **(adapters.parameters if adapters else {})}

    def of(path: str, leaf: Any) -> jax.sharding.Sharding:
        # 'params/a/b', 'model_state/a/b' and 'opt_state/0/mu/a/b' all end in the variable's path 'a/b'.
        parts = path.split("/")
        for start in range(len(parts)):
            variable = described.get("/".join(parts[start:]))
            if variable is not None and variable.shape == leaf.shape:
                return place(variable.full_axes, leaf.shape)
        return place((None,) * leaf.ndim, leaf.shape)

    return map_with_path(of, abstract)


def parameter_count(template: ModelTemplate) -> int:
    """Number of trainable parameters."""
    return sum(math.prod(variable.shape) for variable in template.parameters.values())
