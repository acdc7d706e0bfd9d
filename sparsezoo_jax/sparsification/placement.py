"""Where models, batches and streams of a calibration lie: on the devices of the mesh in use, or on the first device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.inference.placement import state_shardings
from sparsezoo_jax.models.layers import STREAM
from sparsezoo_jax.sharding import device_put, devices_in_use, named_sharding

Model = TypeVar("Model", bound=nnx.Module)


def placed(model: Model) -> Model:
    """The same model, each array split over the mesh as its axes say; as it is without a mesh."""
    mesh = devices_in_use()
    if mesh is None:
        return model
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, state_shardings(state, mesh)))


def batch_on_devices(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays [B, T] of a batch, their sequences split over the devices."""
    mesh = devices_in_use()
    if mesh is None:
        return {name: jnp.asarray(x) for name, x in batch.items()}
    shape = next(iter(batch.values())).shape
    return device_put(batch, sharding=named_sharding(mesh)(("batch", "length"), shape), shape=shape)


def stream_on_devices(x_BTD: np.ndarray) -> jax.Array:
    """A stream [B, T, D] that was read back, where layers leave theirs."""
    mesh = devices_in_use()
    return jnp.asarray(x_BTD) if mesh is None else jax.device_put(x_BTD, named_sharding(mesh)(STREAM, x_BTD.shape))


def like(value: Any, array: jax.Array, dtype: Any = None) -> jax.Array:
    """`value` where `array` lies, in the type of that or in `dtype`."""
    made = np.asarray(value).astype(array.dtype if dtype is None else dtype)
    return jnp.asarray(made) if devices_in_use() is None else jax.device_put(made, array.sharding)
