"""A network of layers with a fixed number of connections: early convolutions, later layers of units with ages.

Shapes: N images, H rows, W columns, C channels, F features that the early layers make of an image, I inputs and O units
of a later layer.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.continual.config import ContinualConfig
from sparsezoo_jax.errors import require


class Connections(nnx.Variable):
    """Which weights a layer has, bool in the shape of its weights."""


class SparseMap(nnx.Module):
    """A linear map or convolution with some of its weights, and a bias."""

    def __init__(self, shape: tuple[int, ...], density: float, rngs: nnx.Rngs):
        self.density, self.fan_in = density, math.prod(shape[:-1])
        connected = jnp.zeros(math.prod(shape), bool).at[: self.count(shape)].set(True)
        self.connected = Connections(jax.random.permutation(rngs.params(), connected).reshape(shape))
        self.weight = nnx.Param(self.drawn(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(shape[-1]))

    def count(self, shape: tuple[int, ...]) -> int:
        """Weights of that many places that there are."""
        return round(self.density * math.prod(shape))

    def drawn(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Weights as at the start: normal, with the variance that keeps that of a ReLU's inputs (arXiv 1502.01852)."""
        return jax.random.normal(key, shape) * math.sqrt(2 / (self.density * self.fan_in))

    def effective(self) -> jax.Array:
        """The weights, 0 where there is no connection."""
        return jnp.where(self.connected[...], self.weight[...], 0)


class ContinualNetwork(nnx.Module):
    """See `ContinualConfig`; `classes` outputs are for cross-entropy alone."""

    def __init__(self, config: ContinualConfig, image_shape: tuple[int, int, int], classes: int, rngs: nnx.Rngs):
        height, width, channels = image_shape
        halvings = 2 ** len(config.channels)
        whole = height % halvings == 0 and width % halvings == 0
        allowed = f"must be fewer: images of {height} x {width} are no multiples of {halvings}"
        require(whole, "channels", config.channels, allowed)
        sizes = (channels, *config.channels)
        self.early = nnx.List(SparseMap((3, 3, i, o), config.density, rngs) for i, o in itertools.pairwise(sizes))
        self.features = height // halvings * (width // halvings) * sizes[-1]
        sizes = (self.features, *config.widths)
        self.later = nnx.List(SparseMap((i, o), config.density, rngs) for i, o in itertools.pairwise(sizes))
        self.head = SparseMap((sizes[-1], classes), 1.0, rngs) if config.loss == "cross_entropy" else None

    def hidden(self, images: jax.Array) -> jax.Array:
        """What the early layers make of images uint8 [N, H, W, C]: [N, F], at least 0."""
        x = images.astype(jnp.float32) / 255
        for layer in self.early:
            x = jax.lax.conv_general_dilated(
                x, layer.effective(), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = nnx.max_pool(jax.nn.relu(x + layer.bias[...]), (2, 2), strides=(2, 2))
        return x.reshape(len(x), -1)

    def units(self, hidden_NF: jax.Array) -> list[jax.Array]:
        """Activations of each later layer, [N, O]."""
        found = []
        for layer in self.later:
            hidden_NF = jax.nn.relu(hidden_NF @ layer.effective() + layer.bias[...])
            found.append(hidden_NF)
        return found

    def densities(self) -> list[float]:
        """Share of the connections that each layer has, early ones first."""
        return [float(np.mean(np.asarray(layer.connected[...]))) for layer in (*self.early, *self.later)]
