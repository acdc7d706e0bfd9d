"""Generated images of one shape each, of any colour, place, size and turn, on a plain ground."""

from __future__ import annotations

import numpy as np

from sparsezoo_jax.data.images.drawing import OUTLINES, noise, painted, shape, two_colours
from sparsezoo_jax.data.images.image_set import ImageSet, Wanted, generated, register_images

CLASSES = tuple(OUTLINES)


@register_images("shapes")
def shapes(wanted: Wanted) -> ImageSet:
    """A disc, square, triangle, cross, ring or star in an image: what it is is the class."""
    return generated(CLASSES, wanted, _drawn)


def _drawn(draw: np.random.Generator, label: int, size: int) -> np.ndarray:
    ground, figure = two_colours(draw)
    radius = size * draw.uniform(0.18, 0.38)
    x, y = draw.uniform(radius, size - radius, 2)
    mask = shape(CLASSES[label], size, x, y, radius, draw.uniform(0, 2 * np.pi))
    return painted(mask, ground, figure) + noise(draw, size)
