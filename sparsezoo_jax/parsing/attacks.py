"""Attacks on classifiers of images: small changes of pixels that raise the loss of the right class.

Shapes: N images, H rows, W columns, C channels, Y classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require

Norm = Literal["linf", "l2"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AttackConfig:
    """Ascent on the loss within a ball around an image, and within the range of pixels, which is 0 to 1."""

    norm: Norm
    """'linf' bounds each number of a perturbation and steps by the gradient's signs (FGSM, arXiv 1412.6572, and PGD,
    arXiv 1706.06083); 'l2' bounds the root of the sum of squares over an image and steps along the gradient."""
    radius: float
    """Of the ball, epsilon."""
    steps: int = 1
    step_size: float | None = None
    """Length of a step in the norm. None: the radius."""

    def __post_init__(self):
        require(self.radius > 0, "attack.radius", self.radius, "must be above 0")
        require(self.steps >= 1, "attack.steps", self.steps, "must be at least 1")
        size = self.step_size
        require(size is None or size > 0, "attack.step_size", size, "must be above 0, or none")


#: Balls within the range of arXiv 2303.07474 (4/255 to 16/255, and 0.25 to 1 in l2). Of images of 16 x 16 numbers the
#: two have the same root mean square.
ATTACKS: dict[str, AttackConfig] = {
    "fgsm": AttackConfig(norm="linf", radius=8 / 255),
    "pgd-linf": AttackConfig(norm="linf", radius=8 / 255, steps=10, step_size=2 / 255),
    "pgd-l2": AttackConfig(norm="l2", radius=0.5, steps=10, step_size=0.125),
}


def lengths(x_NHWC: jax.Array) -> jax.Array:
    """l2 norms of images, [N, 1, 1, 1]."""
    return jnp.sqrt(jnp.sum(jnp.square(x_NHWC), axis=(1, 2, 3), keepdims=True))


def ascent(gradients_NHWC: jax.Array, norm: Norm) -> jax.Array:
    """The perturbation of norm 1 along which the loss grows most; 0 where the gradient is 0."""
    if norm == "linf":
        return jnp.sign(gradients_NHWC)
    # By the largest number first, for squares of small gradients are 0 in float32.
    largest = jnp.max(jnp.abs(gradients_NHWC), axis=(1, 2, 3), keepdims=True)
    scaled = gradients_NHWC / jnp.where(largest > 0, largest, 1)
    return scaled / jnp.maximum(lengths(scaled), 1)


def projected(changes_NHWC: jax.Array, images_NHWC: jax.Array, config: AttackConfig) -> jax.Array:
    """Perturbations within the ball, and such that pixels stay from 0 to 1.

    The second makes no number of a perturbation larger, so that both hold.
    """
    if config.norm == "linf":
        changes_NHWC = jnp.clip(changes_NHWC, -config.radius, config.radius)
    else:
        changes_NHWC = changes_NHWC * (config.radius / jnp.maximum(lengths(changes_NHWC), config.radius))
    return jnp.clip(images_NHWC + changes_NHWC, 0, 1) - images_NHWC


def perturbations(
    scores: Callable[[jax.Array], jax.Array], images_NHWC: jax.Array, labels_N: jax.Array, config: AttackConfig
) -> jax.Array:
    """Perturbations float32 [N, H, W, C] of images by an attack that starts from the images themselves.

    Args:
      scores: images [N, H, W, C] to scores of classes [N, Y]; no image may depend on another.
      images_NHWC: float32, from 0 to 1.
      labels_N: the right classes.
      config: which attack.
    """

    def loss(x_NHWC: jax.Array) -> jax.Array:
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(scores(x_NHWC), labels_N))

    length = config.radius if config.step_size is None else config.step_size

    def step(changes_NHWC: jax.Array, _: None) -> tuple[jax.Array, None]:
        gradients = jax.grad(loss)(images_NHWC + changes_NHWC)
        return projected(changes_NHWC + length * ascent(gradients, config.norm), images_NHWC, config), None

    changes, _ = jax.lax.scan(step, jnp.zeros_like(images_NHWC), length=config.steps)
    return changes
