"""What a train step needs before it is compiled: shapes, shardings and the jitted function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.errors import require
from sparsezoo_jax.evaluation.cross_entropy import model_loss
from sparsezoo_jax.models.elimination import Predictors
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.lemo import Fitted
from sparsezoo_jax.training.lora import Adapters, adapters_of
from sparsezoo_jax.training.objectives import call_arguments, check_objectives
from sparsezoo_jax.training.optimizer import build_optimizer
from sparsezoo_jax.training.state import (
    Build,
    ModelTemplate,
    Placement,
    PureDict,
    TrainState,
    flatten,
    initial_state,
    nested,
    state_shardings,
)
from sparsezoo_jax.training.step import Batch, Metrics, build_train_step

#: Arrays [B, T] of a batch beside the tokens, which may be more than a number each.
BATCH_DTYPES = {
    "targets": jnp.int32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
    "mask": jnp.bool_,
}


@dataclass(frozen=True)
class PreparedStep:
    """A train step that can be run, or lowered on its abstract arguments; nothing has been allocated."""

    template: ModelTemplate
    """The model without values."""
    initialise: Callable[[jax.Array], TrainState]
    """The first state, from a key; to be jitted with `shardings` for its result."""
    abstract: TrainState
    """Shapes, dtypes and shardings of the state."""
    shardings: TrainState
    """The shardings alone."""
    batch: dict[str, jax.ShapeDtypeStruct]
    """Shapes, dtypes and shardings of a global batch."""
    train_step: Any
    """Jitted (state, batch, loss_limit=None) -> (state, metrics); the state is donated."""
    detailed_step: Any = None
    """Jitted (state, batch, loss_limit=None) -> metrics, norms by layer among them; None unless asked for."""
    adapters: Adapters | None = None
    """What is trained in place of the model's parameters, if anything is."""
    merge: Any = None
    """Jitted (params, frozen) -> the model's parameters; None without adapters."""
    predictors: Predictors | None = None
    """What `step` and `details` give to the jitted functions: networks that choose blocks of tokens; None without."""

    def step(self, *args: Any) -> tuple[TrainState, Metrics]:
        """`train_step` of (state, batch) or (state, batch, loss_limit), with `predictors`."""
        return self.train_step(*args) if self.predictors is None else self.train_step(*args, predictors=self.predictors)

    def details(self, *args: Any) -> Metrics:
        """`detailed_step` in the same way."""
        more = {} if self.predictors is None else {"predictors": self.predictors}
        return self.detailed_step(*args, **more)

    def first_state(self, key: jax.Array) -> TrainState:
        """The state before the first step; what is frozen is left out, to come from `with_base`."""
        shardings = dataclasses.replace(self.shardings, frozen={})
        return jax.jit(lambda key: dataclasses.replace(self.initialise(key), frozen={}), out_shardings=shardings)(key)

    def model(self, state: TrainState) -> Any:
        """The model with the parameters of a state."""
        params = state.params if self.merge is None else self.merge(state.params, state.frozen)
        return self.template.merge(params, state.model_state)

    def with_base(self, state: TrainState, base: PureDict, model_state: PureDict | None = None) -> TrainState:
        """A state whose adapters are beside `base`, all parameters of a model.

        A state before the first step also takes what of `base` trains whole, and the other variables of that model:
        those that are given and belong to no random stream.
        """
        assert self.adapters is not None
        params, frozen = self.adapters.divided(base, state.params)
        if model_state is None:
            return dataclasses.replace(state, frozen=frozen)
        given = {path: x for path, x in flatten(model_state).items() if path not in self.template.streams}
        own = {**flatten(state.model_state), **given}
        return dataclasses.replace(state, params=params, model_state=nested(own), frozen=frozen)


def prepare_step(
    config: TrainConfig,
    build: Build,
    batch_shape: tuple[int, int],
    place: Placement,
    *,
    by_layer: bool = False,
    fitted: Fitted | None = None,
) -> PreparedStep:
    """Trace the model and place its state; the mesh, if any, has to be active when the step itself is traced.

    Args:
      batch_shape: (B, T) of a global batch.
      place: from the logical axes and shape of an array to its sharding.
      by_layer: also prepare `detailed_step`.
      fitted: what `config.lemo` was fitted to, where it needs that.

    Raises:
      ConfigError: an objective for a loss, or a group for parameters, that the model does not have; an accumulation
        that does not divide B.
    """
    template = ModelTemplate(build)
    adapters = adapters_of(config.lora, template.parameters)
    optimizer = build_optimizer(config, template.parameters if adapters is None else adapters.parameters)
    initialise = partial(initial_state, template, build, optimizer, config.objectives, adapters=adapters)
    abstract = jax.eval_shape(initialise, jax.random.key(config.seed))
    _check(config, template, adapters, abstract, batch_shape)
    shardings = state_shardings(template, abstract, place, adapters)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
    )
    batch = abstract_batch(template, batch_shape, place(("batch", "length"), batch_shape))
    allowed = "needs what is fitted before the first step; only a run of its own has that"
    require(fitted is not None or not config.lemo.fits, "train.lemo.scores", config.lemo.scores, allowed)
    elimination = config.lemo.elimination(batch_shape[1], fitted)
    train_step = jax.jit(
        build_train_step(config, template, optimizer, elimination=elimination),
        donate_argnums=0,
        out_shardings=(shardings, place((), ())),
    )
    detailed_step = None
    if by_layer:
        detailed = build_train_step(config, template, optimizer, by_layer=True, elimination=elimination)
        detailed_step = jax.jit(lambda *args, **more: detailed(*args, **more)[1], out_shardings=place((), ()))
    merge = None
    if adapters is not None:
        merge = jax.jit(adapters.merged, out_shardings=adapters.undivided(shardings.params, shardings.frozen))
    predictors = None if fitted is None or fitted.predictors is None else _everywhere(fitted.predictors, place)
    return PreparedStep(
        template, initialise, abstract, shardings, batch, train_step, detailed_step, adapters, merge, predictors
    )


def _everywhere(tree: Any, place: Placement) -> Any:
    """Arrays, or shapes of some, that every device holds."""

    def placed(x: Any) -> Any:
        sharding = place((None,) * len(x.shape), x.shape)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return jax.tree.map(placed, tree)


def abstract_batch(
    template: ModelTemplate, shape: tuple[int, int], sharding: jax.sharding.Sharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch of this shape (B, T), as the model reads them."""
    arrays = {"tokens": ((*shape, *template.token_shape), template.token_dtype)}
    arrays |= {name: (shape, dtype) for name, dtype in BATCH_DTYPES.items()}
    return {name: jax.ShapeDtypeStruct(of, dtype, sharding=sharding) for name, (of, dtype) in arrays.items()}


def _check(
    config: TrainConfig,
    template: ModelTemplate,
    adapters: Adapters | None,
    abstract: TrainState,
    batch_shape: tuple[int, int],
) -> None:
    """Raise `ConfigError` for what can be found out without computing anything."""
    batch_size, count = batch_shape[0], config.accumulation
    require(batch_size % count == 0, "train.accumulation", count, f"must divide data.batch_size={batch_size}")
    shape = (batch_size // count, batch_shape[1])
    batch = abstract_batch(template, shape)

    def returned(state: TrainState, batch: Batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        params = state.params if adapters is None else adapters.undivided(state.params, state.frozen)
        model = template.merge(params, state.model_state)
        model.train()
        arguments = call_arguments(config.objectives, state.step)
        out = model_loss(model, batch, config.loss_chunk, arguments=arguments)[2]
        return out.losses, out.stats

    if config.objectives:
        losses, statistics = jax.eval_shape(returned, abstract, batch)
        check_objectives(config.objectives, list(losses), list(statistics))
