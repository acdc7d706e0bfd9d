"""What a train step needs before it is compiled: shapes, shardings and the jitted function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.errors import require
from sparsezoo_jax.evaluation.cross_entropy import model_loss
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.objectives import check_objectives
from sparsezoo_jax.training.optimizer import build_optimizer
from sparsezoo_jax.training.state import (
    Build,
    ModelTemplate,
    Placement,
    TrainState,
    initial_state,
    state_shardings,
)
from sparsezoo_jax.training.step import Batch, build_train_step

#: Arrays [B, T] of a batch.
BATCH_DTYPES = {
    "tokens": jnp.int32,
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


def prepare_step(
    config: TrainConfig, build: Build, batch_shape: tuple[int, int], place: Placement, *, by_layer: bool = False
) -> PreparedStep:
    """Trace the model and place its state; the mesh, if any, has to be active when the step itself is traced.

    Args:
      batch_shape: (B, T) of a global batch.
      place: from the logical axes and shape of an array to its sharding.
      by_layer: also prepare `detailed_step`.

    Raises:
      ConfigError: an objective for a loss, or a group for parameters, that the model does not have; an accumulation
        that does not divide B.
    """
    template = ModelTemplate(build)
    optimizer = build_optimizer(config, template.parameters)
    initialise = partial(initial_state, template, build, optimizer, config.objectives)
    abstract = jax.eval_shape(initialise, jax.random.key(config.seed))
    _check(config, template, abstract, batch_shape)
    shardings = state_shardings(template, abstract, place)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
    )
    batch_sharding = place(("batch", "length"), batch_shape)
    batch = {
        name: jax.ShapeDtypeStruct(batch_shape, dtype, sharding=batch_sharding) for name, dtype in BATCH_DTYPES.items()
    }
    train_step = jax.jit(
        build_train_step(config, template, optimizer), donate_argnums=0, out_shardings=(shardings, place((), ()))
    )
    detailed_step = None
    if by_layer:
        detailed = build_train_step(config, template, optimizer, by_layer=True)
        detailed_step = jax.jit(lambda *args: detailed(*args)[1], out_shardings=place((), ()))
    return PreparedStep(template, initialise, abstract, shardings, batch, train_step, detailed_step)


def _check(config: TrainConfig, template: ModelTemplate, abstract: TrainState, batch_shape: tuple[int, int]) -> None:
    """Raise `ConfigError` for what can be found out without computing anything."""
    batch_size, count = batch_shape[0], config.accumulation
    require(batch_size % count == 0, "train.accumulation", count, f"must divide data.batch_size={batch_size}")
    shape = (batch_size // count, batch_shape[1])
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in BATCH_DTYPES.items()}

    def returned(params: Any, model_state: Any, batch: Batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        model = template.merge(params, model_state)
        model.train()
        out = model_loss(model, batch, config.loss_chunk)[2]
        return out.losses, out.stats

    if config.objectives:
        losses, statistics = jax.eval_shape(returned, abstract.params, abstract.model_state, batch)
        check_objectives(config.objectives, list(losses), list(statistics))
