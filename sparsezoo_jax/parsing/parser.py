"""A small convolutional network that tells a victim's attributes from perturbations that were made against it.

Shapes: N perturbations, H rows, W columns, C channels, Y classes of an attribute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsezoo_jax.errors import require
from sparsezoo_jax.parsing.victims import Convolution, pooled
from sparsezoo_jax.training.state import ModelTemplate


def standardised(changes_NHWC: np.ndarray) -> np.ndarray:
    """Perturbations float32 [N, H, W, C] with a root mean square of 1 each, so that their sizes tell nothing; those
    that are 0 stay so.
    """
    changes = changes_NHWC.astype(np.float32)
    rms = np.sqrt(np.mean(np.square(changes), axis=(1, 2, 3), keepdims=True))
    return np.divide(changes, rms, out=np.zeros_like(changes), where=rms > 0)


class Parser(nnx.Module):
    """Four blocks of a 3 x 3 convolution, layer norm over channels, ReLU and pooling, and a linear map an attribute."""

    blocks = 4

    def __init__(self, shape: tuple[int, int, int], classes: Mapping[str, int], width: int = 32, *, rngs: nnx.Rngs):
        height, width_pixels, channels = shape
        scale = 2**self.blocks
        require(height % scale == 0 == width_pixels % scale, "shape", shape, f"sides must be multiples of {scale}")
        into = (channels, *[width] * (self.blocks - 1))
        self.convolutions = nnx.List([Convolution(3, size, width, rngs=rngs) for size in into])
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in into])
        features = height // scale * (width_pixels // scale) * width
        self.heads = nnx.Dict({name: nnx.Linear(features, count, rngs=rngs) for name, count in classes.items()})

    def __call__(self, changes_NHWC: jax.Array) -> dict[str, jax.Array]:
        """Scores [N, Y] by attribute, of standardised perturbations."""
        x = changes_NHWC
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = pooled(jax.nn.relu(norm(convolution(x))))
        x = x.reshape(len(x), -1)
        return {name: head(x) for name, head in self.heads.items()}


class TrainedParser(NamedTuple):
    """A parser and how to ask it."""

    template: ModelTemplate
    params: Any
    variables: Any

    def tell(self, changes_NHWC: np.ndarray, batch_size: int = 512) -> dict[str, np.ndarray]:
        """The likeliest class of each attribute, int [N]."""

        @jax.jit
        def scores(params: Any, x: jax.Array) -> dict[str, jax.Array]:
            return {name: jnp.argmax(of, axis=1) for name, of in self.template.merge(params, self.variables)(x).items()}

        count = len(changes_NHWC)
        padded = np.pad(standardised(changes_NHWC), ((0, -count % batch_size), (0, 0), (0, 0), (0, 0)))
        told = [scores(self.params, padded[i : i + batch_size]) for i in range(0, len(padded), batch_size)]
        return {name: np.concatenate([np.asarray(part[name]) for part in told])[:count] for name in told[0]}


def train_parser(
    changes_NHWC: np.ndarray,
    labels: Mapping[str, np.ndarray],
    *,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    width: int = 32,
    seed: int = 0,
) -> TrainedParser:
    """A parser of these perturbations, trained with Adam on the sum of its attributes' cross-entropies.

    Args:
      changes_NHWC: perturbations, standardised here.
      labels: by attribute the class of each, int [N].
      steps: of training.
      batch_size: perturbations of a step.
      learning_rate: at first; it falls to 0 as a cosine.
      width: channels of the convolutions.
      seed: of the start and of the order of perturbations.

    Raises:
      ConfigError: sides are no multiples of 16.
    """
    _, height, pixels, channels = changes_NHWC.shape
    classes = {name: int(values.max()) + 1 for name, values in labels.items()}

    def build(rngs: nnx.Rngs) -> Parser:
        return Parser((height, pixels, channels), classes, width, rngs=rngs)

    template = ModelTemplate(build)
    params, variables = template.split(build(nnx.Rngs(seed)))
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(params: Any, x: jax.Array, truth: Mapping[str, jax.Array]) -> jax.Array:
        scores = template.merge(params, variables)(x)
        each = (optax.softmax_cross_entropy_with_integer_labels(scores[name], truth[name]) for name in classes)
        return sum((jnp.mean(losses) for losses in each), jnp.zeros(()))

    @jax.jit
    def step(params: Any, moments: Any, x: jax.Array, truth: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        updates, moments = optimizer.update(jax.grad(loss)(params, x, truth), moments)
        return optax.apply_updates(params, updates), moments

    x, moments = standardised(changes_NHWC), optimizer.init(params)
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = draw.integers(0, len(x), batch_size)
        params, moments = step(params, moments, x[chosen], {name: labels[name][chosen] for name in classes})
    return TrainedParser(template, params, variables)
