"""Image sets by name, each a few arrays in memory.

Shapes: N images, T frames of a clip, H rows, W columns, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sparsezoo_jax.errors import ConfigError, DataError, require

#: What an image set of the catalogue is called: 'tfds:' and its name there.
TFDS = "tfds:"
#: The splits of sets that are no TFDS sets, which have splits of their own.
SPLITS = ("train", "validation")
#: Pixels of a side at most, frames of a clip, and images at once.
MAX_SIZE, MAX_FRAMES, MAX_COUNT = 1024, 1024, 2**24
_Function = TypeVar("_Function", bound=Callable[..., Any])


class ImageSet(NamedTuple):
    """Images with their classes."""

    images: np.ndarray
    """uint8 [N, H, W, C], of clips [N, T, H, W, C]."""
    labels: np.ndarray
    """int32 [N]: numbers of `classes`."""
    classes: tuple[str, ...]
    """Names of the classes."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What of an image set is asked for; None is the set's own choice."""

    split: str = "train"
    count: int | None = None
    size: int | None = None
    frames: int = 8
    seed: int = 0
    tfds_data_dir: str | None = None

    def draws(self, index: int) -> np.random.Generator:
        """The random numbers of image `index`: the same however many are asked for, and others in each split."""
        return np.random.default_rng((self.seed, SPLITS.index(self.split), index))


Opener = Callable[[Wanted], ImageSet]
IMAGE_SETS: dict[str, Opener] = {}


def register_images(name: str) -> Callable[[_Function], _Function]:
    """Decorator of a function that makes an image set: `open_images(name)` calls it.

    Raises:
      ConfigError: another set has that name.
    """

    def register(opener: _Function) -> _Function:
        if name in IMAGE_SETS:
            raise ConfigError("data.dataset", name, "is another image set's name")
        IMAGE_SETS[name] = opener
        return opener

    return register


def open_images(
    name: str,
    split: str = "train",
    *,
    count: int | None = None,
    size: int | None = None,
    frames: int = 8,
    seed: int = 0,
    tfds_data_dir: str | None = None,
) -> ImageSet:
    """An image set, the same for the same arguments.

    Args:
      name: one of `IMAGE_SETS`, or 'tfds:NAME' for a set of the TFDS catalogue that has an image and a class label.
      split: 'train' or 'validation', which share no image; of TFDS sets any split or slice of one ('train[:90%]').
      count: so many images, the first ones. None: all of a set that has an end, 4,096 (train) or 1,024 of one that is
        generated.
      size: pixels of a side. None: as the set is, 32 if it is generated.
      frames: frames of a clip, in sets of clips.
      seed: of what is generated, and of the order and split of digits.
      tfds_data_dir: where prepared TFDS sets are; None is TFDS's default.

    Raises:
      DataError: there is no such set or split, it has fewer images, or lacks a package.
      ConfigError: a number is out of its range.
    """
    require(count is None or 1 <= count <= MAX_COUNT, "count", count, f"must be from 1 to {MAX_COUNT}, or none")
    require(size is None or 4 <= size <= MAX_SIZE, "size", size, f"must be from 4 to {MAX_SIZE} pixels, or none")
    require(1 <= frames <= MAX_FRAMES, "frames", frames, f"must be from 1 to {MAX_FRAMES}")
    require(0 <= seed < 2**32, "seed", seed, f"must be from 0 to {2**32 - 1}")
    wanted = Wanted(split, count, size, frames, seed, tfds_data_dir)
    if name.startswith(TFDS):
        from sparsezoo_jax.data.images.tfds_images import open_tfds_images

        return open_tfds_images(name.removeprefix(TFDS), wanted)
    if name not in IMAGE_SETS:
        known = ", ".join(sorted(IMAGE_SETS))
        raise DataError(f"data.dataset={name}: no image set; there are {known}, and {TFDS}NAME of the TFDS catalogue")
    if split not in SPLITS:
        raise DataError(f"data.dataset={name}: no images in split '{split}'; it has {', '.join(SPLITS)}")
    return IMAGE_SETS[name](wanted)


def first(found: ImageSet, name: str, wanted: Wanted) -> ImageSet:
    """The first images of a set that has an end, as many as are wanted.

    Raises:
      DataError: it has fewer.
    """
    if wanted.count is None:
        return found
    if wanted.count > len(found.labels):
        raise DataError(
            f"data.dataset={name}: {len(found.labels)} images in split '{wanted.split}', not {wanted.count}"
        )
    return ImageSet(found.images[: wanted.count], found.labels[: wanted.count], found.classes)


def generated(
    classes: tuple[str, ...], wanted: Wanted, drawn: Callable[[np.random.Generator, int, int], np.ndarray]
) -> ImageSet:
    """A set whose images are drawn one by one: `drawn(random numbers, class, pixels of a side)`, from 0 to 1.

    Classes are as frequent as each other: image n has class n modulo their number.
    """
    count = wanted.count or (4096 if wanted.split == "train" else 1024)
    labels = np.arange(count, dtype=np.int32) % len(classes)
    images = [
        np.rint(255 * np.clip(drawn(wanted.draws(n), int(label), wanted.size or 32), 0, 1)).astype(np.uint8)
        for n, label in enumerate(labels)
    ]
    return ImageSet(np.stack(images), labels, classes)
