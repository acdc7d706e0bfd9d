"""Generated clips of one shape that moves steadily over a ground that stays as it is."""

from __future__ import annotations

import functools

import numpy as np

from sparsezoo_jax.data.images.drawing import OUTLINES, noise, painted, shape, two_colours
from sparsezoo_jax.data.images.image_set import ImageSet, Wanted, generated, register_images

#: Where shapes move: by so many eighths of a turn from east, counted over north.
DIRECTIONS = ("east", "north-east", "north", "north-west", "west", "south-west", "south", "south-east")
_OUTLINES = tuple(OUTLINES)


@register_images("moving_shapes")
def moving_shapes(wanted: Wanted) -> ImageSet:
    """Clips of any shape: where it moves is the class. It stays within the frame, and does not turn."""
    return generated(DIRECTIONS, wanted, functools.partial(_drawn, frames=wanted.frames))


def _drawn(draw: np.random.Generator, label: int, size: int, *, frames: int) -> np.ndarray:
    ground, figure = two_colours(draw)
    name = _OUTLINES[draw.integers(len(_OUTLINES))]
    radius, angle = size * draw.uniform(0.12, 0.22), draw.uniform(0, 2 * np.pi)
    length = size * draw.uniform(0.2, 0.5)  # of the whole path
    towards = label * np.pi / 4
    path = length * np.array([np.cos(towards), -np.sin(towards)])
    low = radius - np.minimum(path, 0)
    start = draw.uniform(low, size - radius - np.maximum(path, 0))
    background = noise(draw, size)
    places = [(float(x), float(y)) for x, y in start + np.linspace(0, 1, frames)[:, None] * path]
    masks = [shape(name, size, x, y, radius, angle) for x, y in places]
    return np.stack([painted(mask, ground, figure) + background for mask in masks])
