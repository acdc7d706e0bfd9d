"""Generated images of one texture each, of any colours, wavelength, phase and turn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sparsezoo_jax.data.images.drawing import coarse, grid, noise, painted, turned, two_colours
from sparsezoo_jax.data.images.image_set import ImageSet, Wanted, generated, register_images


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u = u / 2 + np.floor(v) % 2 / 2  # a brick is twice as long as high, and every other row is moved by half of one
    return (u % 1 > 0.1) & (v % 1 > 0.2)


#: The texture at points in units of its wavelength, 0 or 1.
_TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stripes": lambda u, v: u % 1 < 0.5,
    "checks": lambda u, v: (u % 1 < 0.5) ^ (v % 1 < 0.5),
    "dots": lambda u, v: np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3,
    "bricks": _bricks,
    "rings": lambda u, v: np.hypot(u, v) % 1 < 0.5,
}
CLASSES = (*_TEXTURES, "clouds")


@register_images("textures")
def textures(wanted: Wanted) -> ImageSet:
    """Stripes, checks, dots, bricks, rings or clouds all over an image: what they are is the class."""
    return generated(CLASSES, wanted, _drawn)


def _drawn(draw: np.random.Generator, label: int, size: int) -> np.ndarray:
    ground, figure = two_colours(draw)
    wavelength = size * draw.uniform(0.12, 0.3)
    if CLASSES[label] == "clouds":
        mask = _clouds(draw, size, wavelength)
    else:
        x, y = grid(slice(0, size), slice(0, size))
        u, v = turned((x - draw.uniform(0, size)), (y - draw.uniform(0, size)), draw.uniform(0, 2 * np.pi))
        mask = coarse(_TEXTURES[CLASSES[label]](u / wavelength, v / wavelength))
    return painted(mask, ground, figure) + noise(draw, size)


def _clouds(draw: np.random.Generator, size: int, wavelength: float) -> np.ndarray:
    """Noise that is smooth over about a wavelength, with levels that are equally frequent: [H, W] from 0 to 1."""
    along = np.fft.fftfreq(size)
    filtered = np.exp(-2 * (wavelength / 3) ** 2 * (along[:, None] ** 2 + along[None] ** 2))
    smooth = np.fft.ifft2(np.fft.fft2(draw.standard_normal((size, size))) * filtered).real
    return smooth.ravel().argsort().argsort().reshape(size, size) / (size * size - 1)
