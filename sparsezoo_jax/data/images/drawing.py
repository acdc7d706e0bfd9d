"""What generated images are made of: coordinates, outlines, and colours.

Shapes: H rows, W columns (as many), P points of a row of the finer grid, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: Points of a pixel's side at which a drawing is evaluated; their mean is the pixel.
FINE = 3
#: Least difference of brightness between two colours, of 1.
CONTRAST = 0.25
#: Standard deviation of the noise of a pixel, of 1.
NOISE = 0.03


def grid(rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """Horizontal and vertical coordinates [P, P] in pixels of the points of some pixels; down is positive."""
    along, down = ((np.arange(pixels.start * FINE, pixels.stop * FINE) + 0.5) / FINE for pixels in (columns, rows))
    x, y = np.meshgrid(along, down)
    return x, y


def turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along axes that are turned by an angle in radians."""
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def coarse(fine: np.ndarray) -> np.ndarray:
    """Means over the points of each pixel: [P, P] -> [H, W], or of another rectangle."""
    height, width = fine.shape
    return fine.reshape(height // FINE, FINE, width // FINE, FINE).mean((1, 3))


def two_colours(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours, each float [3] from 0 to 1, that differ in brightness."""
    while True:
        one, other = draw.random((2, 3))
        if abs(one.mean() - other.mean()) >= CONTRAST:
            return one, other


def painted(mask_HW: np.ndarray, ground: np.ndarray, figure: np.ndarray) -> np.ndarray:
    """`figure` where the mask is 1, `ground` where it is 0: float [H, W, C]."""
    return ground + mask_HW[..., None] * (figure - ground)


def noise(draw: np.random.Generator, size: int) -> np.ndarray:
    """Noise of pixels, float [H, W, C]."""
    return NOISE * draw.standard_normal((size, size, 3))


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A pentagram with its tips at distance 1, the first along u.
    from_tip = np.abs((np.arctan2(v, u) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    return np.hypot(u, v) * np.cos(2 * np.pi / 5 - from_tip) <= np.cos(2 * np.pi / 5)


#: Whether points are inside of a shape that reaches to distance 1 from its centre.
OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: np.hypot(u, v) <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= np.sqrt(0.5),
    "triangle": lambda u, v: (v >= -0.5) & (np.sqrt(3) * np.abs(u) + v <= 1),
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) <= 0.3) & (np.maximum(np.abs(u), np.abs(v)) <= 0.95),
    "ring": lambda u, v: (np.hypot(u, v) <= 1) & (np.hypot(u, v) >= 0.55),
    "star": _star,
}


def shape(name: str, size: int, x: float, y: float, radius: float, angle: float) -> np.ndarray:
    """How much of each pixel [H, W] a shape covers; its centre and radius are in pixels."""
    covered = np.zeros((size, size))
    # Only the square that it may touch, which is a small part of a frame.
    columns, rows = (slice(max(0, int(at - radius)), min(size, int(at + radius) + 1)) for at in (x, y))
    across, down = grid(rows, columns)
    u, v = turned((across - x) / radius, (down - y) / radius, angle)
    covered[rows, columns] = coarse(OUTLINES[name](u, v))
    return covered
