"""Small classifiers of images that differ in kernel size, activation and weight sparsity, to be attacked and parsed.

Shapes: S seeds, P sparsities, N images, H rows, W columns, C channels, K rows of a kernel, D channels out, Y classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsezoo_jax.errors import require
from sparsezoo_jax.training.state import ModelTemplate, flatten, map_with_path

#: What the paper's victims differ in (arXiv 2303.07474).
KERNEL_SIZES = (3, 5, 7)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": jax.nn.relu, "tanh": jnp.tanh, "elu": jax.nn.elu}
SPARSITIES = (0.0, 0.375, 0.625)


class Convolution(nnx.Module):
    """A convolution of stride 1 with zeros around the image, as one product of its patches.

    XLA has no fast form on CPUs for the gradients of convolutions inside of loops or of many networks at once.
    """

    def __init__(self, size: int, channels: int, out: int, *, rngs: nnx.Rngs):
        self.size = size
        fan_in = size * size * channels
        weight = jax.random.normal(rngs.params(), (fan_in, out)) * math.sqrt(2 / fan_in)
        self.weight = nnx.Param(weight)
        self.bias = nnx.Param(jnp.zeros(out))

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H, W, D]."""
        height, width = x_NHWC.shape[1:3]
        edge = self.size // 2
        around = jnp.pad(x_NHWC, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        rows = jnp.concatenate([around[:, i : i + height] for i in range(self.size)], axis=-1)
        patches = jnp.concatenate([rows[:, :, j : j + width] for j in range(self.size)], axis=-1)
        return patches @ self.weight[...] + self.bias[...]


def pooled(x_NHWC: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels: [N, H, W, C] -> [N, H/2, W/2, C]."""
    n, height, width, channels = x_NHWC.shape
    return x_NHWC.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class Victim(nnx.Module):
    """Two convolutions, each with an activation and pooling, and a linear map to classes."""

    def __init__(
        self,
        kernel_size: int,
        activation: str,
        shape: tuple[int, int, int],
        classes: int,
        widths: tuple[int, int] = (8, 16),
        *,
        rngs: nnx.Rngs,
    ):
        require(kernel_size in KERNEL_SIZES, "kernel_size", kernel_size, f"must be one of {KERNEL_SIZES}")
        require(activation in ACTIVATIONS, "activation", activation, f"must be one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        height, width, channels = shape
        self.convolutions = nnx.List(
            [
                Convolution(kernel_size, channels, widths[0], rngs=rngs),
                Convolution(kernel_size, widths[0], widths[1], rngs=rngs),
            ]
        )
        self.out = nnx.Linear(height // 4 * (width // 4) * widths[1], classes, rngs=rngs)

    def __call__(self, images_NHWC: jax.Array) -> jax.Array:
        """Scores [N, Y] of images from 0 to 1."""
        x = 4 * (images_NHWC - 0.5)
        for convolution in self.convolutions:
            x = pooled(self.activation(convolution(x)))
        return self.out(x.reshape(len(x), -1))


class Victims(NamedTuple):
    """Victims of one kernel size and activation."""

    template: ModelTemplate
    params: Any
    """Parameters, each [S, P, ...]."""
    variables: Any
    """What else one of them has: the same of all."""

    def scores(self, params: Any, images_NHWC: jax.Array) -> jax.Array:
        """Scores [N, Y] of one of them."""
        return self.template.merge(params, self.variables)(images_NHWC)


def pruned(params: Any, sparsity: float | jax.Array) -> Any:
    """Parameters with the smallest weights 0: of each map round(`sparsity` * its weights), of biases none."""

    def of(_: str, values: jax.Array) -> jax.Array:
        if values.ndim < 2:
            return values
        rank = jnp.argsort(jnp.argsort(jnp.abs(values).reshape(-1))).reshape(values.shape)
        return jnp.where(rank < jnp.round(sparsity * values.size), 0, values)

    return map_with_path(of, params)


def train_victims(
    kernel_size: int,
    activation: str,
    sparsities: Sequence[float],
    seeds: Sequence[int],
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    steps: int,
    tuning_steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
) -> Victims:
    """A dense network for each seed, and of it a victim for each sparsity: pruned and then trained on for
    `tuning_steps`, the dense one too. What is 0 stays 0.

    Args:
      kernel_size: one of `KERNEL_SIZES`.
      activation: one of `ACTIVATIONS`.
      sparsities: shares of each map's weights that are 0.
      seeds: of the start and of the order of images.
      images_NHWC: float, from 0 to 1.
      labels_N: their classes.
      steps: of the dense network.
      tuning_steps: of each victim.
      batch_size: images of a step.
      learning_rate: Adam's at first, falling to 0 as a cosine over `steps` and again, from a third, over
        `tuning_steps`.

    Raises:
      ConfigError: there is no such kernel size, activation or sparsity.
    """
    for sparsity in sparsities:
        require(0 <= sparsity < 1, "sparsity", sparsity, "must be from 0 to below 1")
    _, height, width, channels = images_NHWC.shape
    shape, classes = (height, width, channels), int(labels_N.max()) + 1
    template = ModelTemplate(lambda rngs: Victim(kernel_size, activation, shape, classes, rngs=rngs))
    images, labels = jnp.asarray(images_NHWC), jnp.asarray(labels_N)
    _, variables = template.split(Victim(kernel_size, activation, shape, classes, rngs=nnx.Rngs(0)))
    found = Victims(template, None, variables)

    def loss(params: Any, chosen: jax.Array) -> jax.Array:
        scores = found.scores(params, images[chosen])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels[chosen]))

    def trained(params: Any, key: jax.Array, count: int, rate: float, is_kept: Any) -> Any:
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, count))

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, moments = carry
            chosen = jax.random.randint(key, (batch_size,), 0, len(images))
            gradients = jax.tree.map(jnp.multiply, jax.grad(loss)(params, chosen), is_kept)
            updates, moments = optimizer.update(gradients, moments)
            return (optax.apply_updates(params, updates), moments), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, count))
        return params

    def of_seed(seed: jax.Array) -> Any:
        key = jax.random.key(seed)
        start, _ = template.split(Victim(kernel_size, activation, shape, classes, rngs=nnx.Rngs(key)))
        all_kept = jax.tree.map(jnp.ones_like, start)
        dense = trained(start, jax.random.fold_in(key, 1), steps, learning_rate, all_kept)

        def of_sparsity(sparsity: jax.Array) -> Any:
            params = pruned(dense, sparsity)
            is_kept = map_with_path(lambda _, v: (v != 0) | (v.ndim < 2), params)
            return trained(params, jax.random.fold_in(key, 2), tuning_steps, learning_rate / 3, is_kept)

        return jax.lax.map(of_sparsity, jnp.asarray(sparsities))

    params = jax.jit(partial(jax.lax.map, of_seed))(jnp.asarray(seeds))
    return found._replace(params=params)


def weight_sparsities(victims: Victims) -> np.ndarray:
    """Shares of the weights of maps that are 0, over all maps: float [S, P]."""
    maps = [np.asarray(values) for values in flatten(victims.params).values() if values.ndim >= 4]
    rows = [values.reshape(*values.shape[:2], -1) for values in maps]
    return np.mean(np.concatenate(rows, axis=-1) == 0, axis=-1)
