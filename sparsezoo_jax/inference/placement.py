"""Where a model that generates, and its cache, lie on a mesh."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from sparsezoo_jax.models.cache import SublayerCaches
from sparsezoo_jax.sharding import named_sharding


def state_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """The sharding of each variable by the names of its dimensions; all of it is everywhere where there are none."""
    place = named_sharding(mesh)

    def of_variable(variable: Any) -> Any:
        value = variable.get_value()
        axes = tuple(variable.get_metadata().get("axes") or ())
        return variable.replace(place((None,) * (value.ndim - len(axes)) + axes, value.shape))

    return nnx.from_flat_state([(path, of_variable(variable)) for path, variable in nnx.to_flat_state(state)])


def cache_shardings(cache: Any, mesh: Mesh) -> Any:
    """The same of the arrays of a `DecoderCache`, in its structure."""
    place = named_sharding(mesh)

    def of_layer(held: Any) -> Any:
        if isinstance(held, SublayerCaches):
            return SublayerCaches(*map(of_layer, held))
        return jax.tree.map(lambda x: place(held.axes, x.shape), held)

    layers = map(of_layer, cache.layers)
    positions, end = (place(("batch", None)[: x.ndim], x.shape) for x in (cache.positions_BS, cache.end))
    router = None if cache.pre_gate is None else cache_shardings(cache.pre_gate, mesh)
    return type(cache)(tuple(layers), positions, end, router)
