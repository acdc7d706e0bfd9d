"""Displays for tests of global relations between parts: rearranged images, closure, figure and ground.

All are made of the seed alone. Shapes: N displays, H rows, W columns (as many), C channels, K blocks of an image.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from sparsezoo_jax.data.images.drawing import FINE, OUTLINES, coarse, grid, noise, painted, shape, two_colours
from sparsezoo_jax.errors import DataError, require

#: Arrangements that are tried for an image before it is given up.
_TRIES = 10_000


class Triplets(NamedTuple):
    """Three images of the same blocks each, one of them unlike the others in how the blocks lie to each other."""

    images: np.ndarray
    """uint8 [N, 3, H, W, C]."""
    odd: np.ndarray
    """Place of the odd one, int [N]."""


class Figures(NamedTuple):
    """Images of one shape each, with where it is."""

    images: np.ndarray
    """uint8 [N, H, W, C]."""
    covered: np.ndarray
    """The share of each pixel that the shape covers, float [N, H, W]."""


class Closure(NamedTuple):
    """Four discs with a quarter missing each, at the corners of a square that is not drawn."""

    aligned: np.ndarray
    """The missing quarters make the corners of the square: uint8 [N, H, W, C]."""
    exchanged: np.ndarray
    """Discs in opposite corners have changed places, so that the missing quarters point outwards."""
    real: np.ndarray
    """The square alone, filled, in the same colours and anywhere."""


class Convexity(NamedTuple):
    """Two areas of the same size beside a scalloped contour; display 2 n + 1 is 2 n with the colours exchanged."""

    images: np.ndarray
    """uint8 [N, H, W, C]."""
    convex: np.ndarray
    """The share of each pixel that belongs to the area whose parts bulge, float [N, H, W]."""


def blocks_of(image_HWC: np.ndarray, block: int) -> np.ndarray:
    """The squares of `block` pixels, in the order of rows: [K, block, block, C]."""
    side, channels = len(image_HWC) // block, image_HWC.shape[-1]
    split = image_HWC.reshape(side, block, side, block, channels)
    return split.swapaxes(1, 2).reshape(side * side, block, block, channels)


def joined(blocks_KUUC: np.ndarray) -> np.ndarray:
    """The image that `blocks_of` took apart."""
    count, block, _, channels = blocks_KUUC.shape
    side = round(count**0.5)
    split = blocks_KUUC.reshape(side, side, block, block, channels)
    return split.swapaxes(1, 2).reshape(side * block, side * block, channels)


def neighbours_kept(order_K: np.ndarray) -> int:
    """Blocks whose neighbour to the right is the one that they had, and those for which this holds below.

    Block k of the arrangement is block `order[k]` of the image. The neighbour beyond the border is at the other border.
    """
    side = round(len(order_K) ** 0.5)
    now_SS, was_SS = order_K.reshape(side, side), np.arange(len(order_K)).reshape(side, side)
    kept = 0
    for axis in (0, 1):
        had = np.roll(was_SS, -1, axis).ravel()[now_SS]
        kept += int((np.roll(now_SS, -1, axis) == had).sum())
    return kept


def broken(image_HWC: np.ndarray, block: int, draw: np.random.Generator) -> np.ndarray:
    """The image's blocks in another arrangement, in which none has the neighbour to the right or below that it had.

    Nor is it the image moved by whole blocks (which equal blocks might make it).

    Raises:
      DataError: there seems to be no such arrangement.
    """
    parts = blocks_of(image_HWC, block)
    side = round(len(parts) ** 0.5)
    moved = {moved_by(image_HWC, block, down, right).tobytes() for down in range(side) for right in range(side)}
    for _ in range(_TRIES):
        order = draw.permutation(len(parts))
        made = joined(parts[order])
        if neighbours_kept(order) == 0 and made.tobytes() not in moved:
            return made
    different = len(np.unique(parts, axis=0))
    raise DataError(f"an image of {len(parts)} blocks, {different} of them different, can't be rearranged")


def moved_by(image_HWC: np.ndarray, block: int, down: int, right: int) -> np.ndarray:
    """The image moved by whole blocks; what leaves it at one border enters at the other."""
    return np.roll(image_HWC, (down * block, right * block), (0, 1))


def disrt(
    images_NHWC: np.ndarray,
    block: int,
    *,
    pair: Literal["intact", "broken"] = "intact",
    reach: int | None = None,
    seed: int = 0,
) -> Triplets:
    """Triplets in the manner of the Distorted Spatial Relationship Testbench, one of each image.

    Every image of a triplet has the blocks of the original, to the bit, each as often: whatever is counted within
    blocks, at places or not, is equal. They are moved by whole blocks, the three by different ways, so that as many
    pixels differ between two that are alike as between others. With `pair` "intact" two are the original and the odd
    one is `broken`; with "broken" two are, each in an arrangement of its own, and the odd one is the original.

    Args:
      images_NHWC: uint8, square.
      block: pixels of a block's side; the patches of a model should divide it.
      reach: most blocks that an image is moved by in each direction. None: any.

    Raises:
      ConfigError: a block that does not divide the images, or is no smaller, or a reach of 0.
      DataError: an image whose blocks can't be rearranged.

    Source: arXiv 2506.00718, which keeps textures by synthesis and not by blocks: this construction is a choice.
    """
    size = images_NHWC.shape[1]
    require(block > 0 and size % block == 0, "block", block, f"must divide the images' {size} pixels")
    side = size // block
    require(side > 1, "block", block, f"must be below the images' {size} pixels")
    require(reach is None or reach > 0, "reach", reach, "must be above 0, or none")
    most = side if reach is None else min(side, 2 * reach + 1)
    made, odd = np.empty((len(images_NHWC), 3, *images_NHWC.shape[1:]), np.uint8), []
    for n, image in enumerate(images_NHWC):
        draw = np.random.default_rng((seed, 4, n))
        ways = draw.choice(most * most, 3, replace=False)
        alike = [image, image] if pair == "intact" else [broken(image, block, draw) for _ in range(2)]
        other = broken(image, block, draw) if pair == "intact" else image
        place = int(draw.integers(3))
        for i, (one, way) in enumerate(zip([*alike[:place], other, *alike[place:]], ways, strict=True)):
            down, right = (int(x) - (most // 2 if reach is not None else 0) for x in divmod(way, most))
            made[n, i] = moved_by(one, block, down, right)
        odd.append(place)
    return Triplets(made, np.asarray(odd))


def figures(count: int, size: int = 32, *, margin: int = 0, seed: int = 0) -> Figures:
    """Shapes as those of the set `shapes`, no pixel of which is nearer to the border than `margin`.

    Raises:
      ConfigError: the margin leaves no room for them.
    """
    low, high = 0.18 * size, min(0.38 * size, size / 2 - margin)
    require(low < high, "margin", margin, f"leaves no room for a shape in {size} pixels")
    names, images, covered = tuple(OUTLINES), [], []
    for n in range(count):
        draw = np.random.default_rng((seed, 5, n))
        ground, figure = two_colours(draw)
        radius = draw.uniform(low, high)
        x, y = draw.uniform(margin + radius, size - margin - radius, 2)
        covered.append(shape(names[n % len(names)], size, x, y, radius, draw.uniform(0, 2 * np.pi)))
        images.append(_bytes(painted(covered[-1], ground, figure) + noise(draw, size)))
    return Figures(np.stack(images), np.stack(covered))


def closure(count: int, size: int = 32, unit: int = 4, *, seed: int = 0) -> Closure:
    """Displays after Kanizsa, in which aligned and exchanged inducers have the same blocks of `unit` pixels.

    An inducer is a square of two units, which changes places as it is, noise included; one or two units lie between
    two of them.

    Raises:
      ConfigError: the size is no multiple of the unit, or has no room for six of them.
    """
    require(unit > 1 and size % unit == 0, "unit", unit, f"must be above 1 and divide size={size}")
    require(size // unit >= 6, "size", size, f"must be at least {6 * unit}")
    found: tuple[list[np.ndarray], ...] = ([], [], [])
    for n in range(count):
        draw = np.random.default_rng((seed, 6, n))
        ground, figure = two_colours(draw)
        gap = int(draw.integers(1, min(2, size // unit - 5) + 1))
        top, left = (unit * int(x) for x in draw.integers(0, size // unit - 4 - gap + 1, 2))
        tiles = [slice(0, 2 * unit), slice((2 + gap) * unit, (4 + gap) * unit)]
        mask = np.zeros((size, size))
        for down in (0, 1):
            for right in (0, 1):
                own = mask[top:, left:][tiles[down], tiles[right]]
                own[...] = _inducer(2 * unit, 1 - 2 * down, 1 - 2 * right)
        aligned = _bytes(painted(mask, ground, figure) + noise(draw, size))
        exchanged = aligned.copy()
        for down in (0, 1):
            for right in (0, 1):
                from_corner = aligned[top:, left:][tiles[1 - down], tiles[1 - right]]
                exchanged[top:, left:][tiles[down], tiles[right]] = from_corner
        side = (2 + gap) * unit
        y, x = draw.uniform(0, size - side, 2)
        across, along = grid(slice(0, size), slice(0, size))
        square = coarse((np.abs(across - x - side / 2) <= side / 2) & (np.abs(along - y - side / 2) <= side / 2))
        real = _bytes(painted(square, ground, figure) + noise(draw, size))
        for images, image in zip(found, (aligned, exchanged, real), strict=True):
            images.append(image)
    return Closure(*(np.stack(images) for images in found))


def convexity(count: int, size: int = 32, *, seed: int = 0) -> Convexity:
    """Two areas that divide an image at a contour of two or three half circles: those of one bulge into the other.

    Which side is the convex one, and whether the contour runs down or across, is drawn; the areas are as large as each
    other. Every second display is the one before it with the two colours exchanged.

    Raises:
      ConfigError: an odd count.
    """
    require(count % 2 == 0, "count", count, "must be even: displays come in twos")
    images, convex = [], []
    across, down = grid(slice(0, size), slice(0, size))
    for n in range(count // 2):
        draw = np.random.default_rng((seed, 7, n))
        one, other = two_colours(draw)
        length = size / int(draw.integers(2, 4))
        along = (down / length + draw.random()) % 1
        bulge = length / 2 * np.sqrt(1 - (2 * along - 1) ** 2)
        area = coarse(across <= size / 2 + bulge - bulge[:, 0].mean())
        if draw.random() < 0.5:
            area = area[:, ::-1]
        if draw.random() < 0.5:
            area = area.T
        spots = noise(draw, size)
        for ground, figure in ((one, other), (other, one)):
            images.append(_bytes(painted(area, ground, figure) + spots))
            convex.append(area)
    return Convexity(np.stack(images), np.stack(convex))


def _inducer(side: int, down: int, right: int) -> np.ndarray:
    """A disc in a square of `side` pixels, without the quarter in the direction of two signs: float [side, side]."""
    across = (np.arange(side * FINE) + 0.5) / FINE - side / 2
    u, v = np.meshgrid(across, across)
    return coarse((np.hypot(u, v) <= side / 2 - 0.5) & ~((right * u > 0) & (down * v > 0)))


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
